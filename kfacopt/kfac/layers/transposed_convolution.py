"""`nn.ConvTranspose1d` to `3d`, as convolutions of the input spread out; other ones have a file."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Size, Tensor, nn

from kfacopt.kfac.layers.convolution import Convolution
from kfacopt.kfac.layers.interface import first_argument
from kfacopt.kfac.layers.patches import Upsampling


class TransposedConvolution(Convolution):
    """A convolution with stride 1, W turned around, of the input with zeros between its entries.

    The positions are those of the output. W `[C_in, C_out/B, *K]` is B matrices
    `[C_out/B, C_in/B K]`.
    """

    def computes(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Tell whether neither the forward pass nor what it calls is overridden."""
        own, known = (getattr(c, "_output_padding", None) for c in (type(module), kind))
        return super().computes(module, kind) and own is known

    def record(
        self, module: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor
    ) -> tuple[Upsampling, Tensor]:
        """Keep the spatial shape of the output, which the call may ask for, beside the input."""
        sizes = (module.kernel_size, module.dilation, module.groups, module.stride, module.padding)
        call = Upsampling(*sizes, tuple(output.shape[-self.dims :]))
        return call, first_argument(args, kwargs)

    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Flatten the positions of `[N, C, *O]`, in the order of the inputs: the last one first."""
        return super().grad_outputs(module, g.flip([*range(-self.dims, 0)]))

    # The layout -----------------------------------------------------------------------------------

    def matrix_shape(self, shape: Size, groups: int) -> tuple[int, int, int]:
        """Return B, C_out/B and C_in/B K of a weight, B, C_out/B and 1 of a bias."""
        if len(shape) == 1:
            return super().matrix_shape(shape, groups)
        return groups, shape[1], shape[0] // groups * prod(shape[2:])

    def to_matrix(self, tensor: Tensor, shape: Size, groups: int) -> Tensor:
        """Bring `[*lead, C_in, C_out/B, *K]` to `[*lead, B, C_out/B, C_in/B K]`."""
        if len(shape) == 1:
            return super().to_matrix(tensor, shape, groups)
        lead = tensor.shape[: tensor.ndim - len(shape)]
        split = tensor.reshape(*lead, groups, shape[0] // groups, shape[1], prod(shape[2:]))
        matrix: Tensor = split.transpose(-3, -2).flatten(-2)
        return matrix

    def from_matrix(self, matrix: Tensor, shape: Size) -> Tensor:
        """Invert `to_matrix`."""
        if len(shape) == 1:
            return super().from_matrix(matrix, shape)
        lead, groups = matrix.shape[:-3], matrix.shape[-3]
        split: Tensor = matrix.unflatten(-1, (shape[0] // groups, prod(shape[2:])))
        return split.transpose(-3, -2).reshape(*lead, *shape)
