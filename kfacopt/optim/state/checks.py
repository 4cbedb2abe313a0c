"""What a saved state must be to be loaded; nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.linalg.kronecker import diagonal_of, is_diagonal
from kfacopt.linalg.low_rank import is_low_rank, is_possible_factor, is_possible_inverse
from kfacopt.linalg.triangles import other_shapes, symmetric
from kfacopt.optim.group_settings import check_group
from kfacopt.optim.settings import Groups
from kfacopt.optim.state.conversions import was_not_saved
from kfacopt.optim.state.initial import HAS_PREVIOUS, PREVIOUS
from kfacopt.optim.state.inverses import (
    BASES,
    CORRECTION,
    INPUT_UPDATE,
    INVERSES,
    LEVELS,
    NO_INVERSE,
    POSITION_BASIS,
)
from kfacopt.optim.state.running_averages import FACTORS, RECORDS, REST

Shapes = Mapping[str, tuple[int, ...]]

# Beyond round-off of a matrix product, or of bfloat16, in units of the largest entry.
_ASYMMETRY = 0.02

_NOT_NEGATIVE = ("inverse_eigenvalues", *CORRECTION, *LEVELS, "exp_avg_sq", "factor_weight", "step")
_SPLIT = (REST, INPUT_UPDATE, POSITION_BASIS)
_FLOATING = (*FACTORS, *INVERSES, *BASES, *_SPLIT, *_NOT_NEGATIVE, "momentum_buffer", "exp_avg")
_SCALARS = ("step", "skipped_updates", "factor_step")
_COUNTS = ("factor_updates", "skipped_updates", "factor_step", "inverse_failures", HAS_PREVIOUS)
_LEAST = dict.fromkeys(_COUNTS, 0) | {"inverse_step": NO_INVERSE}

# Entries that are there together or not at all.
_ADAMW = ("exp_avg", "exp_avg_sq", "step")
_TOGETHER = (
    (*FACTORS, REST, *RECORDS),
    (*INVERSES, INPUT_UPDATE),
    CORRECTION,
    _ADAMW,
    (PREVIOUS, HAS_PREVIOUS),
)


def check_state_dict(
    state_dict: Any,
    groups: Groups,
    named_params: Sequence[tuple[str, Parameter]],
    shapes_of: Callable[[Parameter, Mapping[str, Any]], Shapes],
    tuned: bool,
) -> None:
    """Raise unless a state dictionary can be loaded; nothing has been changed then.

    Args:
        state_dict: What is to be loaded.
        groups: The optimizer's groups.
        named_params: The optimizer's parameters, in order, with their names.
        shapes_of: Returns the shapes that the entries of a parameter's state must have, of it and
            of these entries.
        tuned: Whether the optimizer has lr="auto".

    Raises:
        ValueError: If it is not a KFACOptimizer's, or an entry is missing, or has a type, shape or
            value that no entry of its kind has.
    """
    kinds = (("state", Mapping), ("param_groups", list | tuple))
    fits = isinstance(state_dict, Mapping)
    if not fits or not all(isinstance(state_dict.get(key), kind) for key, kind in kinds):
        raise ValueError(
            "state_dict must be what KFACOptimizer.state_dict() returned, a dict with the keys "
            f"'state' (a dict) and 'param_groups' (a list), got {_described(state_dict)}."
        )
    for i, group in enumerate(state_dict["param_groups"]):
        _check_saved_group(f"state_dict: param_groups[{i}]", group, tuned)
    saved = list(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))
    if len(saved) != len(named_params):
        raise ValueError(
            f"state_dict has {len(saved)} parameters, this optimizer has {len(named_params)}. Load "
            "it before add_param_group, or add the same groups first."
        )
    sizes = [[len(g["params"]) for g in all_] for all_ in (state_dict["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"state_dict has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}."
        )
    _check_keys(state_dict["state"], saved)
    for key, (name, p) in zip(saved, named_params, strict=True):
        entries = state_dict["state"].get(key, {})
        _check_is_dict(name, entries)
        _check_entries(f"{name!r}", entries, shapes_of(p, entries), p.is_complex())
    _check_kind_of_steps(state_dict["state"], tuned)


def _present(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if not was_not_saved(value)}


def _check_kind_of_steps(states: Mapping[Any, Mapping[str, Any]], tuned: bool) -> None:
    """Raise for a state of steps with a fixed lr where steps tune themselves, or the reverse.

    A state without layers cannot tell, and passes.
    """
    there = [_present(entries) for entries in states.values()]
    saved_tuned = any(HAS_PREVIOUS in entries for entries in there)
    if saved_tuned == tuned or not any("factor_weight" in entries for entries in there):
        return
    saved, own = ('lr="auto"', "a number for lr")[:: 1 if saved_tuned else -1]
    raise ValueError(
        f"state_dict was saved with {saved}, and this optimizer has {own}: what lr and damping in "
        f"it mean is another. Make this one with {saved}, too; or put the entries of the factors "
        "alone into a state_dict() of this one."
    )


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        entries = {str(key): type(entry).__name__ for key, entry in value.items()}
        return ", ".join(f"{key!r} ({entries[key]})" for key in sorted(entries)[:6]) or "no keys"
    return type(value).__name__


def _check_saved_group(where: str, group: Any, tuned: bool) -> None:
    if not isinstance(group, Mapping) or "params" not in group:
        raise ValueError(f"{where} must be a dict with the key 'params', got {_described(group)}.")
    if not isinstance(group["params"], list | tuple):
        got = _described(group["params"])
        raise ValueError(f"{where}: params must be a list of numbers, got {got}.")
    check_group(group, f"{where}: ", tuned)


def _check_keys(state: Mapping[Any, Any], saved: list[Any]) -> None:
    try:
        known = set(saved)
    except TypeError:
        raise ValueError(
            f"state_dict: the params of groups must be numbers, got {saved!r}."
        ) from None
    if len(known) != len(saved):
        raise ValueError(f"state_dict: the params of groups must be all different, got {saved!r}.")
    strangers = [key for key in state if key not in known]
    if strangers:
        raise ValueError(f"state_dict has a state of {strangers}, which no group's params name.")


def _check_is_dict(name: str, entries: Any) -> None:
    if not isinstance(entries, Mapping):
        got = _described(entries)
        raise ValueError(f"state_dict: the state of {name!r} must be a dict, got {got}.")


def _check_entries(
    parameter: str, entries: Mapping[str, Any], shapes: Shapes, is_complex: bool
) -> None:
    there = _present(entries)
    for name, value in there.items():
        where = f"state_dict: {name} of {parameter}"
        if not isinstance(value, Tensor | int | float | dict):
            raise ValueError(f"{where} must be a tensor or a number, got {_described(value)}.")
        _check_entry(where, name, value, shapes.get(name), is_complex)
    # What the parameter has no use for, as of a layer that was frozen since, may be partial.
    without = () if REST in shapes else _SPLIT  # where A is not split
    together = [[n for n in names if n not in without] for names in _TOGETHER]
    together = [names for names in together if names[0] in shapes]
    for names in (*together, *_inverse_entries(there, shapes)):
        missing = [name for name in names if name not in there]
        if 0 < len(missing) < len(names):
            raise ValueError(f"state_dict: the state of {parameter} lacks {missing}.")


def _inverse_entries(there: Mapping[str, Any], shapes: Shapes) -> Iterable[tuple[str, ...]]:
    """Yield what must be there beside an inverse, or eigenvalues with full sides."""
    for name in ("inverse_eigenvalues", "second_moments"):
        if name in there and name in shapes:
            full = [basis for basis in BASES if len(shapes[basis]) == 3]
            full += [POSITION_BASIS] if POSITION_BASIS in shapes else []
            yield (name, "inverse_step", *full)
    if INVERSES[0] in there:
        yield (INVERSES[0], "inverse_step")


def _check_entry(
    where: str, name: str, value: Any, shape: tuple[int, ...] | None, is_complex: bool
) -> None:
    if name == "generator_state":
        _check_bytes(where, value)
    if name in _LEAST:
        _check_saved_count(where, value, _LEAST[name], name in _SCALARS)
        return
    if name in _SCALARS:
        shape = ()
    if shape is None:
        return
    others = other_shapes(shape) if name in (*FACTORS, *INVERSES) else ()
    if not isinstance(value, Tensor) or tuple(value.shape) not in (shape, *others):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{where} must be a tensor of shape {shape}, got {got}. Use the same model, "
            "frozen parameters, layers, separate_weight_and_bias, max_factor_dim, conv_factor and "
            "wide_factor as when it was saved."
        )
    if is_complex and value.is_complex():  # moments of real and imaginary parts
        value = torch.view_as_real(value)
    if name in _FLOATING and not value.is_floating_point():
        raise ValueError(f"{where} must be a tensor of floating numbers, got {value.dtype}.")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{where} has NaN or infinite entries.")
    if name in (*FACTORS, *INVERSES) and is_low_rank(value):
        possible = is_possible_factor if name in FACTORS else is_possible_inverse
        if not possible(value):
            raise ValueError(
                f"{where} must be of a positive matrix, as a low rank plus a diagonal."
            )
    elif name in (*FACTORS, *INVERSES):
        _check_positive(where, value)
    if name in _NOT_NEGATIVE and bool((value < 0).any()):
        raise ValueError(f"{where} must not be negative, got {float(value.min()):.3g}.")


def _check_bytes(where: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where} must be a vector of torch.uint8, got {got}.")


def _check_saved_count(where: str, value: Any, least: int, scalar: bool) -> None:
    if scalar:
        is_count = isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.int64
    else:
        is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or value < least:
        kind = "a tensor of one torch.int64" if scalar else "an integer"
        got = repr(value) if isinstance(value, int | float) else _described(value)
        if isinstance(value, Tensor) and value.numel() == 1:
            got = f"{value.item()} ({value.dtype})"
        raise ValueError(f"{where} must be {kind} of at least {least}, got {got}.")


def _check_positive(where: str, value: Tensor) -> None:
    """Raise unless `[B, d, d]` is symmetric with a diagonal, or `[B, d]` is one, of at least 0."""
    value = symmetric(value)
    if not is_diagonal(value):
        asymmetry = (value - value.mT).abs().amax() / value.abs().amax().clamp(min=1e-30)
        if float(asymmetry) > _ASYMMETRY:
            raise ValueError(f"{where} must be symmetric.")
    least = float(diagonal_of(value).min())
    if least < 0:
        raise ValueError(f"{where} must have no negative entry on its diagonal, got {least:.3g}.")
