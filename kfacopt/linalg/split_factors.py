"""A of a convolution by channels and positions of its kernel, and its inverse; no layers.

A `[d, d]` with d = C K (+ 1 of a bias) is kept as the sum of a block for each position k of the
kernel and of a matrix of rank one,

    A ≈ ⊕_k λ_k Σ + u uᵀ,    u = (μ, 1),    Σ = Σ_k Cov_k,    λ_k = tr Cov_k / tr Σ,

with μ the mean of the inputs and Cov_k `[C, C]` the covariance of the channels at the position k:
what two positions have in common is their mean. The border of the bias is exact, and so are μ, the
trace, that of each position, and the sum of the channels' blocks over the positions. Columns are
in the order of a convolution's weight, channels first.

References:
    Grosse & Martens (2016), https://arxiv.org/abs/1602.01407, section 3 (spatially uncorrelated
    activations). Deviation: the mean may differ by position, and so may the variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfacopt.linalg import decompositions
from kfacopt.linalg.low_rank import LowRankFactor, LowRankInverse


def packed_size(channels: int, positions: int) -> int:
    """Return how many numbers the moments of a split A are."""
    return channels**2 + packed_rest(channels, positions)


def packed_rest(channels: int, positions: int) -> int:
    """Return how many of them are not of the channels' moment."""
    return positions + channels * positions + 1


def packed(channels: Tensor, energies: Tensor, sums: Tensor, constant: Tensor) -> Tensor:
    """Return the moments of a split A as one row for each group, `[B, ...]`.

    Args:
        channels: Σ x xᵀ `[B, C, C]` over what the kernel sees at all its positions.
        energies: Σ |x|² at each position, `[B, K]`.
        sums: Σ c a, with the constant c that a bias gets, `[B, C K]`.
        constant: Σ c², `[B]`.
    """
    return torch.cat([channels.flatten(1), energies, sums, constant.unsqueeze(1)], dim=1)


def packed_rows(rows: Tensor, positions: int, joint: bool) -> Tensor:
    """Return the same of rows `[B, M, C K (+ 1)]`, the last entry being c where there is a bias."""
    a, c = (rows[..., :-1], rows[..., -1:]) if joint else (rows, torch.ones_like(rows[..., :1]))
    by_position = a.unflatten(-1, (-1, positions))
    flat = by_position.mT.flatten(1, 2)
    energies = by_position.square().sum((1, 2))
    return packed(flat.mT @ flat, energies, (c * a).sum(1), c.square().sum((1, 2)))


