"""EKFAC's eigenvalues: per-datum gradients' second moments in bases that are given.

For a layer z = W a the gradient of datum n (and vector v) is Γ = Σ_s g_s a_sᵀ. In the bases Q_G and
Q_A its second moments are

    Λ = Σ_{n,v} (Q_Gᵀ Γ_{n,v} Q_A)²    (entry by entry),

the diagonal of (Q_G ⊗ Q_A)ᵀ F (Q_G ⊗ Q_A), and so the best that any diagonal can do in that basis
in the Frobenius norm. Γ is that of the true gradient for expand and for reduce alike.

References:
    George et al. (2018), https://arxiv.org/abs/1806.03884, Eqs. 6 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.factors import (
    elementwise_moment,
    factor_dtype,
    input_rows,
    of_all_groups,
    sparse_rows,
)
from kfacopt.kfac.layers import Block
from kfacopt.linalg.kronecker import multiply_left, multiply_right
from kfacopt.linalg.split_factors import Basis, SplitBasis

# How many entries the gradients of the data of one chunk may have.
CHUNK_ENTRIES = 2**24

Bases = tuple[Tensor | None, Basis | None]


def block_second_moments(
    block: Block, uses: Sequence[LayerUse], grads: Sequence[Tensor], bases: Bases
) -> Tensor:
    """Return Λ `[B, d_out, d_in]` of a block, over the uses of its layer in one forward pass.

    Args:
        block: W, b or [W | b] of a layer.
        uses: The layer's uses; one datum's gradient is the sum over all of them.
        grads: For each use the gradient by the layer's output.
        bases: Q_G `[B, d_out, d_out]` and Q_A `[B, d_in, d_in]`; `None` is the identity.
    """
    if block.layer.family.elementwise:
        return elementwise_moment(block.layer, uses, grads).unsqueeze(2)
    dtype = factor_dtype(block.anchor.dtype)
    inputs: list[Tensor] = []
    outputs = [use.grad_rows(grad.to(dtype)) for use, grad in zip(uses, grads, strict=True)]
    has_few = block.weight is not None and block.layer.diagonal_input
    sparse = sparse_rows(uses, [None] * len(uses)) if has_few else []
    if sparse:
        if len(sparse) == 1:
            outputs = [torch.cat(outputs, dim=2)]
        pairs = zip(sparse, outputs, strict=True)
        squares = [rows.gradient_squares(_rotated(g, bases[0])) for rows, g in pairs]
        return torch.stack(squares).sum(0)
    for use, g in zip(uses, outputs, strict=True):
        if block.weight is not None:
            a = input_rows(block.layer, use)
        else:
            a = use.bias_inputs(block.bias, g)
        inputs.append(a)
    if block.layer.family.routed:
        moments = []
        for use, g, a in zip(uses, outputs, inputs, strict=True):
            own = use.groups or slice(None)
            basis_g, basis_a = (q[own] if isinstance(q, Tensor) else None for q in bases)
            moments.append(gradient_second_moments(g, a, (basis_g, basis_a)))
        return of_all_groups(block.layer, uses, moments)
    if len({g.shape[1] for g in outputs}) == 1:  # else the uses have no data in common
        inputs, outputs = [torch.cat(inputs, dim=2)], [torch.cat(outputs, dim=2)]
    moments = [gradient_second_moments(g, a, bases) for g, a in zip(outputs, inputs, strict=True)]
    return torch.stack(moments).sum(0)


def gradient_second_moments(g: Tensor, a: Tensor, bases: Bases) -> Tensor:
    """Return Σ_n (Q_Gᵀ (Σ_s g_ns a_nsᵀ) Q_A)² `[B, d_out, d_in]`.

    With one position the square factorises, and Λ is one matrix product. With S positions it is
    Σ_{s,s'} of products of entries of g and of products of entries of a, a matrix product over
    S (S + 1) / 2 pairs; where these are more numbers than the gradients of the data, the gradients
    are formed, for as many data at a time as `CHUNK_ENTRIES` allows.

    Args:
        g: Output gradients `[B, N, S, d_out]`.
        a: Inputs `[B, N, S, d_in]`.
        bases: Q_G and Q_A; `None` is the identity.
    """
    S, d_out, d_in = g.shape[2], g.shape[-1], a.shape[-1]
    pairs = S * (S + 1) // 2
    entries = min(pairs * (d_out + d_in), d_out * d_in) if S > 1 else S * (d_out + d_in)
    chunk = max(1, CHUNK_ENTRIES // (max(entries, 1) * g.shape[0]))
    total = g.new_zeros(g.shape[0], d_out, d_in)
    for g_n, a_n in zip(g.split(chunk, dim=1), a.split(chunk, dim=1), strict=True):
        if S == 1 or pairs * (d_out + d_in) <= d_out * d_in:
            g_q, a_q = _rotated(g_n, bases[0]), _rotated(a_n, bases[1])
            total += _pair_products(g_q).mT @ _pair_products(a_q, weighted=True)
        else:
            total += _rotated_gradients(g_n, a_n, bases).square().sum(1)
    return total


def _rotated(rows: Tensor, basis: Basis | None) -> Tensor:
    """Return rows `[B, n, S, d]` times Q `[B, d, d]`."""
    if basis is None:
        return rows
    rotated = multiply_right(rows.flatten(1, 2), basis.to(rows.dtype))
    return rotated.reshape(rows.shape)


def _pair_products(rows: Tensor, weighted: bool = False) -> Tensor:
    """Return x_s x_s' `[B, n · pairs, d]` for s ≤ s'; weighted, those with s < s' count twice."""
    S = rows.shape[2]
    if S == 1:
        return rows.flatten(1, 2).square()
    first, second = torch.triu_indices(S, S, device=rows.device)
    products = rows[:, :, first] * rows[:, :, second]
    if weighted:
        products = products * torch.where(first == second, 1.0, 2.0).to(rows).unsqueeze(-1)
    return products.flatten(1, 2)


def _rotated_gradients(g: Tensor, a: Tensor, bases: Bases) -> Tensor:
    """Return Q_Gᵀ (Σ_s g aᵀ) Q_A `[B, n, d_out, d_in]`, rotating what takes fewer operations."""
    S, d_out, d_in = g.shape[2], g.shape[-1], a.shape[-1]
    if S * (d_out**2 + d_in**2) < d_out * d_in * (d_out + d_in):
        return _rotated(g, bases[0]).mT @ _rotated(a, bases[1])
    assert not isinstance(bases[0], SplitBasis)
    basis_g = None if bases[0] is None else bases[0].to(g.dtype).unsqueeze(1)
    gradients = multiply_left(None if basis_g is None else basis_g.mT, g.mT @ a)
    return _rotated(gradients, bases[1])
