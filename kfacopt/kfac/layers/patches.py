"""Patches that a convolution's kernel sees, their sums and second moments; no weights.

A patch at output row r has the input's rows r + i, i < K (for stride 1). So the block of
Σ patch patchᵀ for the kernel's rows i and j = i + δ,

    A_ij = Σ_{r < O} Y_{r+i} Y_{r+j}ᵀ = Σ_{i ≤ q < O + i} Y_q Y_{q+δ}ᵀ,

with Y_q the patches within row q of the input, is for all i the same sum but for the q near the
borders. A row is what has one index along the first spatial axis: an entry in one dimension, a
plane in three. Of a kernel K x K, Y is K instead of K² copies of the input, and the products for K²
pairs of rows shrink to those for K values of δ and a few rows. Nothing is subtracted, so that no
accuracy is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt.linalg.gram import gram


@dataclass(frozen=True)
class Upsampling:
    """A call of a transposed convolution as one of a convolution with stride 1.

    z at position p is Σ_k W_k x_i over all i s − padding + k d = p. With x spread to every s-th
    place among zeros, these are entries of a window of K entries, d apart, but from its end to its
    beginning. So that k counts as in W, the input is turned around instead, and with it the order
    of the positions.

    Attributes:
        kernel_size: K of each axis.
        dilation: d.
        groups: B.
        spread: s, the stride of the transposed convolution.
        padding: What it cuts off at the beginning of each axis.
        positions: The spatial shape of its output, which `output_padding` and `output_size` decide.
    """

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    spread: tuple[int, ...]
    padding: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def stride(self) -> tuple[int, ...]:
        """The window's own stride."""
        return (1,) * len(self.kernel_size)

    def padded(self, x: Tensor) -> Tensor:
        """Return x `[N, C, *spatial]` among zeros, turned around, as the window passes over it."""
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.spread, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in self.spread))] = x
        pads: list[int] = []
        windows = zip(self.kernel_size, self.dilation, strict=True)
        reaches = [step * (kernel - 1) for kernel, step in windows]
        axes = zip(reaches, self.padding, self.positions, sizes, strict=True)
        for reach, cut, positions, size in axes:
            before = reach - cut  # negative: the padding cuts off more than the kernel reaches
            pads = [before, positions + reach - before - size, *pads]
        return F.pad(spread, pads).flip([*range(2, x.ndim)])


_Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | Upsampling


def padded_input(module: _Convolution, x: Tensor) -> Tensor:
    """Return a convolution's input `[N, C, *spatial]` with its padding; x may lack the axis N."""
    if x.ndim == len(module.kernel_size) + 1:
        x = x.unsqueeze(0)
    if isinstance(module, Upsampling):
        return module.padded(x)
    if not any(module._reversed_padding_repeated_twice):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def _windows(module: _Convolution, x: Tensor, axis: int, dim: int) -> Tensor:
    """Return a view with `[..., O, ..., K]`: what the kernel's axis sees along a dimension."""
    kernel, dilation = module.kernel_size[axis], module.dilation[axis]
    return x.unfold(dim, dilation * (kernel - 1) + 1, module.stride[axis])[..., ::dilation]


def patches(module: _Convolution, x: Tensor) -> Tensor:
    """Return a view `[N, C, *O, *K]` of the padded input that the kernel sees."""
    x = padded_input(module, x)
    for axis in range(len(module.kernel_size)):
        x = _windows(module, x, axis, 2 + axis)
    return x


