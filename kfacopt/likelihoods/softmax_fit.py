"""Tell whether H = ∂²L/∂z² is that of cross entropy; other structure is found in `structure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacopt.likelihoods.probing import Probing


@dataclass(frozen=True, eq=False)
class SoftmaxFit:
    """H_r = w_r (diag(p_r) − p_r p_rᵀ) for each row r of z along an axis, p = softmax(z).

    Attributes:
        axis: The axis.
        weights: |w|, of the shape of z without the axis.
        misfit: Σ (H u − what the fit says)², over all u.
    """

    axis: int
    weights: Tensor
    misfit: Tensor


def softmax_fit(
    probing: Probing, k: int, vectors: Sequence[Tensor], products: Sequence[Tensor]
) -> SoftmaxFit | None:
    """Return the fit of H along the last axis, or along axis 1, if there is one.

    Rows with w < 0 are those of a policy gradient, whose Fisher has |w|, if the gradient w (p − y)
    has a label y; else they are those of another loss, whose positive part is sought.

    Args:
        probing: Knows z and its gradient.
        k: Which of the tensors z is meant.
        vectors: u `[*z.shape]`, one or several.
        products: H u for each.
    """
    z = probing.values[k]
    if z is None or z.ndim == 0:
        return None
    for axis in dict.fromkeys((z.ndim - 1, min(1, z.ndim - 1))):
        rows = [_as_rows(x, axis) for x in (z, probing.gradients[k], *vectors, *products)]
        u, Hu = rows[2 : 2 + len(vectors)], rows[2 + len(vectors) :]
        found = _fit(probing, rows[0].softmax(-1), rows[1], torch.stack(u), torch.stack(Hu))
        if found is not None:
            weights, misfit = found
            shape = z.movedim(axis, -1).shape[:-1]
            return SoftmaxFit(axis, weights.reshape(shape), misfit)
    return None


def _fit(
    probing: Probing, p: Tensor, gradient: Tensor, u: Tensor, Hu: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Fit rows p `[R, C]` to products `[V, R, C]`; return |w| `[R]` and the misfit."""
    models = p * (u - (p * u).sum(-1, keepdim=True))
    round_off = probing.round_off_share * p.amax(-1)
    seen = models.abs().amax((0, -1)) > round_off  # else p is a label, but for round-off
    if not bool(seen.any()):
        return None
    square, inner = (models * models).sum((0, -1)), (models * Hu).sum((0, -1))
    w = inner / square.clamp(min=torch.finfo(p.dtype).tiny)
    largest = w[seen].abs().amax()
    w = w.nan_to_num(0.0).clamp(-largest, largest)
    floor = round_off * torch.where(seen, w.abs(), largest) + probing.round_off(Hu)
    fitted = w.unsqueeze(-1) * models
    if not probing.close(fitted, Hu, floor.unsqueeze(-1)):
        return None
    negative = seen & (w < 0)
    if bool(negative.any()):
        y = p[negative] - gradient[negative] / w[negative].unsqueeze(-1)
        error = round_off / models.abs().amax((0, -1)).clamp(min=torch.finfo(p.dtype).tiny)
        allowed = 4 * error[negative].unsqueeze(-1) + probing.tolerance
        labels = y == y.amax(-1, keepdim=True)
        if not bool(((y - labels.to(y)).abs() <= allowed).all()):
            return None
    return w.abs(), (fitted - Hu).square().sum()


def _as_rows(x: Tensor, axis: int) -> Tensor:
    """Bring an axis to the end, and all others to one."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])
