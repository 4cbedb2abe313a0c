"""Torch's SGD on steps that are scaled already: momentum and decay, no clip and no curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.sgd import sgd

ByParameter = Mapping[Parameter, Tensor]

# What weight decay takes in a step, in units of lr λ. At the default lr of 0.2 that is 3e-3 λ, as
# of AdamW at a rate of 3e-3, so that λ means what it means there.
DECAY_PER_LR = 0.015


def decay_of(group: Mapping[str, Any]) -> float:
    """Return the share of its parameters that a group's weight decay takes in a step."""
    return float(DECAY_PER_LR * group["lr"] * group["weight_decay"])


def decay_in_place(params: Sequence[Tensor], decay: float, foreach: bool | None) -> None:
    """Take a share of parameters from them, θ ← (1 − d) θ, in place.

    The weight decay is decoupled from the preconditioner (Loshchilov & Hutter, 2019; Zhang et al.,
    2019, https://arxiv.org/abs/1810.12281, on why that helps K-FAC).

    Args:
        params: θ.
        decay: d.
        foreach: `False`: one parameter after the other.
    """
    if decay and foreach is not False:
        torch._foreach_mul_(list(params), 1 - decay)
    elif decay:
        for p in params:
            p.mul_(1 - decay)


def are_finite(grads: Sequence[Tensor]) -> bool:
    """Tell whether gradients are finite; their device is asked once where they are."""
    if not grads:
        return True
    sums = [g.sum() for g in grads]
    dtype, device = reduce(torch.promote_types, {x.dtype for x in sums}), sums[0].device
    # Finite sums have finite summands; others may have overflowed.
    if bool(torch.stack([x.to(device, dtype) for x in sums]).isfinite().all()):
        return True
    return all(bool(g.isfinite().all()) for g in grads)


def can_be_fused(*lists: Sequence[Tensor]) -> bool:
    """Tell whether torch's fused kernels on the CPU may update tensors.

    They go through memory, so that all of a parameter's tensors must lie in it alike. In bfloat16
    and float16 SGD's leaves the parameters as they are (torch 2.13).

    Args:
        lists: The parameters, and beside each of them its gradient and state.
    """
    return all(
        own[0].device.type == "cpu"
        and own[0].dtype in (torch.float32, torch.float64)
        and all(t.is_contiguous() and t.dtype == own[0].dtype for t in own)
        for own in zip(*lists, strict=True)
    )


def apply_step(
    params: Sequence[Tensor],
    steps: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    decay: float,
    foreach: bool | None = None,
) -> None:
    """Update parameters in place: m ← μ m + s, θ ← (1 − d) θ − (s + μ m), by torch's SGD.

    Without Nesterov's momentum θ ← (1 − d) θ − m. The learning rate is inside s and m: with
    θ ← θ − lr m a rate that rises, as in a warm-up, would multiply steps that the KL clip bounded
    for the rate of their own time.

    Args:
        params: θ.
        steps: s, of the same shapes; may be changed.
        momentum_buffers: m, changed in place; none if `momentum` is 0.
        momentum: μ.
        nesterov: Whether momentum is Nesterov's, as in Sutskever et al. (2013), section 2.1.
        decay: d, see `decay_of`.
        foreach: Update all parameters in one call for each operation; `False`: one after the other;
            `None`: in one call for all operations, where torch can.
    """
    decay_in_place(params, decay, foreach)
    buffers = [momentum_buffers] if momentum else []
    fused = foreach is None and can_be_fused(params, steps, *buffers)
    sgd(
        list(params),
        list(steps),
        [*momentum_buffers] or [None] * len(params),
        foreach=foreach is not False and not fused,
        fused=fused,
        weight_decay=0.0,
        momentum=momentum,
        lr=1.0,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
    )
