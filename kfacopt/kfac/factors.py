"""From one pass's a and g to A and G, and how averages over time move; not who keeps them.

For the loss L = Σ_t ω_t ℓ_t and vectors v that carry √ω (see `kfacopt.likelihoods`):

    expand:  A = 1/(N S) Σ_{n,s} a aᵀ,  G = Σ_{n,v,s} g gᵀ
    reduce:  A = 1/N Σ_n ā āᵀ, ā = mean_s a,  G = Σ_{n,v} ĝ ĝᵀ, ĝ = Σ_s g

Several uses of a layer within one forward pass are further positions s. Positions that the loss
does not depend on (ignored labels, padding that an attention mask leaves out) have g = 0 for all v.
They count neither in A nor in N, S or the means; convolutions, some of whose positions pooling
leaves out, count all.

References:
    Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636, Eqs. 16 and 22.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.layers import KFACApprox, Layer
from kfacopt.kfac.layers.sparse_rows import SparseRows, side_by_side
from kfacopt.linalg.gram import gram


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
        """Whether a factor with this side is too wide to be kept but as its diagonal."""
        return self.max_factor_dim is not None and side > self.max_factor_dim

    def diagonals(self, layer: Layer) -> tuple[bool, bool]:
        """Whether a layer's A, and its G, are kept as their diagonals."""
        A = layer.diagonal_input or self.diagonal(layer.d_in)
        return A, layer.family.elementwise or self.diagonal(layer.d_out)

    def shapes(self, layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of a layer's A and G."""
        B, sides = layer.groups, (layer.d_in, layer.d_out)
        A, G = (
            (B, side) if diagonal else (B, side, side)
            for side, diagonal in zip(sides, self.diagonals(layer), strict=True)
        )
        return A, G


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter's factors are computed in: its own, at least float32."""
    return torch.promote_types(dtype, torch.float32)


def second_moment(x: Tensor, diagonal: bool) -> Tensor:
    """Return Σ_{n,s} x xᵀ `[B, d, d]`, or its diagonal `[B, d]`, of x `[B, N, S, d]`."""
    rows = x.flatten(1, 2)
    return rows.square().sum(1) if diagonal else gram(rows)


def _total(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum(0)


def bordered(put: Callable[[Tensor], object], sums: Tensor, count: int, constant: float) -> Tensor:
    """Return Σ x xᵀ `[B, d + 1, d + 1]` of vectors x = (a, c) from that of a.

    Args:
        put: Writes Σ a aᵀ into a view `[B, d, d]` of the result, which spares a copy.
        sums: Σ a, `[B, d]`.
        count: How many vectors are summed.
        constant: c.
    """
    B, d = sums.shape
    out = sums.new_empty(B, d + 1, d + 1)
    put(out[:, :d, :d])
    corner = sums.new_full((B, 1), count * constant**2)
    border = torch.cat([constant * sums, corner], dim=-1)
    out[:, d], out[:, :, d] = border, border
    return out


def input_rows(layer: Layer, use: LayerUse) -> Tensor:
    """Return a layer's input in one use, `[B, N, S, d_in]`, with the constant of a joint bias."""
    a, _ = use.inputs(factor_dtype(layer.anchor.dtype))
    if layer.joint:
        a = torch.cat([a, use.bias_inputs(layer.bias, a)], dim=-1)
    return a


class CountedPositions:
    """Which positions of uses some gradient arrived at, of all vectors v."""

    def __init__(self) -> None:
        self._of: dict[LayerUse, Tensor] = {}

    def add(self, use: LayerUse, rows: Tensor) -> None:
        """Take note of a use's gradients g `[B, N, S, d_out]`."""
        family = use.family
        if use.constants is not None or family.elementwise or family.counts_all_positions:
            return  # positions of derivatives belong together; entries have no A
        if rows.numel():
            found = rows.abs().amax(-1).ne(0).any(0)  # far faster than `any` on the last axis
            known = self._of.get(use)
            self._of[use] = found if known is None else known | found

    def of(self, uses: Sequence[LayerUse]) -> list[Tensor] | None:
        """Return which positions `[N, S]` of each use count; `None` if all do."""
        found = [self._of.get(use) for use in uses]
        masks = [mask for mask in found if mask is not None]
        if len(masks) < len(found) or not masks:
            return None
        return None if all(bool(mask.all()) for mask in masks) else masks


def _counted_moment(
    layer: Layer, uses: Sequence[LayerUse], masks: Sequence[Tensor], reduce: bool, diagonal: bool
) -> tuple[Tensor, int]:
    """Return Σ a aᵀ over some positions, or over the means of each datum's, and their number.

    Args:
        layer: The layer.
        uses: Its uses in one forward pass.
        masks: For each use which positions count, `[N, S]`.
        reduce: Whether to average over the positions.
        diagonal: Whether the sum's diagonal alone is wanted.
    """
    rows = [input_rows(layer, use) for use in uses]
    masks = [m.expand(a.shape[1:3]) for a, m in zip(rows, masks, strict=True)]
    if not reduce:
        kept = torch.cat([a[:, m] for a, m in zip(rows, masks, strict=True)], dim=1)
    else:
        if len({len(m) for m in masks}) == 1:
            rows, masks = [torch.cat(rows, dim=2)], [torch.cat(list(masks), dim=1)]
        means = [
            (a * m.unsqueeze(-1)).sum(2)[:, m.any(1)] / m.sum(1)[m.any(1)].unsqueeze(-1)
            for a, m in zip(rows, masks, strict=True)
        ]
        kept = torch.cat(means, dim=1)
    return second_moment(kept.unsqueeze(2), diagonal), kept.shape[1]


def _expanded_moment(layer: Layer, use: LayerUse, diagonal: bool) -> tuple[Tensor, int]:
    """Return Σ a aᵀ over data and positions of one use, and the number of summands."""
    dtype = factor_dtype(layer.anchor.dtype)
    known = None if diagonal else use.family.input_moment(use.call, use.checked_input().to(dtype))
    if known is None:
        return _rows_moment(layer, use.inputs(dtype)[0], diagonal, [use], [1.0])
    moment, sums, count = known
    if layer.joint:
        moment = bordered(lambda view: view.copy_(moment), sums, count, use.adds(layer.bias))
    return moment, count


def _rows_moment(
    layer: Layer, a: Tensor, diagonal: bool, uses: Sequence[LayerUse], weights: Sequence[float]
) -> tuple[Tensor, int]:
    """Return Σ a aᵀ of rows `[B, N, S, d]` that are weighted sums over uses, and their number."""
    count = a.shape[1] * a.shape[2]
    if not layer.joint:
        return second_moment(a, diagonal), count
    if any(use.constants is not None for use in uses):  # not the same at all positions
        columns = [w * u.bias_inputs(layer.bias, a) for u, w in zip(uses, weights, strict=True)]
        return second_moment(torch.cat([a, _total(columns)], dim=-1), diagonal), count
    constant = sum(w * u.adds(layer.bias) for u, w in zip(uses, weights, strict=True))
    if diagonal:
        squares = second_moment(a, True)
        corner = squares.new_full((len(squares), 1), count * constant**2)
        return torch.cat([squares, corner], dim=-1), count
    return bordered(partial(gram, a.flatten(1, 2)), a.sum((1, 2)), count, constant), count


def sparse_rows(uses: Sequence[LayerUse]) -> list[SparseRows]:
    """Return a layer's inputs by their entries, those of the same data as one; else nothing."""
    found = [rows for rows in (use.sparse_inputs() for use in uses) if rows is not None]
    if found and len({rows.shape[0] for rows in found}) == 1:
        return [side_by_side(found)]
    return found


def input_moment(
    layer: Layer,
    uses: Sequence[LayerUse],
    form: FactorForm,
    masks: Sequence[Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Return Σ a aᵀ and the number of summands, over the uses of a layer in one forward pass.

    Args:
        layer: The layer.
        uses: Its uses.
        form: How factors are formed.
        masks: For each use which positions `[N, S]` count, if not all.

    Returns:
        The sum `[B, d_in, d_in]` (or its diagonal), and how many vectors it sums.

    Raises:
        NotImplementedError: If the positions of derivatives by the input, where a bias does not
            act, would count in a bias's own block.
    """
    dtype = factor_dtype(layer.anchor.dtype)
    if layer.weight is None or layer.family.elementwise:
        return torch.ones(form.shapes(layer)[0], dtype=dtype, device=layer.anchor.device), 1
    derivatives = any(use.constants is not None for use in uses)
    if derivatives and layer.bias is not None and not layer.joint:
        raise NotImplementedError(
            f"layer {layer.name!r}: W and b have G in common, and b does not act on derivatives by "
            "the input (input_derivatives); set separate_weight_and_bias=False."
        )
    diagonal, _ = form.diagonals(layer)
    sparse = sparse_rows(uses) if layer.diagonal_input else []
    if masks is not None:
        if not sparse:
            return _counted_moment(layer, uses, masks, form.reduce, diagonal)
        masks = [torch.cat(list(masks), dim=1)] if len(sparse) == 1 else masks
        kept = [rows.counted(m, form.reduce) for rows, m in zip(sparse, masks, strict=True)]
        return _total([r.squares(form.reduce)[0] for r, _ in kept]), sum(n for _, n in kept)
    if sparse:
        squares = [rows.squares(form.reduce) for rows in sparse]
        return _total([values for values, _ in squares]), sum(count for _, count in squares)
    if not form.reduce and len(uses) > 1 and all(use.module is None for use in uses):
        # Products of a loop, few rows each: one sum over all of them.
        rows = torch.cat([input_rows(layer, use).flatten(1, 2) for use in uses], 1)
        return second_moment(rows.unsqueeze(2), diagonal), rows.shape[1]
    if not form.reduce:
        moments = [_expanded_moment(layer, use, diagonal) for use in uses]
    else:
        means = [use.inputs(dtype, reduce=True) for use in uses]
        if len({a.shape[1] for a, _ in means}) == 1:
            total = sum(positions for _, positions in means)
            weights = [positions / total for _, positions in means]
            rows = _total([w * a for w, (a, _) in zip(weights, means, strict=True)])
            return _rows_moment(layer, rows, diagonal, uses, weights)
        moments = [
            _rows_moment(layer, a, diagonal, [use], [1.0])
            for use, (a, _) in zip(uses, means, strict=True)
        ]
    return _total([moment for moment, _ in moments]), sum(count for _, count in moments)


def elementwise_moment(layer: Layer, uses: Sequence[LayerUse], grads: Sequence[Tensor]) -> Tensor:
    """Return Σ_n (Σ_s g a)² `[B, 1]`, over the uses of a layer of B blocks of one entry.

    Args:
        layer: The layer.
        uses: Its uses in one forward pass; one datum's gradient is the sum over all of them.
        grads: For each use the gradient by the layer's output.
    """
    dtype = factor_dtype(layer.anchor.dtype)
    gradients = [
        (use.grad_rows(g.to(dtype)) * use.inputs(dtype)[0]).sum(2)
        for use, g in zip(uses, grads, strict=True)
    ]
    if len({x.shape[1] for x in gradients}) == 1:  # else the uses have no data in common
        gradients = [_total(gradients)]
    return _total([x.square().sum(1) for x in gradients])


def grad_output_moment(
    layer: Layer, uses: Sequence[LayerUse], grads: Sequence[Tensor], form: FactorForm
) -> Tensor:
    """Return Σ g gᵀ `[B, d_out, d_out]` (or its diagonal), of a gradient for each of some uses."""
    if layer.family.elementwise:
        return elementwise_moment(layer, uses, grads)
    dtype, (_, diagonal) = factor_dtype(layer.anchor.dtype), form.diagonals(layer)
    grads = [g.to(dtype) for g in grads]
    if layer.weight is None:  # a bias acts on values alone, not on derivatives by the input
        pairs = zip(uses, grads, strict=True)
        grads = [g if u.constants is None else g * u.constants.to(g)[:, None] for u, g in pairs]
    if form.reduce:
        rows = [use.grad_rows(g).sum(2, keepdim=True) for use, g in zip(uses, grads, strict=True)]
        if len({g.shape[1] for g in rows}) == 1:
            rows = [_total(rows)]
        return _total([second_moment(g, diagonal) for g in rows])
    if len(uses) > 1 and all(use.module is None for use in uses):
        rows = [use.grad_rows(g).flatten(1, 2) for use, g in zip(uses, grads, strict=True)]
        return second_moment(torch.cat(rows, 1).unsqueeze(2), diagonal)
    moments = []
    for use, g in zip(uses, grads, strict=True):
        known = None if diagonal else use.family.grad_output_moment(g, layer.groups)
        moments.append(second_moment(use.grad_rows(g), diagonal) if known is None else known)
    return _total(moments)


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
