"""Layers as matrices, one file a family; what records their calls, and factors, are not here."""

from kfacopt.kfac.layers.blocks import Block as Block
from kfacopt.kfac.layers.blocks import Layer as Layer
from kfacopt.kfac.layers.finding import find_layers as find_layers
from kfacopt.kfac.layers.interface import KFAC_APPROXES as KFAC_APPROXES
from kfacopt.kfac.layers.interface import KFACApprox as KFACApprox
from kfacopt.kfac.layers.registry import SUPPORTED_MODULES as SUPPORTED_MODULES
from kfacopt.kfac.layers.registry import is_supported as is_supported
