"""The state as it is before the first step, complete: what checkpoint tools load into.

`torch.distributed.checkpoint` loads only what a fresh optimizer has, so everything is there, with
shapes and dtypes that follow from the parameters; numbers tell that it holds nothing yet.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.factors import FactorForm
from kfacopt.kfac.layers import Block, Layer
from kfacopt.linalg.kronecker import DampingMethod
from kfacopt.optim.fallback import initialise_moments
from kfacopt.optim.preconditioner import NO_INVERSE, initialise_factors, refresh_inverse


def is_initialisation(groups: Sequence[dict[str, Any]]) -> bool:
    """Tell whether a first step only makes the state: learning rates and gradients are all 0.

    Args:
        groups: The parameter groups.
    """
    if any(group["lr"] != 0 for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(g.any()) for g in grads)


def complete_state(
    states: MutableMapping[Tensor, Any],
    layers: Sequence[Layer],
    groups: Sequence[dict[str, Any]],
    form: FactorForm,
    method: DampingMethod,
) -> None:
    """Give every trained parameter the entries that it lacks; they change no later step.

    Args:
        states: The optimizer's state.
        layers: Its layers.
        groups: Its parameter groups.
        form: How factors are formed.
        method: The damping method.
    """
    group_of = {p: group for group in groups for p in group["params"]}
    for layer in layers:
        initialise_factors(states[layer.anchor], layer, form)
        for block in layer.blocks:
            _complete_inverse(states, block, method)
            for p in block.parameters:
                if group_of[p]["momentum"] and "momentum_buffer" not in states[p]:
                    states[p]["momentum_buffer"] = torch.zeros_like(
                        p, memory_format=torch.preserve_format
                    )
    covered = {p for layer in layers for block in layer.blocks for p in block.parameters}
    for p in group_of:
        if p.requires_grad and p not in covered:
            initialise_moments(states[p], p)


def _complete_inverse(
    states: MutableMapping[Tensor, Any], block: Block, method: DampingMethod
) -> None:
    state, layer_state = states[block.anchor], states[block.layer.anchor]
    if "inverse_step" in state:
        return
    # The inverse of the empty factors has the entries, shapes and dtypes of any other.
    empty: Mapping[str, Any] = {
        name: torch.ones_like(value) if name == "factor_weight" else torch.zeros_like(value)
        for name, value in layer_state.items()
        if isinstance(value, Tensor)
    }
    refresh_inverse(state, dict(empty), block, 1.0, method)
    state["inverse_step"] = NO_INVERSE


def trained_signature(params: Sequence[Parameter]) -> list[tuple[bool, torch.dtype, torch.device]]:
    """Return what of the parameters the layers, factors and hooks depend on."""
    return [(p.requires_grad, p.dtype, p.device) for p in params]
