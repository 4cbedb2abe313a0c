"""Matrices of one Kronecker-structured block a layer, as operators; not how blocks are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.factors import factor_dtype
from kfacopt.kfac.layers import Block
from kfacopt.linalg.kronecker import KroneckerMatrix
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.tensor_lists import split_rows


class KroneckerBlockLinearOperator(LinearOperator):
    """A block-diagonal matrix whose blocks, over the parameters of layers, have Kronecker form.

    Args:
        params: The parameters, in the order of rows and columns.
    """

    self_adjoint = True

    def __init__(self, params: Sequence[Parameter]) -> None:
        self._params = list(params)
        shapes = [tuple(p.shape) for p in self._params]
        size = sum(p.numel() for p in self._params)
        dtype = self._params[0].dtype
        super().__init__((size, size), dtype, self._params[0].device, shapes, shapes)

    def _kronecker_blocks(self) -> list[tuple[Block, KroneckerMatrix]]:
        """Return the blocks with their matrices."""
        raise NotImplementedError

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        assert self.in_shapes is not None
        index = {id(p): i for i, p in enumerate(self._params)}
        # [D, K] -> one [K, *shape] for each parameter
        pieces = [piece.movedim(-1, 0) for piece in split_rows(X, self.in_shapes)]
        for block, matrix in self._kronecker_blocks():
            where = [index[id(p)] for p in block.parameters]
            stacked = block.to_matrix([pieces[i] for i in where])
            products = block.from_matrix(matrix.apply(stacked.to(factor_dtype(X.dtype))))
            for i, product in zip(where, products, strict=True):
                pieces[i] = product.to(X.dtype)
        return torch.cat([piece.reshape(len(piece), -1) for piece in pieces], dim=1).mT

    def trace(self) -> Tensor:
        """Return the trace, a scalar, at the cost of no product."""
        return torch.stack([matrix.trace() for _, matrix in self._kronecker_blocks()]).sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar, at the cost of no product."""
        norms = [matrix.frobenius_norm() for _, matrix in self._kronecker_blocks()]
        return torch.stack(norms).square().sum().sqrt()

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant, a scalar; −∞ for a singular matrix."""
        return torch.stack([matrix.logdet() for _, matrix in self._kronecker_blocks()]).sum()

    def det(self) -> Tensor:
        """Return the determinant, a scalar; it under- or overflows long before `logdet` does."""
        return self.logdet().exp()


class KFACInverseLinearOperator(KroneckerBlockLinearOperator):
    """The damped inverse of a K-FAC matrix; see `KFACLinearOperator.inverse`."""

    def __init__(
        self, params: Sequence[Parameter], blocks: list[tuple[Block, KroneckerMatrix]]
    ) -> None:
        super().__init__(params)
        self._blocks = blocks

    def _kronecker_blocks(self) -> list[tuple[Block, KroneckerMatrix]]:
        return self._blocks
