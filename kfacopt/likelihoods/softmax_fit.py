"""Tell whether H = ∂²L/∂z² is that of cross entropy; other structure is found in `structure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacopt.likelihoods.probing import Probing


@dataclass(frozen=True, eq=False)
class SoftmaxFit:
    """H_r = w_r (diag(p_r) − p_r p_rᵀ) for each row r of z along an axis.

    Attributes:
        axis: The axis.
        logits: log p, but for a constant in each row, `[*z.shape]`.
        weights: |w|, of the shape of z without the axis.
        misfit: Σ (H u − what the fit says)², over all u.
    """

    axis: int
    logits: Tensor
    weights: Tensor
    misfit: Tensor


# Logits [R, C], w [R] and the misfit.
_Rows = tuple[Tensor, Tensor, Tensor]


def softmax_fit(
    probing: Probing, k: int, vectors: Sequence[Tensor], products: Sequence[Tensor]
) -> SoftmaxFit | None:
    """Return the fit of H along the last axis, or along axis 1, if there is one.

    p = softmax(z), or else any p, as of logits that were masked, scaled or shifted: it follows from
    two products. Rows with w < 0 are those of a policy gradient, whose Fisher has |w|, if the
    gradient w (p − y) has a label y; else they are those of another loss, whose positive part is
    sought.

    Args:
        probing: Knows z and its gradient.
        k: Which of the tensors z is meant; no other one sees it.
        vectors: Two vectors u `[*z.shape]`.
        products: H u for each.
    """
    z = probing.values[k]
    if z is None or z.ndim == 0:
        return None
    axes = tuple(dict.fromkeys((z.ndim - 1, min(1, z.ndim - 1))))
    for fit in (_of_softmax, _of_any_probabilities):
        for axis in axes:
            rows = [_as_rows(x, axis) for x in (z, probing.gradients[k], *vectors, *products)]
            found = fit(probing, rows[0], torch.stack(rows[2:4]), torch.stack(rows[4:6]))
            if found is None or not _has_labels(probing, *found[:2], rows[1]):
                continue
            shape = z.movedim(axis, -1).shape
            logits = found[0].reshape(shape).movedim(-1, axis)
            own = SoftmaxFit(axis, logits, found[1].abs().reshape(shape[:-1]), found[2])
            if fit is _of_softmax or _holds_again(probing, k, own, found[1]):
                return own
    return None


def _of_softmax(probing: Probing, z: Tensor, u: Tensor, Hu: Tensor) -> _Rows | None:
    """Fit w to products `[V, R, C]`."""
    p = z.softmax(-1)
    models = _multiply(p, u)
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
    return z, w, (fitted - Hu).square().sum()


def _of_any_probabilities(probing: Probing, z: Tensor, u: Tensor, Hu: Tensor) -> _Rows | None:
    """Fit w and p to products `[2, R, C]`.

    H u = d ⊙ (u − s) with d = w p and s = pᵀ u, and likewise for v; so H u ⊙ v − H v ⊙ u =
    t H u − s H v with t = pᵀ v, which gives s and t, and these d.
    """
    if u.shape[-1] < 3:  # two entries have a softmax whatever the loss is
        return None
    small = Hu.abs().amax((0, -1)) <= probing.round_off(Hu)
    A = torch.stack([-Hu[1], Hu[0]], -1).double()  # for s and t
    A = A / A.abs().amax((-1, -2), keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    right = (u[1] * A[..., 1] + u[0] * A[..., 0]).unsqueeze(-1)
    # Rows of two likely classes have parallel products: any s and t that fit will do.
    both = torch.linalg.pinv(A.mT @ A, rtol=(16 * probing.eps) ** 2) @ (A.mT @ right)
    centered = u - both.movedim(1, 0).to(u)
    d = (Hu * centered).sum(0) / centered.square().sum(0).clamp(min=torch.finfo(z.dtype).tiny)
    w = d.sum(-1).masked_fill(small, 0.0)
    p = torch.where((w == 0).unsqueeze(-1), 1.0, d / w.unsqueeze(-1)).clamp(min=0)
    p = p / p.sum(-1, keepdim=True)
    fitted = w.unsqueeze(-1) * _multiply(p, u)
    if not probing.close(fitted, Hu, probing.round_off(Hu)):
        return None
    return p.clamp(min=torch.finfo(z.dtype).tiny).log(), w, (fitted - Hu).square().sum()


def _holds_again(probing: Probing, k: int, fit: SoftmaxFit, w: Tensor) -> bool:
    """Tell whether a third product, to which nothing was fitted, is as the fit says."""
    u = probing.probe((k,))[k]
    (Hu,) = probing.product_of((k,), [u])
    rows = [_as_rows(x, fit.axis) for x in (fit.logits, u, Hu)]
    fitted = w.unsqueeze(-1) * _multiply(rows[0].softmax(-1), rows[1])
    return probing.close(fitted, rows[2], probing.round_off(Hu))


def _has_labels(probing: Probing, logits: Tensor, w: Tensor, gradient: Tensor) -> bool:
    """Tell whether rows with w < 0 have gradients w (p − y) with labels y."""
    p = logits.softmax(-1)
    size = (p * (1 - p)).amax(-1)
    round_off = probing.round_off_share * p.amax(-1)
    negative = (w < 0) & (size > round_off)
    if not bool(negative.any()):
        return True
    y = p[negative] - gradient[negative] / w[negative].unsqueeze(-1)
    labels = y == y.amax(-1, keepdim=True)
    allowed = 4 * (round_off / size)[negative].unsqueeze(-1) + probing.tolerance
    return bool(((y - labels.to(y)).abs() <= allowed).all())


def _multiply(p: Tensor, u: Tensor) -> Tensor:
    """Return (diag(p) − p pᵀ) u."""
    return p * (u - (p * u).sum(-1, keepdim=True))


def _as_rows(x: Tensor, axis: int) -> Tensor:
    """Bring an axis to the end, and all others to one."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])