def sightings(module: _Convolution, x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return an input `[N, C, *P]`, and how often the kernel sees each of its places, `[*P]`.

    The input is padded, which is told as well, unless it is so with zeros, which are left out.

    Args:
        module: The convolution.
        x: Its input, `[N, C, *spatial]`; the axis N may lack.
    """
    dims = len(module.kernel_size)
    margins = [(0, 0)] * dims
    padded = isinstance(module, Upsampling) or module.padding_mode != "zeros"
    if isinstance(module, Upsampling) or padded:
        x = padded_input(module, x)
    else:
        x = x.unsqueeze(0) if x.ndim == dims + 1 else x
        pads = module._reversed_padding_repeated_twice
        margins = [(pads[2 * i], pads[2 * i + 1]) for i in reversed(range(dims))]
    seen = x.new_ones(())
    for axis, (before, after) in enumerate(margins):
        places = torch.arange(before + x.shape[2 + axis] + after)
        windows = _windows(module, places, axis, 0)
        counts = torch.bincount(windows.reshape(-1), minlength=len(places))
        seen = seen.unsqueeze(-1) * counts[before : len(places) - after].to(x)
    return x, seen, padded


def patch_sums(module: _Convolution, x: Tensor, padded: bool = False) -> tuple[Tensor, int]:
    """Return each datum's sum of its patches, and their number.

    The sum is taken along one axis after the other: K + 1 readings of x instead of K² for two axes.

    Args:
        module: The convolution.
        x: Its input, `[N, C, *spatial]`; the axis N may lack.
        padded: Whether it is padded already.

    Returns:
        The sums `[N, C, *K]`, and S, the number of positions.
    """
    x, positions = x if padded else padded_input(module, x), 1
    for axis in range(len(module.kernel_size)):
        rows = _windows(module, x, axis, 2)  # [N, C, O, *other spatial axes, *K so far]
        positions *= rows.shape[2]
        x = rows.sum(2)
    return x, positions


def patch_moment(module: _Convolution, x: Tensor) -> Tensor | None:
    """Return Σ patch patchᵀ over data and positions, without the patches.

    Args:
        module: The convolution, of B groups.
        x: Its input, `[N, C, *spatial]`; the axis N may lack.

    Returns:
        `[B, d, d]` with d = C/B times the entries of the kernel; `None` for a stride along the
        first axis of a kernel of several rows, and where the kernel is higher than the output.
    """
    rows, rest = module.kernel_size[0], prod(module.kernel_size[1:])
    stride, step, groups = module.stride[0], module.dilation[0], module.groups
    x = padded_input(module, x)
    height = (x.shape[2] - step * (rows - 1) - 1) // stride + 1
    if rows > 1 and (stride > 1 or step * (rows - 1) > height):
        return None
    x = x[:, :, : (height - 1) * stride + step * (rows - 1) + 1 : stride]
    others = range(1, len(module.kernel_size))
    for axis in others:
        x = _windows(module, x, axis, 2 + axis)
    # [N, C, P, *O, *K] but for the first axis -> [B, C/B K, P, N O]: long rows, fast to copy
    channels, count = x.shape[1] // groups, len(others)
    outputs, kernel = [4 + i for i in range(count)], [4 + count + i for i in range(count)]
    Y = x.unflatten(1, (groups, channels)).permute(1, 2, *kernel, 3, 0, *outputs)
    Y = Y.flatten(3 + count).flatten(1, 1 + count)
    moment: Tensor = Y.new_empty(groups, channels, rows, rest, channels, rows, rest)
    for shift in range(rows):
        for i, block in enumerate(_row_blocks(Y, shift, rows, height, step)):
            value = block.unflatten(2, (channels, rest)).unflatten(1, (channels, rest))
            moment[:, :, i, :, :, i + shift] = value
            moment[:, :, i + shift, :, :, i] = value.permute(0, 3, 4, 1, 2)
    return moment.flatten(4).flatten(1, 3)


def depthwise_moment(module: _Convolution, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Return Σ patch patchᵀ and Σ patch of a depthwise convolution from those of its small input.

    A patch is linear in the input of its channel, patch_p = S_p x, so that the sum over positions
    is Σ_p S_p (Σ_n x xᵀ) S_pᵀ: of a kernel of 7 x 7 on maps of 2 x 2 no patches of mere padding
    are formed.

    Args:
        module: The convolution, of B groups.
        x: Its input, `[N, C, *spatial]`; the axis N may lack.

    Returns:
        `[B, K, K]`, `[B, K]` and the number of patches; `None` where a group has several channels,
        or the input more entries than the kernel.
    """
    x = x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x
    size, kernel = prod(x.shape[2:]), prod(module.kernel_size)
    if x.shape[1] != module.groups or size > kernel:
        return None
    entries = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[2:])
    S = patches(module, entries).reshape(size, -1, kernel)  # [entry, position, k]
    channels = x.flatten(2).transpose(0, 1)
    images = gram(channels) @ S.flatten(1)  # [B, entry, position k]
    moment = S.flatten(0, 1).mT @ images.unflatten(2, S.shape[1:]).flatten(1, 2)
    return moment, channels.sum(1) @ S.sum(1), len(x) * S.shape[1]


def _row_blocks(Y: Tensor, shift: int, KH: int, OH: int, step: int) -> list[Tensor]:
    """Return Σ_q Y_q Y_{q + shift}ᵀ `[B, d, d]` over i ≤ q < OH + i, for every i < KH − shift.

    Args:
        Y: `[B, d, P, N OW]`.
        shift: δ = j − i, in rows of the kernel.
        KH: The rows of the kernel.
        OH: The rows of the output.
        step: The dilation, by which rows of the kernel are apart.
    """

    def product(start: int, end: int) -> Tensor:
        left = Y[:, :, start:end].flatten(2)
        if shift == 0:
            return gram(left.mT)
        return left @ Y[:, :, start + shift * step : end + shift * step].flatten(2).mT

    last = KH - 1 - shift
    common = product(last * step, OH)
    above = [product(k * step, (k + 1) * step) for k in range(last)]
    below = [product(OH + k * step, OH + (k + 1) * step) for k in range(last)]
    zero = torch.zeros_like(common)
    from_above = [*accumulate(above[::-1], initial=zero)][::-1]  # Σ_{k ≥ i}
    from_below = [*accumulate(below, initial=zero)]  # Σ_{k < i}
    return [common + a + b for a, b in zip(from_above, from_below, strict=True)]
