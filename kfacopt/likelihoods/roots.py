"""Roots of the positive parts of many symmetric blocks at once; nothing here knows a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    size = blocks.abs().amax(-1).amax(-1, keepdim=True)
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
    V = start.new_zeros(steps, *start.shape)
    V[0] = start / start.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(start.dtype).tiny)
    T = start.new_zeros(len(start), steps, steps)
    for k in range(steps):
        w = multiply(V[k])
        size, known = w.norm(dim=-1), V[: k + 1]
        for _ in range(2):
            shares = (known * w).sum(-1, keepdim=True)
            w = w - (known * shares).sum(0)
            T[:, k, k] += shares[k, :, 0]
        beta = w.norm(dim=-1)
        beta = torch.where(beta > tiny * size, beta, torch.zeros_like(beta))
        if k + 1 == steps:
            break
        T[:, k, k + 1] = T[:, k + 1, k] = beta
        safe = torch.where(beta > 0, beta, torch.ones_like(beta)).unsqueeze(-1)
        V[k + 1] = torch.where(beta.unsqueeze(-1) > 0, w / safe, torch.zeros_like(w))
    return V, T


@dataclass(frozen=True, eq=False)
class KrylovSpace:
    """What Lanczos' method tells of the positive parts of many symmetric blocks H⁺.

    Attributes:
        basis: Orthonormal approximate eigenvectors Q, 0 where a space has ended, `[R, C, K]`.
        eigenvalues: θ⁺, negative ones as 0, `[R, K]`.
        rest: c `[R]`, the median eigenvalue: what lies outside of the space is taken to have c I.
    """

    basis: Tensor
    eigenvalues: Tensor
    rest: Tensor

    @classmethod
    def of(cls, V: Tensor, T: Tensor, share: float) -> KrylovSpace:
        """Take `lanczos_rows`' results for a start of random signs.

        Args:
            V: `[K, R, C]`.
            T: `[R, K, K]`.
            share: As for `eigenvalues_above`.
        """
        values, Q = eigenvalues_above(T, share)
        values = values.clamp(min=0)
        # The start's share of each eigenvector, squared, is how many eigenvalues are about θ.
        order = values.argsort(-1)
        density = Q[:, 0].square().gather(-1, order).cumsum(-1)
        middle = (density < 0.5 * density[:, -1:]).sum(-1, keepdim=True)
        rest = values.gather(-1, order.gather(-1, middle)).squeeze(-1)
        return cls(torch.einsum("krc,rkj->rcj", V, Q), values, rest)

    def root_times_start(self, start: Tensor) -> Tensor:
        """Return √H⁺ s for the vectors s `[R, C]` that the spaces were started with."""
        inner = torch.einsum("rcj,rc->rj", self.basis, start)
        return torch.einsum("rcj,rj->rc", self.basis, self.eigenvalues.sqrt() * inner)

    def multiply(self, vectors: Tensor) -> Tensor:
        """Return Q θ⁺ Qᵀ v + c (v − Q Qᵀ v) for vectors v `[R, C]`."""
        inner = torch.einsum("rcj,rc->rj", self.basis, vectors)
        c = self.rest.unsqueeze(-1)
        return torch.einsum("rcj,rj->rc", self.basis, (self.eigenvalues - c) * inner) + c * vectors


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
