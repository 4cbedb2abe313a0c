"""Which lines of images, at their ends, received no gradient: padding, as of spectrograms."""

from __future__ import annotations

import torch
from torch import Tensor


def inner_positions(g: Tensor) -> Tensor | None:
    """Return which positions are within the first and last line, along each axis, with a gradient.

    ReLUs and pooling leave zeros anywhere, padding whole lines at the ends. Where the outermost
    lines have gradients, nothing but these is looked at.

    Args:
        g: The gradient by a convolution's output, `[N, C, *O]`.

    Returns:
        They are `[N, *O]`; `None` stands for all.
    """
    axes = range(2, g.ndim)
    if not g.numel():
        return None
    ends = [g.select(axis, i) != 0 for axis in axes for i in (0, -1)]
    if bool(torch.stack([line.flatten(1).any(1) for line in ends]).all()):
        return None
    reached = (g != 0).any(1)
    inner = torch.ones_like(reached)
    for axis in range(1, reached.ndim):
        others = [i for i in range(1, reached.ndim) if i != axis]
        lines = reached
        for i in others:
            lines = lines.any(i, keepdim=True)
        after = lines.cumsum(axis) > 0
        before = lines.flip(axis).cumsum(axis).flip(axis) > 0
        inner &= after & before
    return inner
