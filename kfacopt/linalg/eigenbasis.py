"""Eigenbases that follow a slowly changing factor; decompositions anew are in `kronecker`."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.linalg import kronecker
from kfacopt.linalg.split_factors import Basis, Factor, SplitBasis, SplitFactor

# Orthogonal iterations of one refresh at the most.
MAX_ITERATIONS = 2


def off_diagonal_share(matrix: Tensor) -> Tensor:
    """Return ‖M − diag M‖_F / ‖M‖_F `[B]` of M `[B, d, d]`; 0 for a zero matrix."""
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    scaled = matrix / torch.where(largest > 0, largest, 1.0)  # squares under- or overflow
    # The difference of two sums of squares would be off by √eps.
    rest = scaled - torch.diag_embed(scaled.diagonal(dim1=-2, dim2=-1))
    norm, total = map(torch.linalg.matrix_norm, (rest, scaled))
    share: Tensor = norm / torch.where(total > 0, total, 1.0)
    return share


def rayleigh_quotients(factor: Factor, basis: Basis | None) -> Tensor:
    """Return the diagonal of QᵀAQ `[B, d]`, clamped at 0; `None` is the identity.

    Args:
        factor: A, `[B, d, d]` or its diagonal `[B, d]`.
        basis: Q, `[B, d, d]`.
    """
    if isinstance(basis, SplitBasis):
        assert isinstance(factor, SplitFactor)
        return factor.quotients(basis)
    assert isinstance(factor, Tensor)
    if basis is None:
        return kronecker.diagonal_of(factor).clamp(min=0)
    wide = basis.to(factor.dtype)
    return ((factor @ wide) * wide).sum(-2).clamp(min=0)


def refreshed_basis(factor: Factor, basis: Basis | None, tolerance: float) -> Basis | None:
    """Return an orthonormal basis that nearly diagonalises a factor, from an earlier one.

    Without an earlier basis, the eigenvectors. Else orthogonal iteration, Q ← qr(A Q) with the
    columns in the order of falling Rayleigh quotients, until the off-diagonal part of QᵀAQ is at
    most `tolerance` of its norm; at once, and with no change of Q, if it already is; at the most
    `MAX_ITERATIONS` times.

    Args:
        factor: A, `[B, d, d]`, symmetric positive semi-definite; or its diagonal `[B, d]`; or
            split, of which the two sums of blocks are followed.
        basis: Q, `[B, d, d]`, or `None`.
        tolerance: The relative Frobenius norm of the off-diagonal part that is left alone.

    Returns:
        Q `[B, d, d]`; `None`, the identity, for a diagonal factor.

    Raises:
        DecompositionError: If the factor is not finite, or the decomposition fails.

    References:
        - Golub & Van Loan, Matrix Computations, 4th ed., section 8.2.4.
        - Eschenhagen et al. (2025), https://arxiv.org/abs/2506.03595, section 4.1 (the criterion).
    """
    if isinstance(factor, SplitFactor) and isinstance(basis, SplitBasis):
        channels = _refreshed(factor.channels, basis.channels, tolerance)
        positions = _refreshed(factor.position_moment(), basis.positions, tolerance)
        return SplitBasis(channels, positions, factor.joint)
    if kronecker.is_diagonal(factor) or basis is None:
        return kronecker.eigendecomposition(factor)[1]
    assert isinstance(factor, Tensor)
    assert isinstance(basis, Tensor)
    return _refreshed(factor, basis, tolerance)


def _refreshed(factor: Tensor, basis: Tensor, tolerance: float) -> Tensor:
    """Return a basis `[B, d, d]` from an earlier one."""
    if not bool(factor.isfinite().all()):
        raise kronecker.DecompositionError("the factor has NaN or infinite entries")
    dtype = torch.promote_types(factor.dtype, torch.float32)
    symmetric, Q = ((factor + factor.mT) / 2).to(dtype), basis.to(dtype)
    for iteration in range(MAX_ITERATIONS + 1):
        image = symmetric @ Q
        projected = Q.mT @ image
        if iteration == MAX_ITERATIONS or bool((off_diagonal_share(projected) <= tolerance).all()):
            break
        quotients = projected.diagonal(dim1=-2, dim2=-1)
        order = quotients.argsort(dim=-1, descending=True, stable=True)
        Q = torch.linalg.qr(image.take_along_dim(order.unsqueeze(-2), dim=-1))[0]
        if not bool(Q.isfinite().all()):
            raise kronecker.DecompositionError("the orthogonal iteration overflowed")
    return basis if iteration == 0 else Q


def rotated_eigenvalues(
    eigenvalues: Tensor,
    bases: tuple[Tensor | None, Basis | None],
    new_bases: tuple[Tensor | None, Basis | None],
) -> Tensor:
    """Return the diagonal of (Q_G ⊗ Q_A) diag(λ) (Q_G ⊗ Q_A)ᵀ in other bases Q'.

    With the rotations R = Q'ᵀ Q it is (R_G ⊙ R_G) λ (R_A ⊙ R_A)ᵀ: the best diagonal that the old
    one knows of in the Frobenius norm. A basis whose columns were only re-ordered permutes λ; its
    sum never changes.

    Args:
        eigenvalues: λ, `[B, d_out, d_in]`.
        bases: Q_G `[B, d_out, d_out]` and Q_A `[B, d_in, d_in]`; `None` is the identity.
        new_bases: Q'_G and Q'_A, likewise; the same object where a side did not change.
    """
    for axis, old, new in zip((-2, -1), bases, new_bases, strict=True):
        if old is None or new is None or old is new:
            continue
        if isinstance(old, SplitBasis) and isinstance(new, SplitBasis):
            eigenvalues = new.to(eigenvalues.dtype).squared_overlap(old).right(eigenvalues)
            continue
        assert isinstance(old, Tensor)
        assert isinstance(new, Tensor)
        squared = (new.mT.to(eigenvalues.dtype) @ old.to(eigenvalues.dtype)).square()
        eigenvalues = squared @ eigenvalues if axis == -2 else eigenvalues @ squared.mT
    return eigenvalues
