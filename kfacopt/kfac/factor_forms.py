"""What is kept of a layer's A and G: whole, their diagonals, by channels, or as a low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.kfac.layers import KFACApprox, Layer
from kfacopt.linalg.kronecker import dense
from kfacopt.linalg.low_rank import LowRankFactor
from kfacopt.linalg.split_factors import Factor, Side, SplitFactor, packed_size


class Factors(NamedTuple):
    """The Kronecker factors of a layer, F ≈ G ⊗ A.

    Attributes:
        input_factor: A, `[d_in (+ 1), d_in (+ 1)]`; `[B, ., .]` for a convolution of B > 1 groups.
            One that is kept by channels and positions, or as a low rank, is written out.
        grad_output_factor: G, `[d_out, d_out]`, likewise. A diagonal factor lacks the last axis.
    """

    input_factor: Tensor
    grad_output_factor: Tensor

    @classmethod
    def of(cls, layer: Layer, input_factor: Factor, grad_output_factor: Side) -> Factors:
        """Make a pair from factors with a leading axis B, which is left out if it is 1."""
        sides = (dense(input_factor), dense(grad_output_factor))
        return cls(*(side[0] if layer.groups == 1 else side for side in sides))


class Kept(NamedTuple):
    """What is kept of the second moment of one side of a layer.

    Attributes:
        diagonal: Its diagonal alone; no side of these has a rank.
        rank: r, of a sketch and the diagonal (see `kfacopt.linalg.low_rank`); 0 for all of it.
    """

    diagonal: bool = False
    rank: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is all of it."""
        return not self.diagonal and self.rank == 0


@dataclass(frozen=True)
class FactorForm:
    """How factors are formed.

    Attributes:
        kfac_approx: `"expand"` or `"reduce"`.
        max_factor_dim: A wider side is kept as its diagonal.
        stored_dtype: The dtype that running averages are kept in; `None` is the computation's.
    """

    kfac_approx: KFACApprox
    max_factor_dim: int | None = None
    stored_dtype: torch.dtype | None = None

    @property
    def reduce(self) -> bool:
        """Whether positions are averaged."""
        return self.kfac_approx == "reduce"

    def diagonal(self, side: int) -> bool:
        """Whether a factor with this side is too wide to be kept but as its diagonal."""
        return self.max_factor_dim is not None and side > self.max_factor_dim

    def kept(self, layer: Layer) -> tuple[Kept, Kept]:
        """Return what is kept of a layer's A, and of its G."""
        A = layer.diagonal_input or self.diagonal(layer.d_in)
        A = A and not layer.positions
        G = layer.family.elementwise or self.diagonal(layer.d_out)
        return Kept(A, layer.ranks[0]), Kept(G, layer.ranks[1])

    def count_shape(self, layer: Layer) -> tuple[int, ...]:
        """Return the shape of the number of a layer's inputs: `[B]` where groups have own ones."""
        return (layer.groups,) if layer.family.routed else ()

    def shapes(self, layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of what is kept of a layer's A and G."""
        B, sides = layer.groups, (layer.d_in, layer.d_out)
        A, G = (
            (B, side) if kept.diagonal else (B, side, kept.rank + 1 if kept.rank else side)
            for side, kept in zip(sides, self.kept(layer), strict=True)
        )
        if layer.positions:
            A = (B, packed_size(layer.channels, layer.positions))
        return A, G


def as_factors(layer: Layer, A: Tensor, G: Tensor) -> tuple[Factor, Side]:
    """Return A and G from what is kept of them."""
    rank_a, rank_g = layer.ranks
    inputs: Factor = LowRankFactor(A) if rank_a else A
    if layer.positions:
        inputs = SplitFactor.from_packed(A, layer.positions, layer.joint)
    return inputs, LowRankFactor(G) if rank_g else G
