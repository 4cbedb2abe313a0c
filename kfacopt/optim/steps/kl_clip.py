"""The KL clip: how far a step may move predictions. `clipped_step` takes the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def kl_clip_scale(
    grads: Sequence[Tensor], directions: Sequence[Tensor], lrs: Sequence[float], kl_clip: float
) -> Tensor:
    """Return the factor min(1, sqrt(κ / |Σ_i lr_i² ⟨Δ_i, g_i⟩|)) that bounds a step's divergence.

    With Δ = F⁻¹ g the sum is (lr Δ)ᵀ F (lr Δ), twice the KL divergence that a step of length lr
    moves the model's predictions by, to second order.

    Args:
        grads: g_i, the gradients.
        directions: Δ_i, the preconditioned gradients, of the same shapes.
        lrs: The learning rate of each.
        kl_clip: κ > 0.

    Returns:
        A scalar in (0, 1], on the device; nothing is synchronised.

    References:
        Ba, Grosse & Martens (2017), https://openreview.net/forum?id=SkkTMpjex, section 5.
    """
    device, dtype = grads[0].device, torch.promote_types(grads[0].dtype, torch.float32)
    by_lr: dict[float, list[Tensor]] = {}
    for g, d, lr in zip(grads, directions, lrs, strict=True):
        by_lr.setdefault(lr, []).append(torch.dot(g.flatten(), d.flatten()).to(device, dtype))
    total = reduce(torch.add, [lr**2 * torch.stack(dots).sum() for lr, dots in by_lr.items()])
    # A negative sum is round-off, which bounds the step as well, or the step has no gradient.
    size = total.abs()
    return torch.where(size > kl_clip, (kl_clip / size).sqrt(), torch.ones_like(total))
