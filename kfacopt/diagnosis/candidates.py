"""Approximations of the curvature, block by block, and their steps; nothing exact is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.block_diagonal import KFACInverseLinearOperator
from kfacopt.kfac.ekfac_operator import EKFACLinearOperator
from kfacopt.kfac.layers import Block, KFACApprox
from kfacopt.kfac.linear_operator import KFACLinearOperator
from kfacopt.linalg.kronecker import (
    DampingMethod,
    KroneckerEigendecomposition,
    KroneckerMatrix,
    KroneckerProduct,
    dense,
)

# EKFAC decomposes each factor: none wider than that, and at most so many operations, Σ d³.
WIDEST = 2048
MOST_DECOMPOSED = 2 * 10**11


@dataclass(frozen=True)
class Partition:
    """θ in the order of the blocks, so that each is a range of its entries.

    Attributes:
        blocks: The blocks.
        names: What they are called.
        damping: δ of each.
    """

    blocks: list[Block]
    names: list[str]
    damping: list[float]

    @classmethod
    def of(
        cls, blocks: list[Block], names: Mapping[int, str], damping: Mapping[Parameter, float]
    ) -> Partition:
        """Name blocks by their layer, or by their parameter where a layer has two blocks."""
        called = [b.layer.name if len(b.layer.blocks) == 1 else names[id(b.anchor)] for b in blocks]
        return cls(blocks, called, [damping[b.anchor] for b in blocks])

    @property
    def params(self) -> list[Parameter]:
        """θ."""
        return [p for block in self.blocks for p in block.parameters]

    @property
    def sizes(self) -> list[int]:
        """How many entries each block has."""
        return [sum(p.numel() for p in block.parameters) for block in self.blocks]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Return the ranges of x `[D, ...]`."""
        parts: Sequence[Tensor] = x.split(self.sizes)
        return parts

    def damping_column(self, like: Tensor) -> Tensor:
        """Return δ of each entry, `[D, 1]`."""
        pairs = zip(self.sizes, self.damping, strict=True)
        return torch.cat([like.new_full((size, 1), delta) for size, delta in pairs])


@dataclass(frozen=True)
class Candidate:
    """A block-diagonal approximation of F.

    Attributes:
        name: What the report calls it.
        matrices: The matrix of each block; `None` if there is none.
        inverses: Their damped inverses.
        blocks: The blocks.
    """

    name: str
    matrices: list[KroneckerMatrix | None]
    inverses: list[KroneckerMatrix | None]
    blocks: list[Block]

    def multiply(self, index: int, X: Tensor) -> Tensor | None:
        """Return a block times X `[D_block, K]`."""
        return _multiply(self.blocks[index], self.matrices[index], X)

    def precondition(self, index: int, X: Tensor) -> Tensor | None:
        """Return a block's damped inverse times X `[D_block, K]`."""
        return _multiply(self.blocks[index], self.inverses[index], X)


def _multiply(block: Block, matrix: KroneckerMatrix | None, X: Tensor) -> Tensor | None:
    if matrix is None:
        return None
    operator = KFACInverseLinearOperator(block.parameters, [(block, matrix)])
    product: Tensor = operator @ X
    return product


@dataclass(frozen=True)
class Options:
    """How K-FAC's factors are formed and inverted.

    Attributes:
        approx: `"expand"` or `"reduce"`.
        method: `"factored"` or `"exact"`.
        operator: The other arguments of `KFACLinearOperator`.
    """

    approx: KFACApprox
    method: DampingMethod
    operator: Mapping[str, Any]


def factors_of(
    approx: KFACApprox, partition: Partition, given: Sequence[Any], options: Options
) -> list[KroneckerProduct]:
    """Return G ⊗ A of each block, by K-FAC; see `kfac_candidate`."""
    model, loss_func, batches = given
    params = partition.params
    operator = KFACLinearOperator(
        model, loss_func, params, batches, kfac_approx=approx, **options.operator
    )
    # Blocks of this operator's own, in the partition's order, as these follow from the model.
    return [m for _, m in operator._kronecker_blocks() if isinstance(m, KroneckerProduct)]


def kfac_candidate(
    name: str, approx: KFACApprox, partition: Partition, given: Sequence[Any], options: Options
) -> Candidate:
    """Return K-FAC's approximation.

    Args:
        name: What it is called.
        approx: `"expand"` or `"reduce"`.
        partition: The blocks.
        given: Model and loss, and the data.
        options: How factors are formed.
    """
    matrices = factors_of(approx, partition, given, options)
    pairs = zip(matrices, partition.damping, strict=True)
    inverses = [m.inverse(delta, options.method) for m, delta in pairs]
    return Candidate(name, [*matrices], [*inverses], partition.blocks)


def is_same(first: Candidate, second: Candidate) -> bool:
    """Tell whether two candidates of K-FAC have the same factors, but for round-off."""
    for x, y in zip(first.matrices, second.matrices, strict=True):
        assert isinstance(x, KroneckerProduct)
        assert isinstance(y, KroneckerProduct)
        for a, b in (
            (dense(x.input_factor), dense(y.input_factor)),
            (dense(x.grad_output_factor), dense(y.grad_output_factor)),
        ):
            eps = torch.finfo(a.dtype).eps
            if bool((a - b).norm() > 1000 * eps * a.norm()):
                return False
    return True


def can_decompose(candidate: Candidate) -> bool:
    """Tell whether EKFAC's eigendecompositions are within bounds."""
    sides = [
        side.shape[-1]
        for m in candidate.matrices
        if isinstance(m, KroneckerProduct)
        for side in (m.input_factor, m.grad_output_factor)
        if side.ndim == 3
    ]
    return max(sides, default=0) <= WIDEST and sum(d**3 for d in sides) <= MOST_DECOMPOSED


def ekfac_candidate(partition: Partition, given: Sequence[Any], options: Options) -> Candidate:
    """Return EKFAC's approximation; its arguments are those of `kfac_candidate`."""
    model, loss_func, batches = given
    operator = EKFACLinearOperator(
        model,
        loss_func,
        partition.params,
        batches,
        kfac_approx=options.approx,
        **options.operator,
    )
    matrices: list[KroneckerMatrix | None] = [m for _, m in operator._kronecker_blocks()]
    pairs = zip(matrices, partition.damping, strict=True)
    inverses: list[KroneckerMatrix | None] = [
        m.inverse(delta) for m, delta in pairs if isinstance(m, KroneckerEigendecomposition)
    ]
    return Candidate("EKFAC", matrices, inverses, partition.blocks)
