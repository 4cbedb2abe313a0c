"""`nn.Conv1d` to `nn.Conv3d`: groups, positions, layout; what the kernel sees is in `patches`."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor, nn

from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.patches import (
    depthwise_moment,
    patch_moment,
    patch_sums,
    patches,
    sightings,
)
from kfacopt.linalg.gram import gram


class Convolution(LayerFamily):
    """A linear layer on patches, `[N, C/B K]` at each of the output's positions, of B groups.

    Args:
        dims: The number of spatial axes.
    """

    def __init__(self, dims: int) -> None:
        self.dims, self.datum_axes = dims, dims + 1

    def computes(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Tell whether neither the forward pass nor what it calls is overridden."""
        own, known = (getattr(c, "_conv_forward", None) for c in (type(module), kind))
        return super().computes(module, kind) and own is known

    def groups(self, module: Any) -> int:
        """Return the convolution's groups."""
        return int(module.groups)

    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Bring `[N, C, *spatial]` to patches, or their means."""
        if reduce:
            sums, positions = patch_sums(module, x)
            means = (sums / positions).unflatten(1, (module.groups, -1))
            return means.flatten(2).transpose(0, 1).unsqueeze(2), positions
        kernel_sees, dims = patches(module, x), self.dims
        positions = kernel_sees.shape[2 : 2 + dims].numel()
        # [N, C, *O, *K] -> [B, C/B K, N, O], d in the order of the weight's entries; S comes last
        # in memory, as long runs are fast to copy.
        outputs, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        grouped = kernel_sees.unflatten(1, (module.groups, -1)).permute(1, 2, *kernel, 0, *outputs)
        return grouped.flatten(3 + dims).flatten(1, 1 + dims).permute(0, 2, 3, 1), positions

    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Flatten the positions of `[N, C, *O]`."""
        g = g.unsqueeze(0) if g.ndim == self.dims + 1 else g
        positions = g.shape[2:].numel()  # N may be 0, where -1 could not be inferred
        channels = g.reshape(g.shape[0], module.groups, g.shape[1] // module.groups, positions)
        return channels.permute(1, 0, 3, 2)

    def input_moment(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Sum over the input, or its rows, not over patches, where that is possible."""
        small = depthwise_moment(module, x)
        if small is not None:
            return small
        moment = patch_moment(module, x)
        if moment is None:
            return None
        sums, positions = patch_sums(module, x)
        return moment, sums.sum(0).reshape(module.groups, -1), positions * sums.shape[0]

    def kernel_entries(self, shape: Size) -> int:
        """Return the entries of the kernel of a weight."""
        return shape[2:].numel()

    def split_moment(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Sum over the input, with how often the kernel sees each of its places; no patches."""
        groups, (sums, positions) = module.groups, patch_sums(module, x)
        count = positions * sums.shape[0]
        x, seen, padded = sightings(module, x)
        channels = self.grad_output_moment(x * seen.sqrt(), groups)
        assert channels is not None
        squares = x.square().unflatten(1, (groups, -1)).sum((0, 2)).unsqueeze(0)
        energies, _ = patch_sums(module, squares, padded)
        return channels, energies.reshape(groups, -1), sums.sum(0).reshape(groups, -1), count

    def grad_output_moment(self, g: Tensor, groups: int) -> Tensor | None:
        """Sum without a copy of g `[N, C, *O]`.

        One product for each datum; where these have more entries than g, a transposed copy is
        cheaper.
        """
        if g.ndim != self.dims + 2:
            return None
        channels: Tensor = g.unflatten(1, (groups, g.shape[1] // groups)).flatten(
            3
        )  # [N, B, C/B, S]
        if channels.shape[2] > channels.shape[3]:
            return gram(channels.permute(1, 0, 3, 2).flatten(1, 2))
        return (channels @ channels.mT).sum(0)
