"""From one pass's a and g to A and G, and how averages over time move; not who keeps them.

For the loss L = Σ_t ω_t ℓ_t and vectors v that carry √ω (see `kfacopt.likelihoods`):

    expand:  A = 1/(N S) Σ_{n,s} a aᵀ,  G = Σ_{n,v,s} g gᵀ
    reduce:  A = 1/N Σ_n ā āᵀ, ā = mean_s a,  G = Σ_{n,v} ĝ ĝᵀ, ĝ = Σ_s g

Several uses of a layer within one forward pass are further positions s.

References:
    Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636, Eqs. 16 and 22.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.factor_forms import FactorForm, Kept
from kfacopt.kfac.layers import Layer
from kfacopt.kfac.layers.sparse_rows import SparseRows, side_by_side
from kfacopt.kfac.split_moments import constant_beside, split_expanded, split_rows
from kfacopt.linalg.gram import gram
from kfacopt.linalg.low_rank import sketch


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter's factors are computed in: its own, at least float32."""
    return torch.promote_types(dtype, torch.float32)


def second_moment(x: Tensor, kept: Kept) -> Tensor:
    """Return what is kept of Σ_{n,s} x xᵀ `[B, d, d]`, of x `[B, N, S, d]`."""
    rows = x.flatten(1, 2)
    if kept.diagonal:
        return rows.square().sum(1)
    return sketch(rows, kept.rank) if kept.rank else gram(rows)


def _inputs_moment(layer: Layer, a: Tensor, kept: Kept) -> Tensor:
    """Return Σ_{n,s} a aᵀ of a layer's inputs, with the constant of a joint bias, as it is kept."""
    return split_rows(layer, a) if layer.positions else second_moment(a, kept)


