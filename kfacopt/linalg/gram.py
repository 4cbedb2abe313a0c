"""Sums of outer products over many rows: XᵀX at the price of half a product, and XᵀY."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of one block: fewer operations with narrow blocks, but small products run at lower rates.
BLOCK_WIDTH = 128
GPU_BLOCK_WIDTH = 1024

# A GPU's multiprocessors share the entries of a product in tiles; where these are fewer than about
# twice the multiprocessors, the rows are cut into parts of at least so many.
_TILE, _TILES, _FEWEST_ROWS = 128, 256, 1024


def gram(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Return XᵀX `[B, d, d]`; of wide X, only the blocks up to the diagonal are computed.

    torch has no call for BLAS's `syrk`. In blocks of w columns the product takes n d (d + w)
    operations instead of 2 n d²; the rest is a transposed copy.

    Args:
        rows: X, `[B, n, d]`, of any strides.
        out: Where to put it, a view of a larger matrix for instance.
    """
    B, _, d = rows.shape
    width = BLOCK_WIDTH if rows.device.type == "cpu" else GPU_BLOCK_WIDTH
    if d <= width:
        return inner(rows, rows, out)
    out = rows.new_empty(B, d, d) if out is None else out
    for start in range(0, d, width):
        end = min(start + width, d)
        inner(rows[..., start:end], rows[..., :end], out[:, start:end, :end])
        out[:, :start, start:end] = out[:, start:end, :start].mT
    return out


def inner(X: Tensor, Y: Tensor, out: Tensor | None = None, parts: int | None = None) -> Tensor:
    """Return XᵀY `[B, d, e]`.

    Args:
        X: `[B, n, d]`, of any strides.
        Y: `[B, n, e]`, likewise.
        out: Where to put it.
        parts: Into how many parts of the rows the sum is cut; `None` for as many as keep the
            device busy, 1 on the CPU.
    """
    if parts is None:
        parts = 1 if X.device.type == "cpu" else _parts(X.shape[1], X.shape[2], Y.shape[2])
    length = X.shape[1] // parts
    if parts == 1 or length == 0:
        return torch.matmul(X.mT, Y, out=out)
    cut = parts * length
    stacks = [M[:, :cut].unflatten(1, (parts, length)) for M in (X, Y)]
    total = torch.sum(stacks[0].mT @ stacks[1], dim=1, out=out)
    return total if cut == X.shape[1] else total.add_(X[:, cut:].mT @ Y[:, cut:])


def _parts(n: int, d: int, e: int) -> int:
    tiles = -(-d // _TILE) * -(-e // _TILE)
    return max(1, min(n // _FEWEST_ROWS, _TILES // max(1, tiles)))
