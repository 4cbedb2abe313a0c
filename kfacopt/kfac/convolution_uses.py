"""Convolutions past the calls of their modules, found in the graph; products have another file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from kfacopt.kfac.layers.convolution import Convolution
from kfacopt.kfac.layers.patches import Upsampling
from kfacopt.kfac.layers.transposed_convolution import TransposedConvolution

CONVOLUTION = "ConvolutionBackward0"

_KINDS = {
    ("c", 1): nn.Conv1d,
    ("c", 2): nn.Conv2d,
    ("c", 3): nn.Conv3d,
    ("t", 1): nn.ConvTranspose1d,
    ("t", 2): nn.ConvTranspose2d,
    ("t", 3): nn.ConvTranspose3d,
}


@dataclass(frozen=True)
class ConvolutionCall:
    """One call of `F.conv1d` to `F.conv3d`: what `patches` asks of a module.

    Attributes:
        kernel_size: K of each axis.
        stride: That of the window.
        padding: How many zeros are before and behind each axis.
        dilation: How far apart the window's entries are.
        groups: B.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"

    @property
    def _reversed_padding_repeated_twice(self) -> list[int]:
        return [n for n in reversed(self.padding) for _ in range(2)]


def convolution_call(p: Parameter, node: Any) -> tuple[str, ConvolutionCall | Upsampling]:
    """Return what a node computes with a whole parameter: its roles, and its sizes.

    Args:
        p: W.
        node: A node of the name `CONVOLUTION`.
    """
    sizes = (node._saved_stride, node._saved_padding, node._saved_dilation)
    stride, padding, dilation = (tuple(int(n) for n in size) for size in sizes)
    groups, kernel = int(node._saved_groups), tuple(p.shape[2:])
    if node._saved_transposed:
        positions = tuple(node._input_metadata[0].shape[2:])
        return f"t{groups}", Upsampling(kernel, dilation, groups, stride, padding, positions)
    return f"c{groups}", ConvolutionCall(kernel, stride, padding, dilation, groups)


def convolution_family(roles: str, weight: Tensor) -> Convolution:
    """Return the family of a weight `[C_out, C_in/B, *K]`, or `[C_in, C_out/B, *K]`."""
    kind = TransposedConvolution if roles.startswith("t") else Convolution
    return kind(weight.ndim - 2)


def convolution_kind(roles: str, weight: Tensor) -> type[nn.Module]:
    """Return which of torch's modules does the same."""
    return _KINDS[roles[0], weight.ndim - 2]
