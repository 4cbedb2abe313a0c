"""What becomes of a preconditioned gradient: clip, momentum, decay. Free functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor


def are_finite(grads: Sequence[Tensor]) -> bool:
    """Tell whether gradients are finite; their device is asked once where they are.

    Args:
        grads: The gradients, of any shapes, dtypes and devices.
    """
    if not grads:
        return True
    sums = [g.sum() for g in grads]
    dtype, device = reduce(torch.promote_types, {x.dtype for x in sums}), sums[0].device
    # Finite sums have finite summands; others may have overflowed.
    if bool(torch.stack([x.to(device, dtype) for x in sums]).isfinite().all()):
        return True
    return all(bool(g.isfinite().all()) for g in grads)


def kl_clip_scale(
    grads: Sequence[Tensor], directions: Sequence[Tensor], lrs: Sequence[float], kl_clip: float
) -> Tensor:
    """Return the factor min(1, sqrt(κ / Σ_i lr_i² ⟨Δ_i, g_i⟩)) that bounds a step's KL divergence.

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
    products = [
        lr**2 * torch.dot(g.flatten(), d.flatten())
        for g, d, lr in zip(grads, directions, lrs, strict=True)
    ]
    device, dtype = products[0].device, torch.promote_types(products[0].dtype, torch.float32)
    total = torch.stack([p.to(device, dtype) for p in products]).sum()
    # A non-positive sum (round-off, or a preconditioner of an earlier step) does not clip.
    return torch.where(total > kl_clip, (kl_clip / total).sqrt(), torch.ones_like(total))


def apply_step(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    foreach: bool = True,
) -> None:
    """Update parameters in place: m ← μ m + lr Δ, θ ← (1 − lr λ) θ − m.

    Nesterov's step goes on by momentum from there: θ ← (1 − lr λ) θ − (lr Δ + μ m), with the new m.

    The learning rate is inside m: with θ ← θ − lr m a rate that rises, as in a warm-up, would
    multiply steps that the KL clip bounded for the rate of their own time.

    The weight decay λ is decoupled from the preconditioner (Loshchilov & Hutter, 2019; Zhang et
    al., 2019, https://arxiv.org/abs/1810.12281, on why that helps K-FAC).

    Args:
        params: θ.
        directions: Δ, of the same shapes.
        momentum_buffers: m, changed in place; unused if `momentum` is 0.
        lr: The learning rate.
        momentum: μ.
        nesterov: Whether to take Nesterov's step, Sutskever et al. (2013), section 2.1, in the form
            of `torch.optim.SGD`.
        weight_decay: λ.
        foreach: Update all parameters in one call for each operation; else one after the other.
    """
    if not foreach:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        one = partial(apply_step, nesterov=nesterov, **settings)
        for i, (p, direction) in enumerate(zip(params, directions, strict=True)):
            one([p], [direction], momentum_buffers[i : i + 1])
        return
    if weight_decay:
        torch._foreach_mul_(list(params), 1 - lr * weight_decay)
    steps = list(directions)
    if momentum:
        buffers = list(momentum_buffers)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, steps, alpha=lr)
        torch._foreach_add_(list(params), buffers, alpha=-momentum if nesterov else -1)
    if nesterov or not momentum:
        torch._foreach_add_(list(params), steps, alpha=-lr)
