"""Which wide factors are kept in a cheaper form; the forms are in `linalg`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from torch import nn

from kfacopt.kfac.layers.blocks import Layer
from kfacopt.linalg.low_rank import rank_beside

ConvFactor = Literal["auto", "full", "channels"]
CONV_FACTORS: tuple[ConvFactor, ...] = ("auto", "full", "channels")

WideFactor = Literal["auto", "full", "low_rank"]
WIDE_FACTORS: tuple[WideFactor, ...] = ("auto", "full", "low_rank")

# The widest side that is kept whole by "auto".
WIDEST_WHOLE = 512

# The narrowest side that "auto" keeps as a low rank.
LEAST_WIDE = 512


def split(
    layers: Iterable[tuple[Layer, list[nn.Module]]],
    conv_factor: ConvFactor,
    wide_factor: WideFactor,
    max_factor_dim: int | None = None,
) -> list[tuple[Layer, list[nn.Module]]]:
    """Return layers with the forms that their factors shall have.

    Args:
        layers: The layers with their modules.
        conv_factor: `"full"` splits none, `"channels"` all that have several channels and
            positions, `"auto"` those of them that are wide, and have more channels than positions:
            of patches of an image, positions are what matters.
        wide_factor: `"full"` keeps all sides whole that are not split, `"low_rank"` keeps them as a
            low rank plus a diagonal, `"auto"` those of them that are wide.
        max_factor_dim: With more channels, or a wider side, it is a diagonal.
    """
    return [
        (
            _low_rank(_split(layer, conv_factor, max_factor_dim), wide_factor, max_factor_dim),
            modules,
        )
        for layer, modules in layers
    ]


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


def _low_rank(layer: Layer, wide_factor: WideFactor, max_factor_dim: int | None) -> Layer:
    family = layer.family
    if wide_factor == "full" or layer.weight is None or layer.parts:
        return layer
    if family.routed or family.elementwise or layer.diagonal_input:
        return layer
    widest = max_factor_dim or max(layer.d_in, layer.d_out)

    def rank(side: int, other: int, counted: int) -> int:
        wide = side <= widest and (wide_factor == "low_rank" or counted >= LEAST_WIDE)
        return rank_beside(side, other) if wide else 0

    ranks = (
        0 if layer.positions else rank(layer.d_in, layer.d_out, layer.d_in - int(layer.joint)),
        rank(layer.d_out, layer.d_in, layer.d_out),
    )
    return replace(layer, ranks=ranks) if any(ranks) else layer
