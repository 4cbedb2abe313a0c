"""Patches that a convolution's kernel sees, their sums and second moments; no weights.

A patch at output row r has the input's rows r + i, i < KH (for stride 1). So the block of
Σ patch patchᵀ for the kernel's rows i and j = i + δ,

    A_ij = Σ_{r < OH} Y_{r+i} Y_{r+j}ᵀ = Σ_{i ≤ q < OH + i} Y_q Y_{q+δ}ᵀ,

with Y_q the patches within row q of the input, is for all i the same sum but for the q near the
borders. Y is KW instead of KH KW copies of the input, and the products for KH² pairs of rows shrink
to those for KH values of δ and a few rows. Nothing is subtracted, so that no accuracy is lost.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt.linalg.gram import gram


def padded_input(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Return a convolution's input `[N, C, H, W]` with its padding; the axis N may lack in x."""
    if x.ndim == 3:
        x = x.unsqueeze(0)
    if not any(module._reversed_padding_repeated_twice):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def _windows(module: nn.Conv2d, x: Tensor, axis: int, dim: int) -> Tensor:
    """Return a view with `[..., O, ..., K]`: what the kernel's axis sees along a dimension."""
    kernel, dilation = module.kernel_size[axis], module.dilation[axis]
    return x.unfold(dim, dilation * (kernel - 1) + 1, module.stride[axis])[..., ::dilation]


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Return a view `[N, C, OH, OW, KH, KW]` of the padded input that the kernel sees."""
    return _windows(module, _windows(module, padded_input(module, x), 0, 2), 1, 3)


def patch_sums(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    """Return each datum's sum of its patches, and their number.

    The sum is taken along one axis after the other: KH + 1 readings of x instead of KH KW.

    Args:
        module: The convolution.
        x: Its input, `[N, C, H, W]`; the axis N may lack.

    Returns:
        The sums `[N, C, KH, KW]`, and S = OH OW.
    """
    rows = _windows(module, padded_input(module, x), 0, 2)  # [N, C, OH, W, KH]
    columns = _windows(module, rows.sum(2), 1, 2)  # [N, C, OW, KH, KW]
    return columns.sum(2), rows.shape[2] * columns.shape[2]


def patch_moment(module: nn.Conv2d, x: Tensor) -> Tensor | None:
    """Return Σ patch patchᵀ over data and positions, without the patches.

    Args:
        module: The convolution, of B groups.
        x: Its input, `[N, C, H, W]`; the axis N may lack.

    Returns:
        `[B, d, d]` with d = C/B KH KW; `None` for a stride along the height of a kernel of several
        rows, and where the kernel is higher than the output.
    """
    (KH, KW), groups = module.kernel_size, module.groups
    stride, step = module.stride[0], module.dilation[0]
    x = padded_input(module, x)
    OH = (x.shape[2] - step * (KH - 1) - 1) // stride + 1
    if KH > 1 and (stride > 1 or step * (KH - 1) > OH):
        return None
    x = x[:, :, : (OH - 1) * stride + step * (KH - 1) + 1 : stride]
    # [N, C, P, OW, KW] -> [B, C/B KW, P, N OW]: long rows, which are fast to copy
    Y = (
        _windows(module, x, 1, 3)
        .unflatten(1, (groups, x.shape[1] // groups))
        .permute(1, 2, 5, 3, 0, 4)
    )
    Y = Y.flatten(4).flatten(1, 2)
    channels = x.shape[1] // groups
    moment: Tensor = Y.new_empty(groups, channels, KH, KW, channels, KH, KW)
    for shift in range(KH):
        for i, block in enumerate(_row_blocks(Y, shift, KH, OH, step)):
            value = block.unflatten(2, (channels, KW)).unflatten(1, (channels, KW))
            moment[:, :, i, :, :, i + shift] = value
            moment[:, :, i + shift, :, :, i] = value.permute(0, 3, 4, 1, 2)
    return moment.flatten(4).flatten(1, 3)


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
