"""Roots of the positive parts of many symmetric blocks at once; nothing here knows a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def positive_root(blocks: Tensor, share: float = 0.0) -> Tensor:
    """Return B with B Bᵀ the positive part of symmetric blocks `[R, C, C]`; NaN stays NaN.

    By Cholesky's method, to round-off, where a block has no negative part; it is much faster.

    Args:
        blocks: The blocks.
        share: Of a block's largest eigenvalue, below which others count as 0 where some are
            negative: what round-off makes of 0 is no positive part.
    """
    if not bool(blocks.isfinite().all()):
        return torch.full_like(blocks, torch.nan)
    size = blocks.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
    shift = size * (blocks.shape[-1] * 4 * torch.finfo(blocks.dtype).eps)
    shift = shift + torch.finfo(blocks.dtype).tiny
    shifted = blocks + torch.diag_embed(shift.expand(blocks.shape[:-1]))
    roots: Tensor
    roots, failed = torch.linalg.cholesky_ex(shifted)
    rest = failed > 0
    if bool(rest.any()):
        values, vectors = eigenvalues_above(blocks[rest], share)
        roots[rest] = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return roots * (size > 0).unsqueeze(-1)


def lanczos_rows(
    multiply: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Run Lanczos' method for many symmetric blocks at once, with full orthogonalisation.

    Args:
        multiply: H x for x `[R, C]`, each row with a block of its own.
        start: The first vectors `[R, C]`.
        steps: K.

    Returns:
        V `[K, R, C]`, orthonormal for each row, and T = Vᵀ H V `[R, K, K]`. Where a row's Krylov
        space ends, the rest of its V and T is 0.
    """
    tiny = torch.finfo(start.dtype).eps * 16
    v = start / start.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(start.dtype).tiny)
    V = [v]
    T = start.new_zeros(len(start), steps, steps)
    for k in range(steps):
        w = multiply(V[k])
        size = w.norm(dim=-1)
        for _ in range(2):
            for j, q in enumerate(V):
                share = (q * w).sum(-1)
                w = w - share.unsqueeze(-1) * q
                if j == k:
                    T[:, k, k] += share
        beta = w.norm(dim=-1)
        beta = torch.where(beta > tiny * size, beta, torch.zeros_like(beta))
        if k + 1 == steps:
            break
        T[:, k, k + 1] = T[:, k + 1, k] = beta
        safe = torch.where(beta > 0, beta, torch.ones_like(beta))
        V.append(torch.where(beta.unsqueeze(-1) > 0, w / safe.unsqueeze(-1), torch.zeros_like(w)))
    return torch.stack(V), T


def eigenvalues_above(T: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of symmetric matrices; small values as 0, NaN for NaN.

    Args:
        T: The matrices `[R, K, K]`.
        share: Of each matrix's largest eigenvalue, below which others count as 0.
    """
    if not bool(T.isfinite().all()):
        return torch.full_like(T[:, 0], torch.nan), torch.full_like(T, torch.nan)
    values, vectors = torch.linalg.eigh(T)
    largest = values.abs().amax(-1, keepdim=True)
    return values * (values.abs() > share * largest), vectors
