"""Uses of layers by part of a batch; what is computed from them does not know of it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Generator, Tensor

from kfacopt.kfac.capture import LayerUse


def data_count(use: LayerUse) -> int | None:
    """Return N of a use's input; `None` if it is a single datum without an axis N."""
    return None if use.family.is_single(use.call, use.input) else use.input.shape[0]


def draw_subset(count: int, fraction: float, generator: Generator) -> Tensor:
    """Return indices of ⌈fraction · N⌉ of N data, each subset of that size equally probable."""
    size = math.ceil(fraction * count)
    return torch.randperm(count, generator=generator, device=generator.device)[:size]


def restricted_use(use: LayerUse, kept: Tensor) -> LayerUse:
    """Return the use of a layer by part of the data alone, whose indices are given."""
    x = use.checked_input()
    part = x[kept.to(x.device)]
    return replace(use, input=part, version=part._version)


def restricted_grad(grad: Tensor, kept: Tensor) -> Tensor:
    """Return √(N / n) g of n of N data: Σ g gᵀ is then, on average over subsets, that of all.

    Args:
        grad: g, `[N, ...]`.
        kept: Indices of the n data.
    """
    return grad[kept.to(grad.device)] * math.sqrt(grad.shape[0] / max(len(kept), 1))
