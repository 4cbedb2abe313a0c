"""Symmetric products XᵀX at the price of half a general one."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of one block: fewer operations with narrow blocks, but small products run at lower rates.
BLOCK_WIDTH = 128


def gram(rows: Tensor) -> Tensor:
    """Return XᵀX `[B, d, d]`; on the CPU, of large X, only the blocks up to the diagonal.

    torch has no call for BLAS's `syrk`. In blocks of w columns the product takes n d (d + w)
    operations instead of 2 n d²; the rest is a transposed copy.

    Args:
        rows: X, `[B, n, d]`, of any strides.
    """
    B, _, d = rows.shape
    if rows.device.type != "cpu" or d <= BLOCK_WIDTH:
        return rows.mT @ rows
    out = rows.new_empty(B, d, d)
    for X, target in zip(rows, out, strict=True):
        for start in range(0, d, BLOCK_WIDTH):
            end = min(start + BLOCK_WIDTH, d)
            torch.mm(X[:, start:end].mT, X[:, :end], out=target[start:end, :end])
            target[:start, start:end] = target[start:end, :start].mT
    return out
