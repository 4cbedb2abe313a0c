"""Eigenbases that follow a slowly changing factor; decompositions anew are in `kronecker`."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.linalg import kronecker
from kfacopt.linalg.eigenspaces import Levels, averaged, levels_of
from kfacopt.linalg.split_factors import Basis, Factor, SplitBasis, SplitFactor


def off_diagonal_share(matrix: Tensor, levels: Tensor | None = None) -> Tensor:
    """Return ‖M − diag M‖_F / ‖M‖_F `[B]` of M `[B, d, d]`; 0 for a zero matrix.

    With levels the diagonal's mean over each eigenspace stands for the diagonal.
    """
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    scaled = matrix / torch.where(largest > 0, largest, 1.0)  # squares under- or overflow
    # The difference of two sums of squares would be off by √eps.
    diagonal = scaled.diagonal(dim1=-2, dim2=-1)
    if levels is not None:
        diagonal = averaged(diagonal.unsqueeze(-2), ((), (levels,))).squeeze(-2)
    rest = scaled - torch.diag_embed(diagonal)
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


def refreshed_basis(
    factor: Factor,
    basis: Basis | None,
    levels: Levels,
    tolerance: float,
    stored: torch.dtype | None = None,
) -> tuple[Basis | None, Levels]:
    """Return an orthonormal basis that nearly diagonalises a factor, and its levels.

    An earlier basis is left alone while the off-diagonal part of QᵀAQ is at most `tolerance` of its
    norm; else, and without an earlier one, the eigenvectors. (LAPACK's `eigh` takes less time than
    two orthogonal iterations, and unlike these does not depend on how the earlier basis lay in a
    null space.) Of an eigenspace that was not told apart before, A must still be a multiple of I.

    Args:
        factor: A, `[B, d, d]`, symmetric positive semi-definite; or its diagonal `[B, d]`; or
            split, of which the two sums of blocks are followed.
        basis: Q, `[B, d, d]`, or `None`.
        levels: Those of Q, or nothing.
        tolerance: The relative Frobenius norm of the off-diagonal part that is left alone.
        stored: The dtype that A was kept in.

    Returns:
        Q `[B, d, d]`, `None`, the identity, for a diagonal factor; and its levels.

    Raises:
        DecompositionError: If the factor is not finite, or the decomposition fails.

    References:
        - Eschenhagen et al. (2025), https://arxiv.org/abs/2506.03595, section 4.1 (the criterion).
    """
    if isinstance(factor, SplitFactor):
        old = basis if isinstance(basis, SplitBasis) and len(levels) == 2 else None
        parts = (None, None) if old is None else (old.channels, old.positions)
        found = [
            _refreshed(side, part, own, tolerance, stored)
            for side, part, own in zip(
                (factor.channels, factor.position_moment()),
                parts,
                levels or (None,) * 2,
                strict=True,
            )
        ]
        (channels, of_channels), (positions, of_positions) = found
        if old is None or channels is not parts[0] or positions is not parts[1]:
            old = SplitBasis(channels, positions, factor.joint)
        return old, (of_channels, of_positions)
    assert isinstance(factor, Tensor)
    assert not isinstance(basis, SplitBasis)
    if kronecker.is_diagonal(factor):
        return None, ()
    Q, own = _refreshed(factor, basis, levels[0] if levels else None, tolerance, stored)
    return Q, (own,)


def _refreshed(
    factor: Tensor,
    basis: Tensor | None,
    levels: Tensor | None,
    tolerance: float,
    stored: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return a basis `[B, d, d]` and its levels `[B, d]`, from earlier ones or anew."""
    if basis is not None and levels is not None and bool(factor.isfinite().all()):
        wide = basis.to(factor.dtype)
        projected = wide.mT @ ((factor + factor.mT) / 2) @ wide
        if bool((off_diagonal_share(projected, levels) <= tolerance).all()):
            return basis, levels
    values, found = kronecker.eigendecomposition(factor)
    assert isinstance(found, Tensor)
    return found, levels_of(values, stored or factor.dtype)


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
