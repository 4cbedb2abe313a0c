"""Dense and diagonal factors decomposed and inverted; products of them are in `kronecker`."""

from __future__ import annotations

import torch
from torch import Tensor


class DecompositionError(RuntimeError):
    """A factor could not be inverted or decomposed, not even in float64."""


def eigendecomposition(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Decompose a positive semi-definite factor, factor = Q diag(λ) Qᵀ.

    Args:
        factor: `[B, d, d]` or, diagonal, `[B, d]`.

    Returns:
        λ `[B, d]`, clamped at 0, and Q `[B, d, d]`, or `None` for a diagonal factor (Q = I).

    Raises:
        DecompositionError: If the factor is not finite or the decomposition fails in float64 too.
    """
    if factor.ndim == 2:
        return factor.clamp(min=0), None
    if not bool(factor.isfinite().all()):  # eigh returns NaN for an inf without raising
        raise DecompositionError("the factor has NaN or infinite entries")
    symmetric = (factor + factor.mT) / 2
    for dtype in (factor.dtype, torch.float64):
        try:
            values, basis = torch.linalg.eigh(symmetric.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if bool(values.isfinite().all()):
            return values.clamp(min=0).to(factor.dtype), basis.to(factor.dtype)
    raise DecompositionError("eigh failed, also in float64")


def damped_inverse(factor: Tensor, damping: Tensor) -> Tensor:
    """Return (factor + damping · I)⁻¹ by a Cholesky decomposition.

    Args:
        factor: `[B, d, d]` or, diagonal, `[B, d]`; symmetric positive semi-definite, of which the
            lower triangle is read.
        damping: `[B]`, in units of the factor.

    Returns:
        The inverse, in the form of `factor`.

    Raises:
        DecompositionError: If the damped factor is not finite or not positive definite.
    """
    if factor.ndim == 2:
        shifted = factor.clamp(min=0) + damping.unsqueeze(-1)
        if not bool((shifted > 0).all()) or not bool(shifted.isfinite().all()):
            raise DecompositionError("the damped diagonal factor is not positive and finite")
        return shifted.reciprocal()
    for dtype in (factor.dtype, torch.float64):
        shifted = factor.to(dtype, copy=True)
        shifted.diagonal(dim1=-2, dim2=-1).add_(damping.to(dtype).unsqueeze(-1))
        root, info = torch.linalg.cholesky_ex(shifted)
        if not bool(info.any()):
            inverse = inverse_from_root(root).to(factor.dtype)
            # Its entries are at most as large as those of its diagonal.
            if bool(inverse.diagonal(dim1=-2, dim2=-1).isfinite().all()):
                return inverse
    raise DecompositionError(
        "the damped factor is not positive definite, also in float64; raise the damping"
    )


def inverse_from_root(root: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ of lower triangular L `[B, d, d]`.

    On a GPU L⁻¹ and a product, which takes less than half the time of `cholesky_inverse` there.
    """
    if root.device.type == "cpu":
        return torch.cholesky_inverse(root)
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    inverse_root = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)
    product: Tensor = inverse_root.mT @ inverse_root
    return product
