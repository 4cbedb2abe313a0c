"""Which lines of images, at their ends, received no gradient: padding, as of spectrograms.

ReLUs and pooling leave zeros anywhere; padding is whole lines at the ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How many channels are looked at first: most lines have a gradient in one of them.
_FIRST = 2


def has_all_ends(g: Tensor) -> bool:
    """Tell whether the outermost lines of all data have gradients; looks at nothing but these.

    Args:
        g: The gradient by a convolution's output, `[N, C, *O]`.
    """
    return any(bool(_ends_reached(part)) for part in (g[:, :_FIRST], g))


def _ends_reached(g: Tensor) -> Tensor:
    ends = [g.select(axis, i).flatten(1) for axis in range(2, g.ndim) for i in (0, -1)]
    return torch.stack([(line != 0).any(1).all() for line in ends]).all()


def inner_positions(reached: Tensor) -> Tensor:
    """Return which positions are between the first and last line, along each axis, that count.

    Args:
        reached: Which positions `[N, *O]` received any gradient.
    """
    inner = torch.ones_like(reached)
    axes = range(1, reached.ndim)
    for axis in axes:
        lines = reached
        for other in axes:
            lines = lines if other == axis else lines.any(other, keepdim=True)
        behind_first = lines.cumsum(axis) > 0
        before_last = lines.flip(axis).cumsum(axis).flip(axis) > 0
        inner &= behind_first & before_last
    return inner
