"""Statistics under DDP: what is captured is local and averaged over ranks here, not over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from kfacopt.kfac.factor_forms import FactorForm
from kfacopt.kfac.factors import factor_dtype
from kfacopt.kfac.layers import Block, Layer
from kfacopt.optim.statistics.moments import Moments


def average_moments(
    pending: dict[Layer, Moments],
    layers: Sequence[Layer],
    form: FactorForm,
    group: dist.ProcessGroup,
) -> dict[Layer, Moments]:
    """Combine the statistics of all ranks, second moments excepted.

    DDP's gradient is that of the mean of the ranks' objectives, whose G is the mean of theirs; A
    is the mean over all ranks' inputs. Every rank sends the same tensors, whatever it has reached,
    in one all-reduce for each dtype.

    Args:
        pending: This rank's statistics.
        layers: All layers, in the same order on every rank.
        form: How factors are formed.
        group: The process group.

    Returns:
        The same statistics on every rank.
    """
    by_dtype: dict[torch.dtype, list[tuple[Layer, list[Tensor]]]] = {}
    for layer in layers:
        dtype, device = factor_dtype(layer.anchor.dtype), layer.anchor.device
        own = pending.get(layer, Moments())
        pieces = []
        sums = (own.input_sum, own.grad_output_sum)
        for value, shape in zip(sums, form.shapes(layer), strict=True):
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            pieces.append(zeros + value)
        counts = torch.zeros(form.count_shape(layer), dtype=dtype, device=device)
        pieces += [counts + own.rows, torch.as_tensor(own.terms, dtype=dtype, device=device)]
        by_dtype.setdefault(dtype, []).append((layer, pieces))
    result: dict[Layer, Moments] = {}
    for entries in by_dtype.values():
        flat = torch.cat([piece.reshape(-1) for _, pieces in entries for piece in pieces])
        dist.all_reduce(flat, group=group)
        split = iter(flat.split([p.numel() for _, pieces in entries for p in pieces]))
        summed = [
            tuple(next(split).reshape(piece.shape) for piece in pieces) for _, pieces in entries
        ]
        totals = torch.stack([rows.sum() for _, _, rows, _ in summed]).tolist()  # asks once
        for (layer, _), (A, G, counts, terms), total in zip(entries, summed, totals, strict=True):
            if total > 0:
                rows = counts if layer.family.routed else int(total)
                mean, own = G / dist.get_world_size(group), pending.get(layer, Moments())
                corrections = (own.second_moments, own.unprojected)
                result[layer] = Moments(A, rows, mean, terms, *corrections)
    return result


def average_second_moments(
    values: Mapping[Block, Tensor], blocks: Sequence[Block], group: dist.ProcessGroup
) -> dict[Block, Tensor]:
    """Return the mean over all ranks of second moments, in eigenbases that they have in common.

    Args:
        values: This rank's Λ `[B, d_out, d_in]` of the blocks that it has reached.
        blocks: The blocks, in the same order on every rank.
        group: The process group.
    """
    result: dict[Block, Tensor] = {}
    for block in blocks:
        shape = (block.layer.groups, block.layer.d_out, block.d_in)
        dtype, device = factor_dtype(block.anchor.dtype), block.anchor.device
        value = torch.zeros(shape, dtype=dtype, device=device) + values.get(block, 0.0)
        dist.all_reduce(value, group=group)
        result[block] = value / dist.get_world_size(group)
    return result
