"""The state before the first step, complete: what checkpoint tools load into; no statistics yet.

`torch.distributed.checkpoint` loads only what a fresh optimizer has, so everything is there, with
shapes and dtypes that follow from the parameters; numbers tell that it holds nothing yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.factor_forms import FactorForm
from kfacopt.kfac.layers import Block, Layer
from kfacopt.linalg.triangles import kept_shape
from kfacopt.optim.settings import Groups, InverseForm, Settings
from kfacopt.optim.state.inverses import (
    BASES,
    INPUT_UPDATE,
    INVERSES,
    LEVELS,
    NO_INVERSE,
    POSITION_BASIS,
    refresh_inverse,
)
from kfacopt.optim.state.running_averages import States, factor_shapes, initialise_factors

PREVIOUS = "previous_parameter"
HAS_PREVIOUS = "has_previous_parameter"


def initialise_previous(state: dict[str, Any], p: Parameter) -> None:
    """Give a parameter's state the entries that the last step leaves in it, as before any step."""
    if HAS_PREVIOUS not in state:
        state |= {PREVIOUS: p.detach().clone(), HAS_PREVIOUS: 0}


def momentum_buffer(state: dict[str, Any], p: Parameter) -> Tensor:
    """Return a parameter's momentum; give it one of zeros if it has none."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def initialise_moments(state: dict[str, Any], p: Parameter) -> None:
    """Give a parameter AdamW's state if it has none."""
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def is_initialisation(groups: Groups) -> bool:
    """Tell whether a first step only makes the state: learning rates and gradients are all 0."""
    if any(group["lr"] != 0 for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(g.any()) for g in grads)


def complete_state(
    states: States, layers: Sequence[Layer], groups: Groups, settings: Settings
) -> None:
    """Give every trained parameter the entries that it lacks; they change no later step."""
    group_of = {p: group for group in groups for p in group["params"]}
    for layer in layers:
        initialise_factors(states[layer.anchor], layer, settings.curvature.form)
        for block in layer.blocks:
            _complete_inverse(states, block, settings.inverse)
            for p in block.parameters:
                if settings.steps.tuned:
                    initialise_previous(states[p], p)
                elif group_of[p]["momentum"]:
                    momentum_buffer(states[p], p)
    covered = {p for layer in layers for block in layer.blocks for p in block.parameters}
    for p in group_of:
        if p.requires_grad and p not in covered:
            initialise_moments(states[p], p)


def _complete_inverse(states: States, block: Block, form: InverseForm) -> None:
    state, layer_state = states[block.anchor], states[block.layer.anchor]
    if "inverse_step" in state:
        return
    # The inverse of the empty factors has the entries, shapes and dtypes of any other.
    empty: Mapping[str, Any] = {
        name: torch.ones_like(value) if name == "factor_weight" else torch.zeros_like(value)
        for name, value in layer_state.items()
        if isinstance(value, Tensor)
    }
    refresh_inverse(state, dict(empty), block, 1.0, form)
    state["inverse_step"] = NO_INVERSE


def state_shapes(
    params: Sequence[Parameter], layers: Sequence[Layer], form: FactorForm
) -> dict[Parameter, dict[str, tuple[int, ...]]]:
    """Return, for each parameter, the shapes that entries of its state have where they exist."""
    own = ("momentum_buffer", "exp_avg", "exp_avg_sq", PREVIOUS)
    shapes: dict[Parameter, dict[str, tuple[int, ...]]] = {
        p: dict.fromkeys(own, tuple(p.shape)) for p in params
    }
    for layer in layers:
        factors, whole = factor_shapes(layer, form), form.shapes(layer)
        shapes[layer.anchor] |= factors | {"factor_weight": form.count_shape(layer)}
        for block in layer.blocks:
            constant = (layer.groups, 1, 1)  # a bias's input
            sides = {
                "grad_output": whole[1],
                "input": constant if block.weight is None else whole[0],
            }
            is_split = layer.positions and block.weight is not None
            entries: dict[str, tuple[int, ...]] = {"second_moment_weight": form.count_shape(layer)}
            for name in ("inverse_eigenvalues", "second_moments"):
                entries[name] = (layer.groups, layer.d_out, block.d_in)
            for (side, shape), other in zip(sides.items(), (*sides.values(),)[::-1], strict=True):
                entries |= {
                    f"{side}_inverse": kept_shape(shape, other[1]),
                    f"{side}_basis": shape,
                    f"{side}_levels": shape[:2],
                }
            if is_split:
                B, K, C = layer.groups, layer.positions, layer.channels
                entries |= {INVERSES[1]: kept_shape((B, K, C, C), layer.d_out), BASES[1]: (B, C, C)}
                entries |= {INPUT_UPDATE: (B, layer.d_in + 1), POSITION_BASIS: (B, K, K)}
                entries |= {LEVELS[1]: (B, C), LEVELS[2]: (B, K)}
            shapes[block.anchor] |= entries
    return shapes
