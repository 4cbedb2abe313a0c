"""The update of parameters that have no Kronecker factors."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from kfacopt.optim.step_rules import can_be_fused

BETAS = (0.9, 0.999)
EPS = 1e-8


def initialise_moments(state: dict[str, Any], p: Parameter) -> None:
    """Give a parameter AdamW's state if it has none."""
    if "exp_avg" not in state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def adamw_step(
    params: Sequence[Parameter],
    states: MutableMapping[Tensor, Any],
    group: dict[str, Any],
) -> None:
    """Update parameters by torch's AdamW with `fallback_lr`, scaled as the group's `lr` was.

    Args:
        params: Parameters with gradients.
        states: The optimizer's state.
        group: Their parameter group.
    """
    if not params:
        return
    for p in params:
        initialise_moments(states[p], p)
    own = list(params)
    grads = [p.grad for p in own if p.grad is not None]
    moments = [[states[p][key] for p in own] for key in ("exp_avg", "exp_avg_sq")]
    fused = group["foreach"] is None and can_be_fused(own, grads, *moments)
    ratio = group["lr"] / group["base_lr"] if group["base_lr"] else float(group["lr"] > 0)
    adamw(
        own,
        grads,
        *moments,
        [],
        [states[p]["step"] for p in own],
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=group["fallback_lr"] * ratio,
        weight_decay=group["weight_decay"],
        eps=EPS,
        foreach=group["foreach"],
        fused=True if fused else None,
        maximize=group["maximize"],
    )
