"""From inputs a and output gradients g to the factors A and G, and their averages over time.

For the loss L = Σ_t ω_t ℓ_t and vectors v that carry √ω (see `kfacopt.likelihoods`):

    expand:  A = 1/(N S) Σ_{n,s} a aᵀ,  G = Σ_{n,v,s} g gᵀ
    reduce:  A = 1/N Σ_n ā āᵀ, ā = mean_s a,  G = Σ_{n,v} ĝ ĝᵀ, ĝ = Σ_s g

Several uses of a layer within one forward pass are further positions s.

References:
    Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636, Eqs. 16 and 22.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.layers import KFACApprox, Layer, layer_grad_outputs, layer_inputs


class Factors(NamedTuple):
    """The Kronecker factors of a layer, F ≈ G ⊗ A.

    Attributes:
        input_factor: A, `[d_in (+ 1), d_in (+ 1)]`; `[B, ., .]` for a convolution of B > 1 groups.
        grad_output_factor: G, `[d_out, d_out]`, likewise. A diagonal factor lacks the last axis.
    """

    input_factor: Tensor
    grad_output_factor: Tensor

    @classmethod
    def of(cls, layer: Layer, input_factor: Tensor, grad_output_factor: Tensor) -> Factors:
        """Make a pair from factors with a leading axis B, which is left out if it is 1."""
        sides = (input_factor, grad_output_factor)
        return cls(*(side[0] if layer.groups == 1 else side for side in sides))


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
        """Whether a factor with this side is kept as its diagonal."""
        return self.max_factor_dim is not None and side > self.max_factor_dim


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter's factors are computed in: its own, at least float32."""
    return torch.promote_types(dtype, torch.float32)


def second_moment(x: Tensor, diagonal: bool) -> Tensor:
    """Return Σ_{n,s} x xᵀ `[B, d, d]`, or its diagonal `[B, d]`, of x `[B, N, S, d]`."""
    rows = x.flatten(1, 2)
    return rows.square().sum(1) if diagonal else rows.mT @ rows


def input_rows(layer: Layer, use: LayerUse, reduce: bool) -> tuple[Tensor, int]:
    """Return a layer's input in one use, `[B, N, S, d_in]`, with the constant of a joint bias.

    Args:
        layer: The layer.
        use: The use.
        reduce: Whether to average over the positions, which leaves S = 1.

    Returns:
        a, and the number S of positions before averaging.
    """
    x = use.checked_input().to(factor_dtype(layer.anchor.dtype))
    a, positions = layer_inputs(use.module, x, reduce)
    if layer.joint:
        # A module that shares W but not b adds nothing to b's side.
        constant = float(use.module._parameters.get("bias") is layer.bias)
        a = torch.cat([a, a.new_full((*a.shape[:-1], 1), constant)], dim=-1)
    return a, positions


def input_moment(layer: Layer, uses: Sequence[LayerUse], form: FactorForm) -> tuple[Tensor, int]:
    """Return Σ a aᵀ and the number of summands, over the uses of a layer in one forward pass.

    Args:
        layer: The layer.
        uses: Its uses in one forward pass.
        form: How factors are formed.

    Returns:
        The sum `[B, d_in, d_in]` (or its diagonal), and how many vectors it sums.
    """
    dtype = factor_dtype(layer.anchor.dtype)
    if layer.weight is None:
        return torch.ones(layer.groups, 1, 1, dtype=dtype, device=layer.anchor.device), 1
    rows, positions = zip(*(input_rows(layer, use, form.reduce) for use in uses), strict=True)
    if form.reduce and len({a.shape[1] for a in rows}) == 1:
        weights = [count / sum(positions) for count in positions]
        rows = (torch.stack([w * a for w, a in zip(weights, rows, strict=True)]).sum(0),)
    diagonal = form.diagonal(layer.d_in)
    moment = torch.stack([second_moment(a, diagonal) for a in rows]).sum(0)
    return moment, sum(a.shape[1] * a.shape[2] for a in rows)


def grad_output_moment(
    layer: Layer, uses: Sequence[LayerUse], grads: Sequence[Tensor], form: FactorForm
) -> Tensor:
    """Return Σ g gᵀ `[B, d_out, d_out]` (or its diagonal) over the uses of a layer.

    Args:
        layer: The layer.
        uses: Its uses in one forward pass.
        grads: For each use the gradient by the layer's output.
        form: How factors are formed.
    """
    dtype = factor_dtype(layer.anchor.dtype)
    rows = [layer_grad_outputs(use.module, g.to(dtype)) for use, g in zip(uses, grads, strict=True)]
    if form.reduce:
        rows = [g.sum(2, keepdim=True) for g in rows]
        if len({g.shape[1] for g in rows}) == 1:
            rows = [torch.stack(rows).sum(0)]
    diagonal = form.diagonal(layer.d_out)
    return torch.stack([second_moment(g, diagonal) for g in rows]).sum(0)


def fold(average: Tensor, value: Tensor, weight: Tensor, total_weight: Tensor) -> None:
    """Move a running average, in place, to include a value.

    With W ← decay · W + w, the average Σ_t decay^(T−t) w_t x_t / W is x ← x + (w / W) (x_T − x),
    which is free of bias from the first value on: it knows its own total weight. An average of a
    lower precision is rounded once, after the sum.

    Args:
        average: The average, of any shape.
        value: The new value, of the same shape.
        weight: w, a scalar.
        total_weight: W, a scalar that already includes w.
    """
    share = (weight / total_weight).to(value.dtype)
    if average.dtype == value.dtype:
        average.lerp_(value, share)
    else:
        average.copy_(torch.lerp(average.to(value.dtype), value, share))
