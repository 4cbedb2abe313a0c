"""Wide factors of low rank plus a diagonal, from a sketch, and their inverses; no layers.

Of a factor A `[d, d]` two linear functions are kept, which are averaged over time and added over
data as A itself would be: the sketch Y = A Ω with a fixed Ω `[d, r]` of random signs, and its
diagonal. They stand for

    A ≈ U Uᵀ + D,    U Uᵀ = Y (Ωᵀ Y + ν I)⁻¹ Yᵀ ≤ A,    D = diag(A) − diag(U Uᵀ) ≥ 0,

whose diagonal, and so whose trace, is that of A. With rows a, A Ω = Σ a (aᵀ Ω): A itself is never
formed. The inverse is

    (A + γ I)⁻¹ = S − V Vᵀ,    S = (D + γ I)⁻¹,    V = S U L⁻ᵀ,    L Lᵀ = I + Uᵀ S U.

What is kept of either is one tensor `[B, d, r + 1]`, the diagonal (of A, of S) as its last column.

References:
    Tropp, Yurtsever, Udell & Cevher (2017), https://arxiv.org/abs/1706.05736, Algorithm 3 (the
    Nyström form of a sketch, with its shift ν). Deviations: nothing is truncated, ν is not taken
    away again, and what it leaves of the diagonal is kept.
    Woodbury (1950) for the inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfacopt.linalg import decompositions

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's from Python 3.11 on

# A language model with sides of 512 learnt a little less in a step with 32, other networks as much
# as with whole factors.
LEAST_RANK = 64

_SEED = 0

# Beyond round-off, of what is compared.
_TOLERANCE = 0.02

# Of curvature that is so much larger than the damping, in float32 S − V Vᵀ would leave little but
# round-off, and maybe of the wrong sign: there it is kept, and multiplied, in float64.
_LARGEST = 1e4

# ν in units of round-off and of tr A: below that Ωᵀ Y knows nothing of A.
_SHIFT = 8.0


def rank_beside(side: int, other: int) -> int:
    """Return r for a side of a matrix whose other side is `other`; 0 where r would save nothing.

    A product with V takes 2 r / d of what one with a dense inverse takes: a quarter, or an eighth
    for a side that is at least twice as wide as the other, whose products are dear.
    """
    rank = max(side // (16 if side >= 2 * other else 8), LEAST_RANK)
    return rank if 2 * (rank + 1) <= side else 0


@lru_cache(maxsize=16)
def signs(side: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Ω `[d, r]`: ±1/√d, the same on all machines."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    bits = torch.randint(0, 2, (side, rank), generator=generator, dtype=torch.int8, device="cpu")
    omega: Tensor = (2 * bits - 1).to(device, dtype) / side**0.5
    return omega


def sketch(rows: Tensor, rank: int, constant: float | None = None) -> Tensor:
    """Return Y and the diagonal of A = Σ a aᵀ, `[B, d, r + 1]`, of rows `[B, M, d]`.

    Args:
        rows: The vectors a, or all of them but the last entry.
        rank: r.
        constant: The last entry of all of them.
    """
    B, M, columns = rows.shape
    side = columns + int(constant is not None)
    omega = signs(side, rank, rows.dtype, rows.device)
    projected = rows @ omega[:columns]  # aᵀ Ω
    packed = rows.new_empty(B, side, rank + 1)
    if constant is not None:
        projected += constant * omega[-1]
        packed[:, -1, :-1] = constant * projected.sum(1)
        packed[:, -1, -1] = M * constant**2
    packed[:, :columns, :-1] = rows.mT @ projected
    packed[:, :columns, -1] = rows.square().sum(1)
    return packed


def sketch_of(A: Tensor, rank: int) -> Tensor:
    """Return Y and the diagonal of a matrix A `[B, d, d]` itself, `[B, d, r + 1]`."""
    omega = signs(A.shape[-1], rank, A.dtype, A.device)
    return torch.cat([A @ omega, A.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)], -1)


def is_low_rank(kept: Tensor) -> bool:
    """Tell such a tensor from what else is kept of matrices `[B, d, d]`: more than half of them."""
    return kept.ndim == 3 and 2 * kept.shape[-1] <= kept.shape[-2]


def is_possible_factor(packed: Tensor) -> bool:
    """Tell whether such a tensor may be the sketch of a positive semi-definite matrix.

    Of one, (A ω)_i² ≤ A_ii tr A for |ω| = 1, and ωᵀ A ω ≥ 0.
    """
    Y, diagonal = packed[..., :-1].double(), packed[..., -1].double()
    omega = signs(Y.shape[1], Y.shape[2], Y.dtype, Y.device)
    trace = diagonal.sum(-1, keepdim=True)
    bound = (1 + _TOLERANCE) * (diagonal * trace).unsqueeze(-1)
    moments = (omega * Y).sum(1)
    positive = bool((diagonal >= 0).all() and (moments >= -_TOLERANCE * trace).all())
    return positive and bool((Y.square() <= bound).all())


def is_possible_inverse(packed: Tensor) -> bool:
    """Tell whether S − V Vᵀ may be positive definite: its diagonal is."""
    V, scales = packed[..., :-1].double(), packed[..., -1].double()
    positive = bool((scales > 0).all())
    return positive and bool((V.square().sum(-1) <= (1 + _TOLERANCE) * scales).all())


def was_in_float64(packed: Tensor) -> bool:
    """Tell whether S − V Vᵀ, now in less, was in float64, and for a reason; it is useless then.

    I − Vᵀ S⁻¹ V has the eigenvalues of (I + Uᵀ S U)⁻¹.
    """
    V, scales = packed[..., :-1].double(), packed[..., -1:].double()
    inverse = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device) - V.mT @ (V / scales)
    values = torch.linalg.eigvalsh(inverse).clamp(min=torch.finfo(V.dtype).tiny)
    largest = values.reciprocal().square().sum(-1).sqrt().amax()
    return packed.dtype != torch.float64 and not bool(largest < 2 * _LARGEST)


@dataclass
class _LowRank:
    packed: Tensor

    ndim = 3  # as a dense factor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is kept."""
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        """The device of what is kept."""
        return self.packed.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of A."""
        return len(self.packed), self.packed.shape[1], self.packed.shape[1]

    def to(self, dtype: torch.dtype) -> Self:
        """Return the same in a dtype."""
        return type(self)(self.packed.to(dtype))


@dataclass
class LowRankFactor(_LowRank):
    """U Uᵀ + D of what is kept of A.

    Attributes:
        packed: Y and the diagonal of A, `[B, d, r + 1]`.
    """

    def diagonal(self) -> Tensor:
        """Return the diagonal of A, `[B, d]`."""
        return self.packed[..., -1]

    def trace(self) -> Tensor:
        """Return tr A `[B]`."""
        return self.diagonal().sum(-1)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return U `[B, d, r]` and D `[B, d]`.

        Raises:
            DecompositionError: If what is kept is not finite.
        """
        Y, diagonal = self.packed[..., :-1], self.diagonal().clamp(min=0)
        if not bool(self.packed.isfinite().all()):
            raise decompositions.DecompositionError("the factor has NaN or infinite entries")
        omega = signs(Y.shape[1], Y.shape[2], self.dtype, self.device)
        core = omega.mT @ Y
        core = (core + core.mT) / 2
        shift = _SHIFT * torch.finfo(self.dtype).eps * diagonal.sum(-1, keepdim=True)
        shift = torch.where(shift > 0, shift, 1.0)
        root, info = torch.linalg.cholesky_ex(core + torch.diag_embed(shift.expand(core.shape[:2])))
        if bool(info.any()):  # Y has more round-off than ν, as one that was kept in less precision
            values, basis = torch.linalg.eigh(core)
            shift = torch.maximum(shift, -2 * values[:, :1])
            U = Y @ (basis * (values + shift).rsqrt().unsqueeze(-2))
        else:
            U = torch.linalg.solve_triangular(root, Y.mT, upper=False).mT
        return U, (diagonal - U.square().sum(-1)).clamp(min=0)

    def dense(self) -> Tensor:
        """Return U Uᵀ + D."""
        U, rest = self.parts()
        return U @ U.mT + torch.diag_embed(rest)

    def left(self, X: Tensor) -> Tensor:
        """Return it times X, for X `[..., B, d, n]`."""
        U, rest = self.parts()
        return rest.unsqueeze(-1) * X + U @ (U.mT @ X)

    def right(self, X: Tensor) -> Tensor:
        """Return X times it, for X `[..., B, n, d]`."""
        return self.left(X.mT).mT

    def damped_inverse(self, damping: Tensor) -> LowRankInverse:
        """Return (U Uᵀ + D + damping · I)⁻¹ for a damping `[B]`.

        Raises:
            DecompositionError: If the damped factor is not positive and finite.
        """
        U, rest = self.parts()
        for dtype in (self.dtype, torch.float64):
            scales = (rest.to(dtype) + damping.to(dtype).unsqueeze(-1)).reciprocal()
            scaled = scales.unsqueeze(-1) * U.to(dtype)
            small = U.mT.to(dtype) @ scaled
            small.diagonal(dim1=-2, dim2=-1).add_(1)
            largest = torch.linalg.matrix_norm(small).amax()
            if dtype != torch.float64 and not bool(largest < _LARGEST):
                continue
            root, info = torch.linalg.cholesky_ex(small)
            if not bool(info.any()):
                V = torch.linalg.solve_triangular(root.mT, scaled, upper=True, left=False)
                packed = torch.cat([V, scales.unsqueeze(-1)], -1)
                if bool(packed.isfinite().all()):
                    return LowRankInverse(packed)
        raise decompositions.DecompositionError(
            "the damped factor is not positive definite, also in float64; raise the damping"
        )


