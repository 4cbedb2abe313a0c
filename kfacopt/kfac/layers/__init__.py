"""Layers as matrices, one file a family; what records their calls, and factors, are not here."""

from kfacopt.kfac.layers.blocks import Block as Block
from kfacopt.kfac.layers.blocks import Layer as Layer
from kfacopt.kfac.layers.finding import find_layers as find_layers
from kfacopt.kfac.layers.interface import KFAC_APPROXES as KFAC_APPROXES
from kfacopt.kfac.layers.interface import KFACApprox as KFACApprox
from kfacopt.kfac.layers.interface import LayerFamily as LayerFamily
from kfacopt.kfac.layers.linear import LinearFamily as LinearFamily
from kfacopt.kfac.layers.registry import ENTRYWISE as ENTRYWISE
from kfacopt.kfac.layers.registry import RECURRENT as RECURRENT
from kfacopt.kfac.layers.registry import Kind as Kind
from kfacopt.kfac.layers.registry import Kinds as Kinds
from kfacopt.kfac.layers.registry import all_kinds as all_kinds
from kfacopt.kfac.layers.registry import default_kinds as default_kinds
from kfacopt.kfac.layers.registry import described as described
from kfacopt.kfac.layers.registry import families_of as families_of
from kfacopt.kfac.layers.registry import is_supported as is_supported
from kfacopt.kfac.layers.registry import register_layer as register_layer
from kfacopt.kfac.layers.splitting import CONV_FACTORS as CONV_FACTORS
from kfacopt.kfac.layers.splitting import WIDE_FACTORS as WIDE_FACTORS
from kfacopt.kfac.layers.splitting import ConvFactor as ConvFactor
from kfacopt.kfac.layers.splitting import WideFactor as WideFactor
from kfacopt.kfac.layers.splitting import split as split
