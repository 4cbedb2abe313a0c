"""Kronecker products of matrices that are kept once, written out for a product alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacopt.linalg.kronecker import KroneckerProduct, multiplied_left, multiplied_right
from kfacopt.linalg.low_rank import LowRankInverse, is_low_rank
from kfacopt.linalg.triangles import Workspace, symmetric


def inverse_side(kept: Tensor, workspace: Workspace | None = None) -> Tensor | LowRankInverse:
    """Return the inverse of which something is kept.

    On the CPU its columns are contiguous, as LAPACK leaves them: the round-off of products sees it.
    """
    if is_low_rank(kept):
        return LowRankInverse(kept)
    whole = symmetric(kept, workspace)
    return whole if whole is kept or kept.device.type != "cpu" else whole.mT


@dataclass
class KeptProduct:
    """G ⊗ A of inverses as `kept_once` returns them.

    Attributes:
        grad_output_factor: What is kept of G, `[B, d_out, k]`, or its diagonal `[B, d_out]`.
        input_factor: What is kept of A, likewise.
        workspace: Where they are written out.
    """

    grad_output_factor: Tensor
    input_factor: Tensor
    workspace: Workspace | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.input_factor.dtype

    def widened(self) -> KeptProduct:
        """Return the same product in at least float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        sides = (self.grad_output_factor.to(dtype), self.input_factor.to(dtype))
        return KeptProduct(*sides, self.workspace)

    def dense(self) -> KroneckerProduct:
        """Return the same product of whole factors."""
        return KroneckerProduct(*map(inverse_side, (self.grad_output_factor, self.input_factor)))

    def apply_columns(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """Return G X A as `KroneckerProduct.apply_columns` does.

        One factor is written out after the other, into the same memory.
        """
        own, widths = self.workspace, [x.shape[-1] for x in columns]
        left = multiplied_left(inverse_side(self.grad_output_factor, own), columns)
        return multiplied_right(left, inverse_side(self.input_factor, own), widths)
