"""The families of layers that K-FAC knows; a new one is a file of its own, and named here."""

from __future__ import annotations

from torch import nn

from kfacopt.kfac.layers.convolution import Convolution
from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.linear import Linear

FAMILIES: tuple[LayerFamily, ...] = (Linear(), Convolution())
SUPPORTED_MODULES = tuple(family.kind for family in FAMILIES)


def is_supported(module: nn.Module) -> bool:
    """Tell whether a module computes what a family does; subclasses do if they override nothing."""
    return any(isinstance(module, f.kind) and f.computes(module) for f in FAMILIES)


def family_of(module: nn.Module) -> LayerFamily:
    """Return the family of a supported module."""
    return next(family for family in FAMILIES if isinstance(module, family.kind))
