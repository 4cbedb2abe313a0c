"""Kronecker products G ⊗ A, their eigenbases and damped inverses; no parameters, no layers.

A factor is dense, `[B, d, d]`, diagonal, `[B, d]`, or of low rank plus a diagonal (`low_rank`); A
may also be split (`split_factors`). B counts independent blocks (the groups of a convolution, 1
otherwise). All matrices are symmetric and vec is row-major, so that (G ⊗ A) vec(X) = vec(G X A) for
X of shape `[..., B, d_out, d_in]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kfacopt.linalg import decompositions
from kfacopt.linalg.decompositions import DecompositionError as DecompositionError
from kfacopt.linalg.low_rank import LowRankFactor
from kfacopt.linalg.precision import null_directions
from kfacopt.linalg.split_factors import Basis, Factor, Side, SplitFactor, SplitInverse
from kfacopt.linalg.split_products import multiplied

DampingMethod = Literal["factored", "exact"]
DAMPING_METHODS: tuple[DampingMethod, ...] = ("factored", "exact")


def is_diagonal(factor: Factor) -> bool:
    """Tell whether a factor is stored as its diagonal `[B, d]`."""
    return factor.ndim == 2


def diagonal_of(factor: Tensor) -> Tensor:
    """Return the diagonal `[B, d]` of a factor in either form."""
    return factor if is_diagonal(factor) else factor.diagonal(dim1=-2, dim2=-1)


def trace(factor: Factor) -> Tensor:
    """Return the traces `[B]` of a factor."""
    return diagonal_of(factor).sum(-1) if isinstance(factor, Tensor) else factor.trace()


def dense(factor: Factor) -> Tensor:
    """Return a factor as a tensor: itself, or what another form stands for."""
    return factor if isinstance(factor, Tensor) else factor.dense()


def multiply_left(factor: Side | None, X: Tensor) -> Tensor:
    """Return `factor @ X` for X `[..., B, d, n]`; `None` is the identity."""
    if factor is None:
        return X
    if not isinstance(factor, Tensor):
        return factor.left(X)
    return factor.unsqueeze(-1) * X if is_diagonal(factor) else product(factor, X)


def multiply_right(X: Tensor, factor: Factor | Basis | None) -> Tensor:
    """Return `X @ factor` for X `[..., B, n, d]`; `None` is the identity."""
    if factor is None:
        return X
    if not isinstance(factor, Tensor):
        return X @ factor.dense() if isinstance(factor, SplitFactor) else factor.right(X)
    return X * factor.unsqueeze(-2) if is_diagonal(factor) else product(X, factor)


# A product on the CPU whose columns are not a multiple of the vector length is cut in two from here
# on: MKL takes up to 1.6 times as long for 1,001 columns as for 1,000.
_VECTOR, _WIDE = 8, 256


def cut_columns(X: Tensor) -> Sequence[Tensor]:
    """Return the columns of X in the pieces that are multiplied fastest."""
    n = X.shape[-1]
    rest = n % _VECTOR
    if rest == 0 or n < _WIDE or X.device.type != "cpu":
        return [X]
    return [X[..., :-rest], X[..., -rest:]]


def product(X: Tensor, Y: Tensor) -> Tensor:
    """Return X Y of matrices `[..., m, k]` and `[..., k, n]`, fast for odd n, too."""
    multiply = torch.bmm if X.ndim == Y.ndim == 3 and X.shape[0] == Y.shape[0] else torch.matmul
    parts = [multiply(X, piece) for piece in cut_columns(Y)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


# From so many entries on, parts of a product are written side by side on the CPU: the copy that is
# spared takes longer than what writing with a stride costs (0.95 to 0.99 times the time of all a
# step's products for the 400,000 to 800,000 entries of sides of 500 to 1,000; 1.02 to 1.06 times
# for 65,000).
_LARGE = 2**18


def multiplied_left(factor: Side, columns: Sequence[Tensor]) -> Tensor:
    """Return `factor @ X` for X `[..., B, d, n]` that is given in columns."""
    if not isinstance(factor, Tensor):
        return factor.left(columns[0] if len(columns) == 1 else torch.cat(list(columns), dim=-1))
    lead, widths = columns[0].shape[:-1], [x.shape[-1] for x in columns]
    large = lead.numel() * sum(widths) >= _LARGE and columns[0].device.type == "cpu"
    alike = len(lead) == 2 and lead[:1] == factor.shape[:1] and not torch.is_grad_enabled()
    if is_diagonal(factor) or not (large and alike):
        parts = [multiply_left(factor, x) for x in columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    stride = -(-sum(widths) // (2 * _VECTOR)) * 2 * _VECTOR
    result = columns[0].new_empty(*lead, stride)[..., : sum(widths)]
    pieces = [piece for x in columns for piece in cut_columns(x)]
    parts = result.split([x.shape[-1] for x in pieces], dim=-1)
    for x, part in zip(pieces, parts, strict=True):
        torch.bmm(factor, x, out=part)
    return result


def multiplied_right(X: Tensor, factor: Factor, widths: Sequence[int]) -> list[Tensor]:
    """Return `X @ factor` for X `[..., B, n, d]` in columns of some widths."""
    if not isinstance(factor, Tensor):
        return list(multiply_right(X, factor).split(widths, dim=-1))
    rows = X.split(widths, dim=-1) if is_diagonal(factor) else [X] * len(widths)
    factors = factor.split(widths, dim=-1)
    return [multiply_right(x, a) for x, a in zip(rows, factors, strict=True)]


def eigendecomposition(factor: Factor) -> tuple[Tensor, Basis | None]:
    """Return λ `[B, d]` and Q of a factor; see `decompositions`, and `split_factors`."""
    if isinstance(factor, SplitFactor | SplitInverse):
        return factor.eigendecomposition()
    return decompositions.eigendecomposition(dense(factor))


def damped_inverse(factor: Any, damping: Tensor) -> Any:
    """Return (factor + damping · I)⁻¹, in the form that the factor has; see there."""
    if isinstance(factor, SplitFactor | LowRankFactor):
        return factor.damped_inverse(damping)
    assert isinstance(factor, Tensor)
    return decompositions.damped_inverse(factor, damping)


# Matrices that are inverted in one call have together at most so many entries.
_BATCH_ENTRIES = 2**24


def inverses_by_size(factors: Sequence[Tensor], dampings: Sequence[Tensor]) -> list[Tensor]:
    """Return (factor + damping · I)⁻¹ of many factors, those of one size in one call.

    Nothing waits for the device; an inverse that could not be computed has entries that are not
    finite, and `damped_inverse` may still find it.

    Args:
        factors: Dense factors `[B, d, d]`, symmetric positive semi-definite, with any B and d.
        dampings: `[B]` for each, in units of the factor.

    Returns:
        The inverses, in the order of the factors.
    """
    by_size: dict[Any, list[int]] = {}
    for i, factor in enumerate(factors):
        by_size.setdefault((factor.shape[-1], factor.dtype, factor.device), []).append(i)
    found: dict[int, Tensor] = {}
    for (side, *_), members in by_size.items():
        count = max(1, _BATCH_ENTRIES // side**2)
        for start in range(0, len(members), count):
            batch = members[start : start + count]
            shifted = torch.cat([factors[i] for i in batch])
            damping = torch.cat([dampings[i] for i in batch])
            shifted.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
            root, info = torch.linalg.cholesky_ex(shifted)
            inverse = decompositions.inverse_from_root(root)
            inverse[info != 0] = torch.nan
            pieces = inverse.split([len(factors[i]) for i in batch])
            found.update((i, x.clone()) for i, x in zip(batch, pieces, strict=True))
    return [found[i] for i in range(len(factors))]


def factored_damping(
    grad_output_factor: Side, input_factor: Factor, damping: float
) -> tuple[Tensor, Tensor]:
    """Split the damping δ between G and A: √δ/π for G and π√δ for A.

    π = sqrt((tr A / d_in) / (tr G / d_out)) minimises the trace norm of what
    (G + √δ/π I) ⊗ (A + π√δ I) adds to G ⊗ A + δI. Where a trace is 0, π is 1. Where a factor is a
    positive scalar a, all damping goes to the other side, δ/a, and nothing is approximated.

    Args:
        grad_output_factor: G, in any form.
        input_factor: A, likewise.
        damping: δ, in units of G ⊗ A.

    Returns:
        The dampings of G and of A, `[B]` each.

    References:
        Martens & Grosse (2015), https://arxiv.org/abs/1503.05671, section 6.3, Eq. 31.
    """
    sides = (grad_output_factor, input_factor)
    mean_g, mean_a = (trace(side) / side.shape[-1] for side in sides)
    both_positive = (mean_g > 0) & (mean_a > 0)
    log_g, log_a = (torch.where(both_positive, mean, 1.0).log() for mean in (mean_g, mean_a))
    pi = (0.5 * (log_a - log_g)).exp()
    root = damping**0.5
    damping_g, damping_a = root / pi, root * pi
    if input_factor.shape[-1] == 1:
        scalar = mean_a > 0
        damping_g = torch.where(scalar, damping / mean_a, damping_g)
        damping_a = torch.where(scalar, 0.0, damping_a)
    elif grad_output_factor.shape[-1] == 1:
        scalar = mean_g > 0
        damping_a = torch.where(scalar, damping / mean_g, damping_a)
        damping_g = torch.where(scalar, 0.0, damping_g)
    return damping_g, damping_a


@dataclass
class KroneckerProduct:
    """G ⊗ A from its factors.

    Attributes:
        grad_output_factor: G, `[B, d_out, d_out]` or its diagonal `[B, d_out]`, or of low rank.
        input_factor: A, `[B, d_in, d_in]` or its diagonal `[B, d_in]`, or of low rank, or split.
    """

    grad_output_factor: Side
    input_factor: Factor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the wider factor."""
        return torch.promote_types(self.grad_output_factor.dtype, self.input_factor.dtype)

    def widened(self) -> KroneckerProduct:
        """Return the same product in at least float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if dtype == self.grad_output_factor.dtype == self.input_factor.dtype:
            return self
        return KroneckerProduct(self.grad_output_factor.to(dtype), self.input_factor.to(dtype))

    def apply(self, X: Tensor) -> Tensor:
        """Return G X A for X `[..., B, d_out, d_in]`."""
        return multiply_right(multiply_left(self.grad_output_factor, X), self.input_factor)

    def apply_columns(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """Return G X A in the columns `[..., B, d_out, width]` that X is given in, as [W | b]."""
        G, A, widths = self.grad_output_factor, self.input_factor, [x.shape[-1] for x in columns]
        if isinstance(A, SplitInverse) and columns[0].ndim == G.ndim == 3:
            return multiplied(G, A, columns)
        return multiplied_right(multiplied_left(G, columns), A, widths)

    def trace(self) -> Tensor:
        """Return tr(G ⊗ A) = Σ_B tr(G) tr(A)."""
        return (trace(self.grad_output_factor) * trace(self.input_factor)).sum()

    def frobenius_norm(self) -> Tensor:
        """Return ‖G ⊗ A‖_F = sqrt(Σ_B ‖G‖² ‖A‖²)."""
        sides = (dense(self.grad_output_factor), dense(self.input_factor))
        squares = [side.flatten(1).square().sum(1) for side in sides]
        return (squares[0] * squares[1]).sum().sqrt()

    def logdet(self) -> Tensor:
        """Return log det(G ⊗ A) = Σ_B d_in log det G + d_out log det A; −∞ if singular."""
        whole = KroneckerProduct(dense(self.grad_output_factor), dense(self.input_factor))
        logdet = whole.eigendecomposition().logdet()
        return torch.full_like(logdet, -torch.inf) if self._is_singular() else logdet

    def _is_singular(self) -> bool:
        sides = (dense(self.grad_output_factor), dense(self.input_factor))
        spectra = map(decompositions.eigendecomposition, sides)
        return any(bool(null_directions(*spectrum).any()) for spectrum in spectra)

    def eigendecomposition(self) -> KroneckerEigendecomposition:
        """Return G ⊗ A in the Kronecker product of its factors' eigenbases.

        Of a split A, that of its diagonal in the basis of `SplitFactor.eigendecomposition`.
        """
        values_g, basis_g = decompositions.eigendecomposition(dense(self.grad_output_factor))
        values_a, basis_a = eigendecomposition(self.input_factor)
        values = values_g.unsqueeze(-1) * values_a.unsqueeze(-2)
        return KroneckerEigendecomposition(basis_g, basis_a, values)

    def inverse(self, damping: float, method: DampingMethod) -> KroneckerMatrix:
        """Return the damped inverse.

        Args:
            damping: δ, in units of G ⊗ A.
            method: `"exact"` for (G ⊗ A + δI)⁻¹, in the eigenbases; `"factored"` for
                (G + √δ/π I)⁻¹ ⊗ (A + π√δ I)⁻¹ (see `factored_damping`), by Cholesky.

        Raises:
            DecompositionError: If a factor cannot be inverted or decomposed.
        """
        if damping == 0 and self._is_singular():
            raise DecompositionError("the matrix is singular and the damping is 0")
        if method == "exact":
            return self.eigendecomposition().inverse(damping)
        sides = (self.grad_output_factor, self.input_factor)
        damping_g, damping_a = factored_damping(*sides, damping)
        inverse_g = damped_inverse(self.grad_output_factor, damping_g)
        return KroneckerProduct(inverse_g, damped_inverse(self.input_factor, damping_a))


@dataclass
class KroneckerEigendecomposition:
    """(Q_G ⊗ Q_A) diag(λ) (Q_G ⊗ Q_A)ᵀ.

    Attributes:
        grad_output_basis: Q_G, `[B, d_out, d_out]`; `None` is the identity.
        input_basis: Q_A, `[B, d_in, d_in]`; `None` is the identity; or a Kronecker product itself.
        eigenvalues: λ, `[B, d_out, d_in]`.
    """

    grad_output_basis: Tensor | None
    input_basis: Basis | None
    eigenvalues: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the eigenvalues; bases may be kept in less."""
        return self.eigenvalues.dtype

    def widened(self) -> KroneckerEigendecomposition:
        """Return the same matrix with bases and eigenvalues in one dtype, at least float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        basis_g = None if self.grad_output_basis is None else self.grad_output_basis.to(dtype)
        basis_a = None if self.input_basis is None else self.input_basis.to(dtype)
        return KroneckerEigendecomposition(basis_g, basis_a, self.eigenvalues.to(dtype))

    def apply(self, X: Tensor) -> Tensor:
        """Return Q_G (λ ⊙ (Q_Gᵀ X Q_A)) Q_Aᵀ for X `[..., B, d_out, d_in]`."""
        basis_g, basis_a = self.grad_output_basis, self.input_basis
        transposed_g = None if basis_g is None else basis_g.mT
        transposed_a = None if basis_a is None else basis_a.mT
        rotated = multiply_right(multiply_left(transposed_g, X), basis_a)
        return multiply_right(multiply_left(basis_g, rotated * self.eigenvalues), transposed_a)

    def inverse(self, damping: float) -> KroneckerEigendecomposition:
        """Return the damped inverse, with the eigenvalues 1 / (λ + δ).

        Args:
            damping: δ, in units of λ.

        Raises:
            DecompositionError: If an eigenvalue and the damping are 0.
        """
        shifted = self.eigenvalues + damping
        if not bool((shifted > 0).all()):
            raise DecompositionError("the matrix is singular and the damping is 0")
        bases = (self.grad_output_basis, self.input_basis)
        return KroneckerEigendecomposition(*bases, shifted.reciprocal())

    def trace(self) -> Tensor:
        """Return Σ λ."""
        return self.eigenvalues.sum()

    def frobenius_norm(self) -> Tensor:
        """Return sqrt(Σ λ²)."""
        return self.eigenvalues.square().sum().sqrt()

    def logdet(self) -> Tensor:
        """Return Σ log λ."""
        return self.eigenvalues.log().sum()


KroneckerMatrix = KroneckerProduct | KroneckerEigendecomposition
