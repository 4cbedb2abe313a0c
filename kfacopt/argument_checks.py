"""Checks of arguments, with errors that name them; what one class alone checks stands there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
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


def as_integer(name: str, value: Any, least: int, most: int | None = None, note: str = "") -> int:
    """Return an integer of Python's or NumPy's as an `int`; raise unless it is within bounds.

    Args:
        name: What errors call it.
        value: What was given.
        least: The smallest value that is allowed.
        most: The largest one, if there is one.
        note: What errors say of the largest one.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"between {least} and {most}{note}"
        raise ValueError(f"{name} must be an integer {bound}, got {value!r}.")
    return int(value)


def as_real(name: str, value: Any, lower: float = -math.inf, *, lower_open: bool = False) -> float:
    """Return a number, also an array's or tensor's only one, as a `float`; raise unless finite.

    Args:
        name: What errors call it.
        value: What was given.
        lower: The bound that it must not be below.
        lower_open: Whether it must not be the bound either.
    """
    number = value
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        number = value.item()
    is_real = isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number)
    if not is_real or number < lower or (lower_open and number == lower):
        bound = "greater than" if lower_open else "at least"
        limit = "a finite number" if lower == -math.inf else f"finite and {bound} {lower}"
        raise ValueError(f"{name} must be {limit}, got {value!r}.")
    return float(number)


def check_integer(name: str, value: Any) -> None:
    """Raise unless a value is an integer of 64 bits, as a generator's seed is."""
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must be an integer of 64 bits, got {value!r}.")


def check_shape(shape: Any, expected: tuple[int, int], what: str = "these params") -> None:
    """Raise unless a stated shape is `None` or the one that is expected."""
    fits = isinstance(shape, tuple | list) and tuple(shape) == expected
    if shape is not None and not fits:
        raise ValueError(f"shape must be {expected} for {what}, got {shape!r}.")


def check_loss(loss_func: Any) -> None:
    """Raise unless a loss function is something to call; a class of losses is not."""
    if isinstance(loss_func, type) or not callable(loss_func):
        raise ValueError(
            f"loss_func must be a function or an instance like nn.MSELoss(), got {loss_func!r}."
        )


def check_evaluation(
    data: Any, progressbar: Any, check_deterministic: Any, batch_size_fn: Any = None
) -> None:
    """Raise unless data can be iterated, flags are flags, and a function is one, or `None`."""
    if not isinstance(data, Iterable):
        raise ValueError(f"data must be an iterable of batches (X, y), got {data!r}.")
    check_flag("progressbar", progressbar)
    check_flag("check_deterministic", check_deterministic)
    if batch_size_fn is not None and not callable(batch_size_fn):
        raise ValueError(
            f"batch_size_fn must be a function from X to the number of data, got {batch_size_fn!r}."
        )


def check_params(params: Any) -> Any:
    """Return parameters as a list of tensors, or the mapping to tensors; raise unless they are."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise ValueError(
            f"params must be a list of parameters or a dict, got {type(params).__name__}."
        )
    if not isinstance(params, Mapping):
        params = list(params)  # of `model.parameters()`, which can be read once only
    values = params.values() if isinstance(params, Mapping) else params
    for i, p in enumerate(values):
        if not isinstance(p, Tensor):
            raise ValueError(f"params[{i}] must be a tensor, got {p!r}.")
    return params


def check_distinct(params: Sequence[Tensor]) -> None:
    """Raise unless there are parameters, each once."""
    if not params:
        raise ValueError("params: at least one parameter is needed.")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("params: a parameter stands there twice.")


def checked_output(output: Any) -> Tensor:
    """Return what a model returned, if it is one tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"model_func must return one tensor, got {type(output).__name__}; wrap the model in a "
            "module that selects what the loss sees."
        )
    return output
