"""Checks of arguments, whose errors name the argument, the constraint and the value."""

from __future__ import annotations

import math
from typing import Any


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless a value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise unless a value is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Raise unless a value is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def check_range(
    name: str,
    value: Any,
    lower: float,
    upper: float = math.inf,
    *,
    lower_open: bool = False,
    upper_open: bool = False,
) -> None:
    """Raise unless a value is a finite number in an interval."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and lower <= value <= upper
    if not inside or (lower_open and value == lower) or (upper_open and value == upper):
        brackets = ("(" if lower_open else "[") + f"{lower}, {upper}"
        brackets += ")" if upper_open or upper == math.inf else "]"
        raise ValueError(f"{name} must be a number in {brackets}, got {value!r}.")


def check_integer(name: str, value: Any) -> None:
    """Raise unless a value is an integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
