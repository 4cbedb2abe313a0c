"""Matrices that no module's call uses, as layers; how their uses are found is in `matrix_uses`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.convolution_uses import convolution_family, convolution_kind
from kfacopt.kfac.layers import Kind, Layer
from kfacopt.kfac.layers.convolution import Convolution
from kfacopt.kfac.layers.embedding import Embedding
from kfacopt.kfac.layers.entries import ENTRIES, Entries, entries_layer
from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.linear import LinearFamily
from kfacopt.kfac.layers.matrix import Matrix
from kfacopt.kfac.layers.tied import (
    HEAD,
    FunctionalEmbedding,
    functional_embedding,
    tied_embedding,
)
from kfacopt.kfac.layers.transposed_convolution import TransposedConvolution
from kfacopt.kfac.lookup_uses import EMBEDDING, TIED
from kfacopt.kfac.matrix_products import MatrixUse


@dataclass(frozen=True, eq=False)
class MatrixLayout:
    """How a matrix that no module's call uses is multiplied.

    Attributes:
        roles: As `MatrixUse` has them; `TIED` for lookups and products, `ENTRIES` for parameters
            that are multiplied or added entry by entry.
        bias: What all products with it add.
    """

    roles: str
    bias: Parameter | None

    @classmethod
    def of(cls, uses: Sequence[MatrixUse]) -> MatrixLayout:
        """Return what products have in common."""
        bias = uses[0].bias if len({id(use.bias) for use in uses}) == 1 else None
        roles = {use.roles for use in uses}
        return cls(TIED if len(roles) > 1 else roles.pop(), bias)

    def layer(self, name: str, weight: Parameter, has_bias: bool, separate: bool) -> Layer:
        """Return the layer that the matrix is.

        Args:
            name: The parameter's name.
            weight: The parameter.
            has_bias: Whether the bias, if there is one, is the layer's.
            separate: Whether W and b have blocks of their own.
        """
        if self.roles in (EMBEDDING, TIED):
            return (tied_embedding if self.is_tied else functional_embedding)(name, weight)
        if self.roles == ENTRIES:
            return entries_layer(name, weight)
        bias, family = self.bias if has_bias else None, self._family(weight)
        groups = int(self.roles[1:]) if self._is_convolution else 1
        groups = family.matrix_shape(weight.shape, groups)[0]
        return Layer(name, weight, bias, groups, bias is not None and not separate, family)

    @property
    def is_tied(self) -> bool:
        """Whether it is looked up and multiplied."""
        return self.roles == TIED

    @property
    def _is_convolution(self) -> bool:
        return self.roles[0] in "ct"

    def _family(self, weight: Parameter) -> LayerFamily:
        if self._is_convolution:
            return convolution_family(self.roles, weight)
        return Matrix(self.roles)

    def kind(self, weight: Parameter) -> Kind:
        """Return which of torch's modules does the same; of two kinds, what is most of it."""
        if self.roles == EMBEDDING:
            return nn.Embedding
        if self.roles == ENTRIES:
            return nn.Parameter
        return convolution_kind(self.roles, weight) if self._is_convolution else nn.Linear


def fits(use: MatrixUse, layer: Layer) -> bool:
    """Tell whether a product can count as a use of a layer; blocks of W and b share their G."""
    if layer.parts:
        return any(fits(use, part) for part in layer.parts)
    family = layer.family
    if use.roles == ENTRIES:
        return isinstance(family, Entries)
    if layer.bias is not None and not layer.joint and use.bias is not layer.bias:
        return False
    if use.roles == EMBEDDING:
        return type(family) in (Embedding, FunctionalEmbedding)
    if isinstance(family, Matrix):
        return family.roles == use.roles
    if type(family) in (Convolution, TransposedConvolution):
        roles = f"{'c' if type(family) is Convolution else 't'}{layer.groups}"
        return use.roles == roles and layer.weight is use.weight
    linear = type(family) is LinearFamily and use.roles == ("io" if family.inputs_first else "oi")
    return linear and layer.weight is use.weight


def becomes_tied(layer: Layer, uses: Sequence[MatrixUse]) -> bool:
    """Tell whether a layer's matrix is an embedding tied to a head, by uses past its modules."""
    roles = {use.roles for use in uses}
    if layer.parts or not roles <= {HEAD, EMBEDDING}:
        return False
    family = layer.family
    if type(family) in (Embedding, FunctionalEmbedding):
        return HEAD in roles
    linear = type(family) is LinearFamily and not family.inputs_first
    return EMBEDDING in roles and (linear or (type(family) is Matrix and family.roles == HEAD))


def as_layer_use(use: MatrixUse, layer: Layer) -> LayerUse:
    """Return a product as a use of its layer, or of a part of that."""
    part = next(part for part in layer.collected if fits(use, part))
    a, version = use.input, use.input._version
    # A product may have part of a module's matrix, or columns for data.
    own = Matrix(use.roles) if type(part.family) is LinearFamily else None
    call, edges = use.call, use.input_edges
    return LayerUse(part, None, call, a, use.edge, version, edges, None, use.bias, None, own)
