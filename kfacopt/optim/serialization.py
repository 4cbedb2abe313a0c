"""What `torch.optim.Optimizer` loses of an optimizer's state, kept."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor

from kfacopt.kfac.layers import Layer

_GENERATOR = "generator_state"

# Kept in a dtype of their own, whatever that of the parameter.
_OWN_DTYPE = frozenset(
    {
        "input_factor",
        "grad_output_factor",
        "factor_weight",
        "skipped_updates",
        "factor_step",
        "grad_output_inverse",
        "input_inverse",
        "grad_output_basis",
        "input_basis",
        "inverse_eigenvalues",
    }
)


def check_groups(state_dict: dict[str, Any]) -> None:
    """Raise unless a state dictionary is one of `KFACOptimizer`'s."""
    for i, group in enumerate(state_dict["param_groups"]):
        missing = {"num_steps", "base_lr", "damping", "fallback_lr"} - set(group)
        if missing:
            raise ValueError(
                f"state_dict: param_groups[{i}] lacks {sorted(missing)}; it is not that of a "
                "KFACOptimizer."
            )


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
            if name in _OWN_DTYPE and isinstance(value, Tensor):
                states[p][name] = value.detach().to(p.device, copy=True)
            elif name == _GENERATOR:
                states[p][name] = value.detach().to("cpu", copy=True)


def check_shapes(
    states: MutableMapping[Tensor, Any],
    expected: Sequence[tuple[Layer, dict[str, tuple[int, ...]]]],
) -> None:
    """Raise if loaded factors do not fit the layers.

    Args:
        states: The optimizer's state after loading.
        expected: For each layer the shapes of its factors.
    """
    for layer, shapes in expected:
        state = states.get(layer.anchor, {})
        for name, shape in shapes.items():
            if name in state and tuple(state[name].shape) != shape:
                raise ValueError(
                    f"state_dict: layer {layer.name!r} has a {name} of shape "
                    f"{tuple(state[name].shape)}, this optimizer needs {shape}. Use the same "
                    "separate_weight_and_bias and max_factor_dim as when it was saved."
                )


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
            generator.set_state(state[_GENERATOR].to("cpu", torch.uint8))
