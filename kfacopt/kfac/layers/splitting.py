"""Which convolutions' A is kept by channels and positions; what that is: `linalg.split_factors`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from torch import nn

from kfacopt.kfac.layers.blocks import Layer

ConvFactor = Literal["auto", "full", "channels"]
CONV_FACTORS: tuple[ConvFactor, ...] = ("auto", "full", "channels")

# The widest A that is kept whole by "auto".
WIDEST_WHOLE = 512


def split(
    layers: Iterable[tuple[Layer, list[nn.Module]]],
    conv_factor: ConvFactor,
    max_factor_dim: int | None = None,
) -> list[tuple[Layer, list[nn.Module]]]:
    """Return layers with those split that shall be.

    Args:
        layers: The layers with their modules.
        conv_factor: `"full"` splits none, `"channels"` all that have several channels and
            positions, `"auto"` those of them that are wide, and have more channels than positions:
            of patches of an image, positions are what matters.
        max_factor_dim: With more channels, A is a diagonal.
    """
    return [(_split(layer, conv_factor, max_factor_dim), modules) for layer, modules in layers]


def _split(layer: Layer, conv_factor: ConvFactor, max_factor_dim: int | None) -> Layer:
    if conv_factor == "full" or layer.weight is None:
        return layer
    positions = layer.family.kernel_entries(layer.weight.shape)
    channels = layer.d_in // max(positions, 1)
    wide = layer.d_in > WIDEST_WHOLE and channels >= positions
    if positions < 2 or (conv_factor == "auto" and not wide):
        return layer
    if channels < 2 or (max_factor_dim is not None and channels > max_factor_dim):
        return layer
    return replace(layer, positions=positions)