@dataclass
class SplitFactor:
    """A from its moments.

    Attributes:
        channels: Σ_k E[x x ᵀ], `[B, C, C]`.
        energies: E[|x|²] at each position, `[B, K]`.
        means: E[c a], `[B, C K]`.
        constant: E[c²], `[B]`.
        joint: Whether there is a column of a bias.
    """

    channels: Tensor
    energies: Tensor
    means: Tensor
    constant: Tensor
    joint: bool

    ndim = 3  # as a dense factor

    @classmethod
    def of(cls, channels: Tensor, rest: Tensor, joint: bool) -> SplitFactor:
        """Make one of the moments that are kept: `[B, C, C]`, and all others as `packed`."""
        C = channels.shape[-1]
        K = (rest.shape[-1] - 1) // (C + 1)
        energies, means, constant = rest.split([K, C * K, 1], dim=-1)
        return cls(channels, energies, means, constant.squeeze(-1), joint)

    @classmethod
    def from_packed(cls, moments: Tensor, positions: int, joint: bool) -> SplitFactor:
        """Make one of `packed` moments."""
        return cls.of(*unpacked(moments, positions), joint)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the channels' moment."""
        return self.channels.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of A."""
        d = self.means.shape[-1] + int(self.joint)
        return len(self.means), d, d

    def to(self, dtype: torch.dtype) -> SplitFactor:
        """Return the same in a dtype."""
        values = (self.channels, self.energies, self.means, self.constant)
        channels, energies, means, constant = (x.to(dtype) for x in values)
        return SplitFactor(channels, energies, means, constant, self.joint)

    def trace(self) -> Tensor:
        """Return tr A `[B]`."""
        total: Tensor = self.energies.sum(-1)
        return total + self.constant if self.joint else total

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Σ `[B, C, C]`, λ `[B, K]` and u `[B, d]`."""
        root = self.constant.clamp(min=0).sqrt().unsqueeze(-1)
        u = self.means / torch.where(root > 0, root, 1.0)
        by_position = u.unflatten(-1, (-1, self.energies.shape[-1]))
        covariance = self.channels - by_position @ by_position.mT
        energies = (self.energies - by_position.square().sum(1)).clamp(min=0)
        total = energies.sum(-1, keepdim=True)
        shares = energies / torch.where(total > 0, total, 1.0)
        return covariance, shares, torch.cat([u, root], -1) if self.joint else u

    def dense(self) -> Tensor:
        """Return A itself."""
        covariance, shares, u = self.parts()
        blocks = torch.einsum("bcd,bk,kl->bckdl", covariance, shares, _eye(shares))
        A = u.unsqueeze(-1) * u.unsqueeze(-2)
        width = self.means.shape[-1]
        A[:, :width, :width] += blocks.flatten(3).flatten(1, 2)
        return A

    def damped_inverse(self, damping: Tensor) -> SplitInverse:
        """Return (A + damping · I)⁻¹, exactly, for a damping `[B]`.

        Raises:
            DecompositionError: As for dense factors.
        """
        covariance, shares, u = self.parts()
        B, K = shares.shape

        def inverses(covariance: Tensor) -> Tensor:
            blocks = shares[..., None, None] * covariance.unsqueeze(1)
            flat = decompositions.damped_inverse(blocks.flatten(0, 1), damping.repeat_interleave(K))
            return flat.reshape(B, K, *covariance.shape[1:])

        try:
            blocks = inverses(covariance)
        except decompositions.DecompositionError:  # the difference may be indefinite by round-off
            values, basis = decompositions.eigendecomposition(covariance)
            assert basis is not None
            blocks = inverses((basis * values.unsqueeze(-2)) @ basis.mT)
        return SplitInverse.updated(blocks, damping, u)

    # Eigenbases -----------------------------------------------------------------------------------

    def position_moment(self) -> Tensor:
        """Return the sum of A's blocks `[B, K, K]` over the channels."""
        _, _, u = self.parts()
        by_position = u[:, : self.means.shape[-1]].unflatten(-1, (-1, self.energies.shape[-1]))
        moment: Tensor = by_position.mT @ by_position
        return moment - torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1) - self.energies)

    def eigendecomposition(self) -> tuple[Tensor, SplitBasis]:
        """Return a basis Q_C ⊗ Q_K that diagonalises the two sums of A's blocks, and diag QᵀAQ.

        It does not diagonalise A unless A is a Kronecker product.
        """
        sides = (self.channels, self.position_moment())
        (_, basis_c), (_, basis_k) = map(decompositions.eigendecomposition, sides)
        assert basis_c is not None
        assert basis_k is not None
        basis = SplitBasis(basis_c, basis_k, self.joint)
        return self.quotients(basis), basis

    def quotients(self, basis: SplitBasis) -> Tensor:
        """Return the diagonal of QᵀAQ `[B, d]`."""
        covariance, shares, u = self.parts()
        wide = basis.to(self.dtype)
        variances = ((covariance @ wide.channels) * wide.channels).sum(-2).clamp(min=0)
        by_position = (shares.unsqueeze(-1) * wide.positions.square()).sum(1)
        values = (variances.unsqueeze(-1) * by_position.unsqueeze(-2)).flatten(1)
        means: Tensor = wide.right(u.unsqueeze(1)).squeeze(1).square()
        means[:, : values.shape[1]] += values
        return means


