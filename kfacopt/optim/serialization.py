"""What `torch.optim.Optimizer` loses of an optimizer's state, kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Parameter

from kfacopt.argument_checks import check_range
from kfacopt.kfac.factors import FactorForm, factor_dtype
from kfacopt.kfac.layers import Layer
from kfacopt.optim.preconditioner import RECORDS, InverseForm

Shapes = Mapping[str, tuple[int, ...]]

logger = logging.getLogger("kfacopt")

_GENERATOR = "generator_state"

_INVERSE_SIDES = frozenset(
    {
        "grad_output_inverse",
        "input_inverse",
        "grad_output_basis",
        "input_basis",
        "inverse_eigenvalues",
    }
)

# Kept in a dtype of their own, whatever that of the parameter.
_OWN_DTYPE = _INVERSE_SIDES | frozenset(
    {
        "input_factor",
        "grad_output_factor",
        "factor_weight",
        "skipped_updates",
        "factor_step",
        "second_moments",
        "second_moment_weight",
    }
)


def check_state_dict(
    state_dict: Any,
    named_params: Sequence[tuple[str, Parameter]],
    shapes: Mapping[Parameter, Shapes],
) -> None:
    """Raise unless a state dictionary can be loaded; nothing has been changed then.

    Args:
        state_dict: What is to be loaded.
        named_params: The optimizer's parameters, in order, with their names.
        shapes: For each of them the shapes of the entries of its state.

    Raises:
        ValueError: If it is not a KFACOptimizer's, or an entry has the wrong type or shape, or a
            factor or inverse is not finite.
    """
    fits = isinstance(state_dict, Mapping) and {"state", "param_groups"} <= set(state_dict)
    if not fits or not isinstance(state_dict["state"], Mapping):
        raise ValueError(
            "state_dict must be what KFACOptimizer.state_dict() returned, a dict with the keys "
            f"'state' and 'param_groups', got {_described(state_dict)}."
        )
    for i, group in enumerate(state_dict["param_groups"]):
        _check_group(f"state_dict: param_groups[{i}]", group)
    saved = list(chain.from_iterable(g["params"] for g in state_dict["param_groups"]))
    if len(saved) != len(named_params):
        raise ValueError(
            f"state_dict has {len(saved)} parameters, this optimizer has {len(named_params)}. Load "
            "it before add_param_group, or add the same groups first."
        )
    for key, (parameter, p) in zip(saved, named_params, strict=True):
        entries = state_dict["state"].get(key, {})
        missing = [name for name in RECORDS if name not in entries]
        if "factor_weight" in entries and "input_factor" in shapes[p] and missing:
            raise ValueError(f"state_dict: the state of {parameter!r} lacks {missing}.")
        for name, value in entries.items():
            _check_entry(f"state_dict: {name} of {parameter!r}", value, shapes[p].get(name))


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"the keys {sorted(map(str, value))[:6]}"
    return type(value).__name__


def _check_group(where: str, group: Any) -> None:
    if not isinstance(group, Mapping) or "params" not in group:
        raise ValueError(f"{where} must be a dict with the key 'params', got {_described(group)}.")
    missing = {"num_steps", "base_lr", "damping", "fallback_lr"} - set(group)
    if missing:
        raise ValueError(f"{where} lacks {sorted(missing)}; it is not that of a KFACOptimizer.")
    steps = group["num_steps"]
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{where}: num_steps must be an integer of at least 0, got {steps!r}.")
    check_range(f"{where}: damping", group["damping"], 0, lower_open=True)


def _check_entry(where: str, value: Any, shape: tuple[int, ...] | None) -> None:
    if not isinstance(value, Tensor | int | float | dict):
        raise ValueError(f"{where} must be a tensor or a number, got {type(value).__name__}.")
    if shape is None or (isinstance(value, dict) and not value):
        return
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{where} must be a tensor of shape {shape}, got {got}. Use the same model, "
            "frozen parameters, separate_weight_and_bias and max_factor_dim as when it was saved."
        )
    if not bool(value.isfinite().all()):
        raise ValueError(f"{where} has NaN or infinite entries.")


def restore_dtypes(
    states: MutableMapping[Tensor, Any],
    param_groups: Sequence[dict[str, Any]],
    state_dict: dict[str, Any],
) -> None:
    """Undo the cast of floating state to the parameter's dtype in `Optimizer.load_state_dict`.

    Args:
        states: The optimizer's state after loading.
        param_groups: The optimizer's groups.
        state_dict: What was loaded.
    """
    saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    params = chain.from_iterable(g["params"] for g in param_groups)
    for key, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, dict) and not value:
                # What torch.distributed.checkpoint makes of an entry that was not saved.
                states[p].pop(name, None)
            elif name in _OWN_DTYPE and isinstance(value, Tensor):
                states[p][name] = value.detach().to(p.device, copy=True)
            elif name == _GENERATOR:
                states[p][name] = value.detach().to("cpu", copy=True)


def store_generator(
    states: MutableMapping[Tensor, Any], layers: Sequence[Layer], generator: Generator
) -> None:
    """Put a generator's state into that of the first layer: no other place is carried everywhere.

    Args:
        states: The optimizer's state.
        layers: Its layers.
        generator: The generator of labels.
    """
    for state in states.values():
        state.pop(_GENERATOR, None)
    if layers:
        states[layers[0].anchor][_GENERATOR] = generator.get_state().clone()


def restore_generator(states: MutableMapping[Tensor, Any], generator: Generator) -> None:
    """Set a generator to what `store_generator` put into the state, if it is there.

    Args:
        states: The optimizer's state.
        generator: The generator of labels.
    """
    for state in states.values():
        if _GENERATOR in state:
            try:
                generator.set_state(state[_GENERATOR].to("cpu", torch.uint8))
            except RuntimeError:  # of another kind of device
                logger.warning(
                    "the state of the generator of labels was saved on another kind of device; "
                    "labels are drawn from the seed instead"
                )


def follow_parameters(
    states: MutableMapping[Tensor, Any], form: FactorForm, inverse_form: InverseForm
) -> None:
    """Move the state to where its parameters are, after `model.to(...)`.

    Args:
        states: The optimizer's state.
        form: How factors are formed.
        inverse_form: How damped inverses are formed.
    """
    for p, state in states.items():
        own, device = factor_dtype(p.dtype), p.device
        for name, value in state.items():
            if name in (_GENERATOR, "step") or not isinstance(value, Tensor):
                continue
            dtype = value.dtype
            if name in ("input_factor", "grad_output_factor", "second_moments"):
                dtype = form.stored_dtype or own
            elif name in _INVERSE_SIDES:
                dtype = inverse_form.stored_dtype or form.stored_dtype or own
            elif value.is_floating_point():
                dtype = own if name in _OWN_DTYPE else p.dtype
            state[name] = value.to(device, dtype)
