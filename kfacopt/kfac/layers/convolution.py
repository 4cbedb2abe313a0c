"""`nn.Conv2d`: groups, positions and layout; what its kernel sees is in `patches`."""

from __future__ import annotations

from torch import Tensor, nn

from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.patches import patch_moment, patch_sums, patches
from kfacopt.linalg.gram import gram


class Convolution(LayerFamily):
    """A linear layer on patches, `[N, C/B KH KW]` at each of OH OW positions, of B groups."""

    kind, datum_axes = nn.Conv2d, 3

    def computes(self, module: nn.Module) -> bool:
        """Tell whether neither the forward pass nor what it calls is overridden."""
        same = getattr(type(module), "_conv_forward", None) is nn.Conv2d._conv_forward
        return super().computes(module) and same

    def groups(self, module: nn.Conv2d) -> int:
        """Return the convolution's groups."""
        return module.groups

    def inputs(self, module: nn.Conv2d, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Bring `[N, C, H, W]` to patches, or their means."""
        if reduce:
            sums, positions = patch_sums(module, x)
            means = (sums / positions).unflatten(1, (module.groups, -1))
            return means.flatten(2).transpose(0, 1).unsqueeze(2), positions
        kernel_sees = patches(module, x)
        positions = kernel_sees.shape[2] * kernel_sees.shape[3]
        # [N, C, OH, OW, KH, KW] -> [B, C/B KH KW, N, OH OW], d in the order of the weight's
        # entries; S comes last in memory, as long runs are fast to copy.
        grouped = kernel_sees.unflatten(1, (module.groups, -1)).permute(1, 2, 5, 6, 0, 3, 4)
        return grouped.flatten(5).flatten(1, 3).permute(0, 2, 3, 1), positions

    def grad_outputs(self, module: nn.Conv2d, g: Tensor) -> Tensor:
        """Flatten the positions of `[N, C, OH, OW]`."""
        g = g.unsqueeze(0) if g.ndim == 3 else g
        positions = g.shape[2:].numel()  # N may be 0, where -1 could not be inferred
        channels = g.reshape(g.shape[0], module.groups, g.shape[1] // module.groups, positions)
        return channels.permute(1, 0, 3, 2)

    def input_moment(self, module: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Sum over the rows of the input, not over patches, where the kernel moves by rows."""
        moment = patch_moment(module, x)
        if moment is None:
            return None
        sums, positions = patch_sums(module, x)
        return moment, sums.sum(0).reshape(module.groups, -1), positions * sums.shape[0]

    def grad_output_moment(self, g: Tensor, groups: int) -> Tensor | None:
        """Sum without a copy of g `[N, C, OH, OW]`.

        One product for each datum; where these have more entries than g, a transposed copy is
        cheaper.
        """
        if g.ndim != 4:
            return None
        channels: Tensor = g.unflatten(1, (groups, g.shape[1] // groups)).flatten(
            3
        )  # [N, B, C/B, S]
        if channels.shape[2] > channels.shape[3]:
            return gram(channels.permute(1, 0, 3, 2).flatten(1, 2))
        return (channels @ channels.mT).sum(0)