def unpacked(moments: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Return the channels' moment `[B, C, C]` of packed moments, and all others."""
    # C² + C K + K + 1 numbers
    rest = moments.shape[-1] - positions - 1
    C = round((positions**2 / 4 + rest) ** 0.5 - positions / 2)
    return moments[:, : C * C].unflatten(-1, (C, C)), moments[:, C * C :]


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


@dataclass
class SplitInverse:
    """(A + γ I)⁻¹ = ⊕_k (λ_k Σ + γ I)⁻¹ − w wᵀ.

    Attributes:
        blocks: The first part, `[B, K, C, C]`; 1/γ for a bias.
        update: w, and 1/γ, `[B, d + 1]`.
        joint: Whether there is a column of a bias.
        u: That of A, where it is still needed.
    """

    blocks: Tensor
    update: Tensor
    joint: bool
    u: Tensor | None = None

    ndim = 3

    @classmethod
    def updated(cls, blocks: Tensor, damping: Tensor, u: Tensor) -> SplitInverse:
        """Return the inverse from its first part and u, with the Sherman-Morrison formula."""
        wide = blocks.to(u.dtype)
        K, C = blocks.shape[1:3]
        joint = u.shape[-1] > C * K
        by_position = u[:, : C * K].unflatten(-1, (C, K)).mT.unsqueeze(-1)  # [B, K, C, 1]
        image = (wide @ by_position).squeeze(-1).mT.flatten(1)
        inverse_damping = damping.reciprocal().unsqueeze(-1)
        if joint:
            image = torch.cat([image, u[:, -1:] * inverse_damping], -1)
        growth = 1 + (u * image).sum(-1, keepdim=True)
        return cls(blocks, torch.cat([image / growth.sqrt(), inverse_damping], -1), joint, u)

    def rounded(self, dtype: torch.dtype) -> SplitInverse:
        """Return it with blocks in a dtype; w is theirs, so that it stays positive definite."""
        if dtype == self.blocks.dtype:
            return self
        assert self.u is not None
        return self.updated(self.blocks.to(dtype), self.update[:, -1].reciprocal(), self.u)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the blocks."""
        return self.blocks.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of A."""
        d = self.update.shape[-1] - 1
        return len(self.blocks), d, d

    def to(self, dtype: torch.dtype) -> SplitInverse:
        """Return the same in a dtype."""
        return SplitInverse(self.blocks.to(dtype), self.update.to(dtype), self.joint)

    def trace(self) -> Tensor:
        """Return the trace `[B]`."""
        total: Tensor = self.blocks.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
        total = total - self.update[:, :-1].square().sum(-1)
        return total + self.update[:, -1] if self.joint else total

    def right(self, X: Tensor) -> Tensor:
        """Return X times it, for X `[..., B, n, d]`."""
        K, C = self.blocks.shape[1:3]
        w = self.update[:, :-1].to(X.dtype)
        by_position = X[..., : C * K].unflatten(-1, (C, K)).movedim(-1, -3)
        product = (by_position @ self.blocks.to(X.dtype)).movedim(-3, -1).flatten(-2)
        if self.joint:
            scale = self.update[:, -1, None, None].to(X.dtype)
            product = torch.cat([product, X[..., -1:] * scale], -1)
        result: Tensor = product - (X @ w.unsqueeze(-1)) * w.unsqueeze(-2)
        return result

    def dense(self) -> Tensor:
        """Return it as a matrix."""
        B, d, _ = self.shape
        eye = torch.eye(d, dtype=self.update.dtype, device=self.update.device)
        return self.right(eye.expand(B, d, d))

    def eigendecomposition(self) -> tuple[Tensor, Tensor | None]:
        """Return that of the dense matrix."""
        return decompositions.eigendecomposition(self.dense())


@dataclass
class SplitBasis:
    """Q_C ⊗ Q_K, and 1 for a bias.

    Attributes:
        channels: Q_C, `[B, C, C]`.
        positions: Q_K, `[B, K, K]`.
        joint: Whether there is a column of a bias.
    """

    channels: Tensor
    positions: Tensor
    joint: bool

    ndim = 3

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both."""
        return self.channels.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of Q."""
        d = self.channels.shape[-1] * self.positions.shape[-1] + int(self.joint)
        return len(self.channels), d, d

    @property
    def mT(self) -> SplitBasis:  # noqa: N802  (torch's name)
        """The transposed matrix."""
        return SplitBasis(self.channels.mT, self.positions.mT, self.joint)

    def to(self, dtype: torch.dtype) -> SplitBasis:
        """Return the same in a dtype."""
        return SplitBasis(self.channels.to(dtype), self.positions.to(dtype), self.joint)

    def right(self, X: Tensor) -> Tensor:
        """Return X Q for X `[..., B, n, d]`."""
        C, K = self.channels.shape[-1], self.positions.shape[-1]
        channels, positions = self.channels.to(X.dtype), self.positions.to(X.dtype)
        split = X[..., : C * K].unflatten(-1, (C, K))  # [..., B, n, C, K]
        rotated = (split @ positions.unsqueeze(-3)).mT @ channels.unsqueeze(-3)
        product = rotated.mT.flatten(-2)
        return torch.cat([product, X[..., -1:]], -1) if self.joint else product

    def squared_overlap(self, old: SplitBasis) -> SplitBasis:
        """Return the squares of the entries of Qᵀ Q_old, transposed."""
        sides = ((self.channels, old.channels), (self.positions, old.positions))
        squares = [(new.mT @ before.to(new.dtype)).square().mT for new, before in sides]
        return SplitBasis(squares[0], squares[1], self.joint)


Factor = Tensor | SplitFactor | SplitInverse | LowRankFactor | LowRankInverse
Side = Tensor | LowRankFactor | LowRankInverse  # what G may be
Basis = Tensor | SplitBasis