@dataclass
class LowRankInverse(_LowRank):
    """S − V Vᵀ.

    Attributes:
        packed: V and the diagonal of S, `[B, d, r + 1]`, in the dtype that products need.
    """

    def trace(self) -> Tensor:
        """Return the trace `[B]`."""
        V, scales = self.packed[..., :-1], self.packed[..., -1]
        return scales.sum(-1) - V.square().sum((-2, -1))

    def left(self, X: Tensor) -> Tensor:
        """Return it times X, for X `[..., B, d, n]`."""
        own, packed = self._in_own_dtype(X)
        V, scales = packed[..., :-1], packed[..., -1:]
        return (scales * own - V @ (V.mT @ own)).to(X.dtype)

    def right(self, X: Tensor) -> Tensor:
        """Return X times it, for X `[..., B, n, d]`."""
        own, packed = self._in_own_dtype(X)
        V, scales = packed[..., :-1], packed[..., -1].unsqueeze(-2)
        return (own * scales - (own @ V) @ V.mT).to(X.dtype)

    def _in_own_dtype(self, X: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.dtype, X.dtype)
        return X.to(dtype), self.packed.to(dtype)

    def dense(self) -> Tensor:
        """Return it as a matrix."""
        V, scales = self.packed[..., :-1], self.packed[..., -1]
        return torch.diag_embed(scales) - V @ V.mT