def _total(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum(0)


def of_all_groups(layer: Layer, uses: Sequence[LayerUse], values: Sequence[Tensor]) -> Tensor:
    """Return the sum `[B, ...]` over uses of values for the groups that each has."""
    if not layer.family.routed:
        return _total(values)
    total = values[0].new_zeros(layer.groups, *values[0].shape[1:])
    for use, value in zip(uses, values, strict=True):
        total[use.groups or slice(None)] += value
    return total


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


def _live_rows(layer: Layer, use: LayerUse) -> Tensor:
    """Return the rows `[B, R, d_in]` that A has, with the constant of a joint bias."""
    rows = input_rows(layer, use).flatten(1, 2)
    return rows if use.live is None else rows[:, use.live.flatten()]


def _with_live_data(use: LayerUse) -> LayerUse | None:
    """Return a use of the data that count, if all rows of a datum do or none (stochastic depth).

    No rows need to be formed to be left out then.
    """
    live, x = use.live, use.checked_input()
    assert live is not None
    if use.module is None or use.call is not use.module or live.device.type != "cpu":
        return None
    if len(live) != len(x) or use.family.is_single(use.call, x):
        return None
    data = live.any(1)
    if not torch.equal(live, data.unsqueeze(1).expand_as(live)):
        return None
    own = x[data]
    return replace(use, input=own, version=own._version, live=None)


def _expanded_moment(layer: Layer, use: LayerUse, kept: Kept) -> tuple[Tensor, int | Tensor]:
    """Return Σ a aᵀ over data and positions of one use, and the number of summands."""
    if use.live is not None and use.family.routed:
        rows = input_rows(layer, use) * use.live.unsqueeze(-1)
        return second_moment(rows, kept), use.live.sum((1, 2))
    if use.live is not None:
        whole_data = _with_live_data(use)
        if whole_data is not None:
            return _expanded_moment(layer, whole_data, kept)
        rows = _live_rows(layer, use).unsqueeze(2)
        return _inputs_moment(layer, rows, kept), rows.shape[1]
    dtype = factor_dtype(layer.anchor.dtype)
    if layer.positions:
        return split_expanded(layer, use, dtype)
    known = None
    if kept.whole:
        known = use.family.input_moment(use.call, use.checked_input().to(dtype))
    if known is None:
        return _rows_moment(layer, use.inputs(dtype)[0], kept, [use], [1.0])
    moment, sums, count = known
    if layer.joint:
        moment = bordered(lambda view: view.copy_(moment), sums, count, use.adds(layer.bias))
    return moment, count


def _rows_moment(
    layer: Layer, a: Tensor, kept: Kept, uses: Sequence[LayerUse], weights: Sequence[float]
) -> tuple[Tensor, int]:
    """Return Σ a aᵀ of rows `[B, N, S, d]` that are weighted sums over uses, and their number."""
    count = a.shape[1] * a.shape[2]
    if not layer.joint:
        return _inputs_moment(layer, a, kept), count
    if layer.positions:
        return split_rows(layer, constant_beside(a, uses, weights)), count
    if any(use.constants is not None for use in uses):  # not the same at all positions
        columns = [w * u.bias_inputs(layer.bias, a) for u, w in zip(uses, weights, strict=True)]
        return second_moment(torch.cat([a, _total(columns)], dim=-1), kept), count
    constant = sum(w * u.adds(layer.bias) for u, w in zip(uses, weights, strict=True))
    if kept.rank:
        return sketch(a.flatten(1, 2), kept.rank, constant), count
    if kept.diagonal:
        squares = second_moment(a, kept)
        corner = squares.new_full((len(squares), 1), count * constant**2)
        return torch.cat([squares, corner], dim=-1), count
    return bordered(partial(gram, a.flatten(1, 2)), a.sum((1, 2)), count, constant), count


def _live_means_moments(
    layer: Layer, uses: Sequence[LayerUse], kept: Kept
) -> list[tuple[Tensor, int]]:
    """Return Σ_n ā āᵀ and how many n have any a, with means over the positions that count."""
    pairs = []
    for use in uses:
        a = input_rows(layer, use)
        live = a.new_ones(a.shape[1:3]) if use.live is None else use.live.to(a)
        pairs.append(((a * live.unsqueeze(-1)).sum(2), live.sum(1)))
    if len({len(count) for _, count in pairs}) == 1:
        sums, counts = zip(*pairs, strict=True)
        pairs = [(_total(sums), _total(counts))]
    moments = []
    for total, count in pairs:
        some = count > 0
        means = (total[:, some] / count[some].unsqueeze(-1)).unsqueeze(2)
        moments.append((_inputs_moment(layer, means, kept), means.shape[1]))
    return moments


def sparse_rows(uses: Sequence[LayerUse], counted: Sequence[Tensor | None]) -> list[SparseRows]:
    """Return a layer's inputs by their entries, those of the same data as one; else nothing.

    Args:
        uses: The layer's uses.
        counted: Which rows of each are told, if not all.
    """
    found = []
    for use, own in zip(uses, counted, strict=True):
        rows = use.sparse_inputs()
        live = use.live if use.live is None or own is None else use.live & own
        live = own if live is None else live
        if rows is not None:
            found.append(rows if live is None else rows.at(live))
    if found and len({rows.shape[0] for rows in found}) == 1:
        return [side_by_side(found)]
    return found


def input_moment(
    layer: Layer, uses: Sequence[LayerUse], form: FactorForm
) -> tuple[Tensor, int | Tensor]:
    """Return Σ a aᵀ and the number of summands, over the uses of a layer in one forward pass.

    Returns:
        The sum `[B, d_in, d_in]` (or its diagonal), and how many vectors it sums; `[B]` where
        groups have counts of their own.

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
    kept, _ = form.kept(layer)
    sparse: list[SparseRows] = []
    if layer.diagonal_input:
        sparse = sparse_rows(uses, [use.counted(form.reduce) for use in uses])
    if sparse:
        squares = [rows.squares(form.reduce) for rows in sparse]
        return _total([values for values, _ in squares]), sum(count for _, count in squares)
    loop = len(uses) > 1 and all(use.module is None for use in uses)
    if loop and not (form.reduce or layer.family.routed):
        # Products of a loop, few rows each: one sum over all of them.
        rows = torch.cat([_live_rows(layer, use) for use in uses], 1)
        return _inputs_moment(layer, rows.unsqueeze(2), kept), rows.shape[1]
    moments: Sequence[tuple[Tensor, int | Tensor]]
    if not form.reduce or layer.family.routed:
        moments = [_expanded_moment(layer, use, kept) for use in uses]
    elif any(use.live is not None for use in uses):
        moments = _live_means_moments(layer, uses, kept)
    else:
        means = [use.inputs(dtype, reduce=True) for use in uses]
        if len({a.shape[1] for a, _ in means}) == 1:
            total = sum(positions for _, positions in means)
            weights = [positions / total for _, positions in means]
            rows = _total([w * a for w, (a, _) in zip(weights, means, strict=True)])
            return _rows_moment(layer, rows, kept, uses, weights)
        moments = [
            _rows_moment(layer, a, kept, [use], [1.0])
            for use, (a, _) in zip(uses, means, strict=True)
        ]
    summed = of_all_groups(layer, uses, [moment for moment, _ in moments])
    if not layer.family.routed:
        return summed, sum(count for _, count in moments)
    counts = [moment.new_ones(len(moment)) * count for moment, count in moments]
    return summed, of_all_groups(layer, uses, counts)


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


def _counted_rows(use: LayerUse, g: Tensor, reduce: bool) -> Tensor:
    """Return g as rows `[B, N, S, d_out]`, 0 where W does not act."""
    rows, counted = use.grad_rows(g), use.counted(reduce)
    return rows if counted is None else rows * counted.unsqueeze(-1)


def grad_output_moment(
    layer: Layer, uses: Sequence[LayerUse], grads: Sequence[Tensor], form: FactorForm
) -> Tensor:
    """Return Σ g gᵀ `[B, d_out, d_out]` (or its diagonal), of a gradient for each of some uses."""
    if layer.family.elementwise:
        return elementwise_moment(layer, uses, grads)
    dtype, (_, kept) = factor_dtype(layer.anchor.dtype), form.kept(layer)
    grads = [g.to(dtype) for g in grads]
    if layer.weight is None:  # a bias acts on values alone, not on derivatives by the input
        pairs = zip(uses, grads, strict=True)
        grads = [g if u.constants is None else g * u.constants.to(g)[:, None] for u, g in pairs]
    if form.reduce and not layer.family.routed:
        pairs = zip(uses, grads, strict=True)
        rows = [_counted_rows(use, g, True).sum(2, keepdim=True) for use, g in pairs]
        if len({g.shape[1] for g in rows}) == 1:
            rows = [_total(rows)]
        return _total([second_moment(g, kept) for g in rows])
    loop = len(uses) > 1 and all(use.module is None for use in uses)
    if loop and not layer.family.routed:
        pairs = zip(uses, grads, strict=True)
        rows = [_counted_rows(use, g, False).flatten(1, 2) for use, g in pairs]
        return second_moment(torch.cat(rows, 1).unsqueeze(2), kept)
    moments = []
    for use, g in zip(uses, grads, strict=True):
        known = use.family.grad_output_moment(g, layer.groups) if kept.whole else None
        own = second_moment(_counted_rows(use, g, False), kept) if known is None else known
        moments.append(own)
    return of_all_groups(layer, uses, moments)


def along(numbers: Tensor, value: Tensor) -> Tensor:
    """Return a number, or one for each group `[B]`, to be multiplied with values `[B, ...]`."""
    return numbers.reshape(-1, *(1,) * (value.ndim - 1)) if numbers.ndim else numbers


def mean_input(total: Tensor, count: int | Tensor) -> Tensor:
    """Return A from Σ a aᵀ `[B, ...]`, in its memory, and the number of summands (`[B]`)."""
    if isinstance(count, Tensor):
        return total.div_(along(count.clamp(min=1), total))
    return total.div_(max(count, 1))


def fold(average: Tensor, value: Tensor, weight: Tensor, total_weight: Tensor) -> None:
    """Move a running average, in place, to include a value.

    With W ← decay · W + w, the average Σ_t decay^(T−t) w_t x_t / W is x ← x + (w / W) (x_T − x),
    which is free of bias from the first value on: it knows its own total weight. An average of a
    lower precision is rounded once, after the sum.

    Args:
        average: The average, of any shape.
        value: The new value, of the same shape.
        weight: w, a scalar, or one for each group.
        total_weight: W, which already includes w.
    """
    share = along(weight / total_weight, value).to(value.dtype)
    if average.dtype == value.dtype:
        average.lerp_(value, share)
    else:
        average.copy_(torch.lerp(average.to(value.dtype), value, share))
