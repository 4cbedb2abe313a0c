"""Moments of split input factors from one pass's inputs; whole factors' are in `factors`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.layers import Layer
from kfacopt.linalg.split_factors import packed, packed_rows


def split_expanded(layer: Layer, use: LayerUse, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return the packed sums `[B, ...]` over data and positions of one use, and their number."""
    x = use.checked_input().to(dtype)
    channels, energies, sums, count = use.family.split_moment(use.call, x)
    constant = use.adds(layer.bias) if layer.joint else 1.0
    squares = sums.new_full((len(sums),), count * constant**2)
    return packed(channels, energies, constant * sums, squares), count


def split_rows(layer: Layer, rows: Tensor) -> Tensor:
    """Return the packed sums of rows `[B, N, S, d]`, with the constant of a joint bias."""
    return packed_rows(rows.flatten(1, 2), layer.positions, layer.joint)


def constant_beside(rows: Tensor, uses: Sequence[LayerUse], weights: Sequence[float]) -> Tensor:
    """Return rows `[B, N, S, d]` of weighted sums over uses with the constant of a joint bias."""
    bias = uses[0].layer.bias
    columns = [w * use.bias_inputs(bias, rows) for use, w in zip(uses, weights, strict=True)]
    return torch.cat([rows, torch.stack(columns).sum(0)], dim=-1)
