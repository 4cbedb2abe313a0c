"""Kronecker products of matrices that are kept once.

On the CPU halves are multiplied as they are; all else is written out for a product alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacopt.linalg.kronecker import (
    KroneckerProduct,
    cut_columns,
    multiplied_left,
    multiplied_right,
)
from kfacopt.linalg.low_rank import LowRankInverse, is_low_rank
from kfacopt.linalg.triangles import Workspace, halves_of, symmetric

# Rows of a result that is made of columns begin at multiples of it.
_ALIGNED = 16

Halves = tuple[Tensor, Tensor]


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
        """The dtype of the wider factor: one of low rank may need float64."""
        return torch.promote_types(self.grad_output_factor.dtype, self.input_factor.dtype)

    def widened(self) -> KeptProduct:
        """Return the same product in at least float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if dtype == self.input_factor.dtype == self.grad_output_factor.dtype:
            return self
        sides = (self.grad_output_factor.to(dtype), self.input_factor.to(dtype))
        return KeptProduct(*sides, self.workspace)

    def dense(self) -> KroneckerProduct:
        """Return the same product of whole factors."""
        return KroneckerProduct(*map(inverse_side, (self.grad_output_factor, self.input_factor)))

    def apply_columns(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """Return G X A as `KroneckerProduct.apply_columns` does.

        What is written out goes into the same memory, one factor after the other.
        """
        own, widths = self.workspace, [x.shape[-1] for x in columns]
        G, A = self.grad_output_factor, self.input_factor
        halves = _halves_beside(G, columns[0])
        if halves is None:
            left = multiplied_left(inverse_side(G, own), columns)
        else:
            left = _multiplied_left(halves, columns)
        halves = _halves_beside(A, left)
        if halves is None:
            return multiplied_right(left, inverse_side(A, own), widths)
        return _multiplied_right(left, halves, widths)


def _halves_beside(kept: Tensor, X: Tensor) -> Halves | None:
    """Return the halves of a factor if they are multiplied as they are with X `[B, n, m]`."""
    alike = X.ndim == 3 and X.shape[0] == kept.shape[0] and X.device.type == "cpu"
    return halves_of(kept) if alike and not torch.is_grad_enabled() else None


def _multiplied_left(halves: Halves, columns: Sequence[Tensor]) -> Tensor:
    """Return G X for X `[B, d, n]` that is given in columns, written side by side."""
    widths = [x.shape[-1] for x in columns]
    stride = -(-sum(widths) // _ALIGNED) * _ALIGNED
    result = columns[0].new_empty(*columns[0].shape[:-1], stride)[..., : sum(widths)]
    pieces = [piece for x in columns for piece in cut_columns(x)]
    parts = result.split([x.shape[-1] for x in pieces], dim=-1)
    for x, part in zip(pieces, parts, strict=True):
        _multiply(halves, x, part, 0)
    return result


def _multiplied_right(X: Tensor, halves: Halves, widths: Sequence[int]) -> list[Tensor]:
    """Return X A for X `[B, n, d]` in columns of some widths, as the transposed of A Xᵀ."""
    found, start = [X.new_empty(*X.shape[:-1], width) for width in widths], 0
    for part in (piece for out in found for piece in cut_columns(out)):
        _multiply(halves, X.mT, part.mT, start)
        start += part.shape[-1]
    return found


def _multiply(halves: Halves, X: Tensor, out: Tensor, start: int) -> None:
    """Write some rows of the product of a symmetric matrix and X.

    Args:
        halves: L and S of the matrix.
        X: `[B, d, n]`.
        out: `[B, rows, n]`.
        start: Which of the product's rows is the first of them.
    """
    (left, square), end = halves, start + out.shape[1]
    h = left.shape[-1]
    torch.bmm(left[:, start:end], X[:, :h], out=out)
    if start < h:  # what mirrors the rectangle below
        out[:, : h - start].baddbmm_(left[:, h:, start:end].mT, X[:, h:])
    if end > h:
        rows = square[:, max(start - h, 0) : end - h]
        out[:, max(h - start, 0) :].baddbmm_(rows, X[:, h:])
