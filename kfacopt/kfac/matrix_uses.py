"""Products with matrices past the calls of their modules: all uses that a graph makes of one.

Which node is which product is in `matrix_products`; here parameters, views and casts of them are
followed to the nodes whose operands they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.added_biases import Parents
from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.convolution_uses import convolution_family, convolution_kind
from kfacopt.kfac.layers import Layer
from kfacopt.kfac.layers.convolution import Convolution
from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.linear import LinearFamily
from kfacopt.kfac.layers.matrix import Matrix
from kfacopt.kfac.layers.transposed_convolution import TransposedConvolution
from kfacopt.kfac.matrix_products import MatrixUse, gathered_index, products_at
from kfacopt.kfac.parameter_views import ParameterView, is_view, view_at
from kfacopt.kfac.saved_tensors import where_it_can_be_read


def matrix_uses(parents: Parents, params: Iterable[Parameter]) -> dict[Parameter, list[MatrixUse]]:
    """Return the products with matrices, for those of which a graph uses them in no other way.

    Args:
        parents: For each node of the graph, whose input it is and which one; see `graph_parents`.
        params: The parameters to look for; vectors are not found.
    """
    leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
    wanted = {p: leaves[id(p)] for p in params if p.ndim > 1 and id(p) in leaves}

    def look() -> dict[Parameter, list[MatrixUse]]:
        found = {}
        for p, leaf in wanted.items():
            uses = _uses_of(p, leaf, parents)
            if uses and len({use.roles for use in uses}) == 1:
                found[p] = uses
        return found

    return where_it_can_be_read(look)


def operand_uses(parents: Parents, params: Iterable[Parameter]) -> dict[Parameter, int]:
    """Return how many operations have each of some biases, or a view or cast, as an operand."""
    leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
    found = {}
    for p in params:
        if id(p) in leaves:
            waiting, found[p] = [leaves[id(p)]], 0
            for node in waiting:  # which grows
                for parent, place in parents[node]:
                    if place >= 0 and is_view(parent):
                        waiting += [] if parent in waiting else [parent]
                    else:
                        found[p] += 1
    return found


def graph_parents(edges: Iterable[GradientEdge], behind: dict[Any, list[Any]]) -> Parents:
    """Walk through a graph without a backward pass.

    Args:
        edges: Where it starts.
        behind: Nodes at which the walk goes on elsewhere: at the inputs of recorded uses.
    """
    waiting = list(dict.fromkeys(edge.node for edge in edges))
    parents: Parents = {node: [] for node in waiting}
    while waiting:
        node = waiting.pop()
        known = behind.get(node)
        pairs = (
            [(n, -1) for n in known]
            if known is not None
            else [(n, k) for k, (n, _) in enumerate(node.next_functions) if n is not None]
        )
        for n, k in pairs:
            if n not in parents:
                parents[n] = []
                waiting.append(n)
            parents[n].append((node, k))
    return parents


def _uses_of(p: Parameter, leaf: Any, parents: Parents) -> list[MatrixUse] | None:
    """Return all uses of a matrix; `None` if one of them is no product."""
    uses: list[MatrixUse] = []
    whole = ParameterView.whole(p.shape)
    waiting: list[tuple[Any, int, ParameterView, Tensor | None]] = [(leaf, 0, whole, None)]
    while waiting:
        node, output_nr, view, gathered = waiting.pop()
        own = [(n, k) for n, k in parents[node] if k < 0 or n.next_functions[k][1] == output_nr]
        if not own:
            return None
        for parent, place in own:
            if place >= 0 and is_view(parent):
                for nr in _outputs_used(parent, parents):
                    seen = view_at(parent, nr, view)
                    if seen is None:
                        return None
                    waiting.append((parent, nr, seen, gathered))
                continue
            index = gathered_index(parent) if place == 0 and gathered is None else None
            if index is not None and p.ndim > 2 and view.axes[:1] == whole.axes[:1] != ((),):
                waiting.append((parent, 0, view.gathered(len(index)), index))
                continue
            found = products_at(p, view, parent, place, parents, gathered)
            if found is None:
                return None
            uses += found
    return uses


def _outputs_used(node: Any, parents: Parents) -> set[int]:
    """Return which outputs of a node others have as an input."""
    return {n.next_functions[k][1] if k >= 0 else 0 for n, k in parents[node]}


@dataclass(frozen=True, eq=False)
class MatrixLayout:
    """How a matrix that no module's call uses is multiplied.

    Attributes:
        roles: As `MatrixUse` has them.
        bias: What all products with it add.
    """

    roles: str
    bias: Parameter | None

    @classmethod
    def of(cls, uses: Sequence[MatrixUse]) -> MatrixLayout:
        """Return what products have in common."""
        bias = uses[0].bias if len({id(use.bias) for use in uses}) == 1 else None
        return cls(uses[0].roles, bias)

    def layer(self, name: str, weight: Parameter, has_bias: bool, separate: bool) -> Layer:
        """Return the layer that the matrix is.

        Args:
            name: The parameter's name.
            weight: The parameter.
            has_bias: Whether the bias, if there is one, is the layer's.
            separate: Whether W and b have blocks of their own.
        """
        bias, family = self.bias if has_bias else None, self._family(weight)
        groups = int(self.roles[1:]) if self._is_convolution else 1
        groups = family.matrix_shape(weight.shape, groups)[0]
        return Layer(name, weight, bias, groups, bias is not None and not separate, family)

    @property
    def _is_convolution(self) -> bool:
        return self.roles[0] in "ct"

    def _family(self, weight: Parameter) -> LayerFamily:
        if self._is_convolution:
            return convolution_family(self.roles, weight)
        return Matrix(self.roles)

    def kind(self, weight: Parameter) -> type[nn.Module]:
        """Return which of torch's modules does the same."""
        return convolution_kind(self.roles, weight) if self._is_convolution else nn.Linear


def fits(use: MatrixUse, layer: Layer) -> bool:
    """Tell whether a product can count as a use of a layer; blocks of W and b share their G."""
    family = layer.family
    if layer.bias is not None and not layer.joint and use.bias is not layer.bias:
        return False
    if isinstance(family, Matrix):
        return family.roles == use.roles
    if type(family) in (Convolution, TransposedConvolution):
        roles = f"{'c' if type(family) is Convolution else 't'}{layer.groups}"
        return use.roles == roles and layer.weight is use.weight
    linear = type(family) is LinearFamily and use.roles == ("io" if family.inputs_first else "oi")
    return linear and layer.weight is use.weight


def as_layer_use(use: MatrixUse, layer: Layer) -> LayerUse:
    """Return a product as a use of its layer."""
    a, version = use.input, use.input._version
    # A product may have part of a module's matrix, or columns for data.
    own = Matrix(use.roles) if isinstance(layer.family, LinearFamily) else None
    call, edges = use.call, use.input_edges
    return LayerUse(layer, None, call, a, use.edge, version, edges, None, use.bias, None, own)
