"""Products with matrices past the calls of their modules, found in the graph.

`F.linear(x, self.weight)`, `torch.addmm`, `x @ W`, `torch.einsum` of two operands, and what torch's
functions do within (`F.multi_head_attention_forward`) end in a node `Addmm`, `Mm` or `Bmm` whose
operand is a parameter, or a view or cast of one. The node has kept the input a; g arrives at its
output. So nobody has to watch the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.layers import Layer
from kfacopt.kfac.layers.linear import LinearFamily
from kfacopt.kfac.layers.matrix import Matrix, RowsOfOutputs

# Of products x W: the operands' places among the node's inputs, and what has kept them.
_PRODUCTS = {
    "AddmmBackward0": (1, 2, "_saved_mat1", "_saved_mat2"),
    "MmBackward0": (0, 1, "_saved_self", "_saved_mat2"),
    "BmmBackward0": (0, 1, "_saved_self", "_saved_mat2"),
}
# Nodes that hand on entries as they are, in another shape or precision.
_VIEWS = {
    f"{name}Backward{number}"
    for name in (
        *("T", "Transpose", "Permute", "Alias", "ToCopy", "View", "UnsafeView", "ReshapeAlias"),
        *("Unsqueeze", "Squeeze", "Expand", "Slice", "Split", "SplitWithSizes", "Select", "Clone"),
    )
    for number in (0, 1, 2)
}
_VECTOR_VIEWS = ("ToCopyBackward0", "ExpandBackward0")
_TURNS = {"TBackward0"}

Parents = dict[Any, list[tuple[Any, int]]]


@dataclass(frozen=True, eq=False)
class MatrixUse:
    """A product z = a W (+ b) of rows a with a matrix.

    Attributes:
        weight: The parameter.
        bias: The vector that is added, if it is a parameter.
        inputs_first: Whether W is kept as `[d_in, d_out]`.
        input: a `[R, d_in]`.
        edge: The gradient edge of the product.
        input_edges: Those of a.
        outputs: Which outputs it has, if not all.
    """

    weight: Parameter
    bias: Parameter | None
    inputs_first: bool
    input: Tensor
    edge: GradientEdge
    input_edges: tuple[GradientEdge, ...]
    outputs: RowsOfOutputs | None


def matrix_uses(parents: Parents, params: Iterable[Parameter]) -> dict[Parameter, list[MatrixUse]]:
    """Return the products with matrices, for those of which a graph uses them in no other way.

    Args:
        parents: For each node of the graph, whose input it is and which one; see `graph_parents`.
        params: The parameters to look for; only matrices are found.
    """
    leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
    found = {}
    for p in params:
        leaf = leaves.get(id(p))
        uses = None if leaf is None or p.ndim != 2 else _uses_of(p, leaf, parents)
        if uses and len({use.inputs_first for use in uses}) == 1:
            found[p] = uses
    return found


def vector_uses(parents: Parents, params: Iterable[Parameter]) -> dict[Parameter, int]:
    """Return how many operations have each of some vectors, or a cast of one, as an operand."""
    leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
    found = {}
    for p in params:
        if p.ndim == 1 and id(p) in leaves:
            waiting, found[p] = [leaves[id(p)]], 0
            for node in waiting:  # which grows
                for parent, _ in parents[node]:
                    if parent.name() in _VECTOR_VIEWS:
                        waiting.append(parent)
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
    waiting = [(leaf, False)]
    while waiting:
        node, turned = waiting.pop()
        if not parents[node]:
            return None
        for parent, place in parents[node]:
            name = parent.name()
            if name in _VIEWS:
                waiting.append((parent, turned != (name in _TURNS)))
                continue
            use = None
            if name in _PRODUCTS and place == _PRODUCTS[name][1]:
                use = _product(p, parent, turned, parents, simple=name != "BmmBackward0")
            if use is None:
                return None
            uses.append(use)
    return uses


def _product(
    p: Parameter, node: Any, turned: bool, parents: Parents, simple: bool
) -> MatrixUse | None:
    first, _, input_name, weight_name = _PRODUCTS[node.name()]
    if any(_is_recomputed(node, name) for name in (input_name, weight_name)):
        return None
    try:
        a, W = getattr(node, input_name), getattr(node, weight_name)
    except RuntimeError:  # changed in place since, or its memory is gone
        return None
    if a is None or getattr(node, "_saved_alpha", 1) != 1:
        return None
    a = a.detach()
    layout = _layout(p, a, W, turned, simple)
    if layout is None:
        return None
    inputs_first, outputs = layout
    before = node.next_functions[first]
    edges = () if before[0] is None else (GradientEdge(*before),)
    size = W.shape[-1] if W is not None else p.shape[1 if inputs_first else 0]
    bias = _bias(node, parents, size) if outputs is None else None
    return MatrixUse(p, bias, inputs_first, a, GradientEdge(node, 0), edges, outputs)


def _is_recomputed(node: Any, saved: str) -> bool:
    """Tell whether a saved tensor is recomputed when it is asked for, which may be done once."""
    hook = getattr(getattr(node, saved.replace("_saved_", "_raw_saved_")), "unpack_hook", None)
    return getattr(hook, "__qualname__", "").startswith("_checkpoint_hook")


def _layout(
    p: Parameter, a: Tensor, W: Tensor | None, turned: bool, simple: bool
) -> tuple[bool, RowsOfOutputs | None] | None:
    """Return whether p is kept as `[d_in, d_out]`, and which outputs a product has.

    Args:
        p: The parameter.
        a: The input.
        W: The operand that is p, or a view or cast of it, `[..., d_in, outputs]`, if it was kept.
        turned: Whether it is the transpose of a view of p.
        simple: Whether nothing but transposes can have changed the shape.
    """
    if W is None:  # for an input that needs no gradient the operand is not kept
        whole = simple and a.shape[-1] == p.shape[0 if not turned else 1]
        return (not turned, None) if (whole and p.shape[0] != p.shape[1]) or whole else None
    if W.ndim == 3 and W.shape[0] != 1 and W.stride(0) != 0:
        return None
    rows, columns = p.shape
    d_in, outputs = W.shape[-2:]
    strides, own = W.stride()[-2:], (columns, 1)
    if not p.is_contiguous():
        return None
    if W.dtype == p.dtype and W.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
        return None
    offset = W.storage_offset() - (p.storage_offset() if W.dtype == p.dtype else 0)
    if strides == own and (d_in, outputs) == (rows, columns) and offset == 0:
        return True, None
    if strides != own[::-1] or d_in != columns or offset % columns:
        return None
    if outputs == rows:
        return False, None
    return False, RowsOfOutputs(offset // columns, rows)


def _bias(node: Any, parents: Parents, size: int) -> Parameter | None:
    """Return the vector that is added to a product's rows, if it is a parameter."""
    if node.name() == "AddmmBackward0":
        return _vector(node.next_functions[0][0], size) if node._saved_beta == 1 else None
    while len(parents[node]) == 1:
        parent, place = parents[node][0]
        if parent.name() in ("ViewBackward0", "UnsafeViewBackward0"):
            node = parent
            continue
        if parent.name() != "AddBackward0" or parent._saved_alpha != 1:
            return None
        return _vector(parent.next_functions[1 - place][0], size)
    return None


def _vector(node: Any, size: int) -> Parameter | None:
    while node is not None and node.name() in _VECTOR_VIEWS:
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    if not isinstance(variable, Parameter) or variable.shape != torch.Size([size]):
        return None
    return variable


@dataclass(frozen=True, eq=False)
class MatrixLayout:
    """How a matrix that no module's call uses is multiplied.

    Attributes:
        inputs_first: Whether W is kept as `[d_in, d_out]`.
        bias: What all products with it add.
    """

    inputs_first: bool
    bias: Parameter | None

    @classmethod
    def of(cls, uses: Sequence[MatrixUse]) -> MatrixLayout:
        """Return what products have in common."""
        bias = uses[0].bias if len({id(use.bias) for use in uses}) == 1 else None
        return cls(uses[0].inputs_first, bias)

    def layer(self, name: str, weight: Parameter, joint: bool) -> Layer:
        """Return the layer that the matrix is.

        Args:
            name: The parameter's name.
            weight: The parameter.
            joint: Whether [W | b] is one matrix, if there is a bias.
        """
        has_bias = joint and self.bias is not None
        bias = self.bias if has_bias else None
        return Layer(name, weight, bias, 1, has_bias, Matrix(self.inputs_first))


def fits(use: MatrixUse, layer: Layer) -> bool:
    """Tell whether a product can count as a use of a layer."""
    family = layer.family
    if isinstance(family, Matrix):
        return family.inputs_first == use.inputs_first
    linear = type(family) is LinearFamily and family.inputs_first == use.inputs_first
    return linear and use.outputs is None and layer.weight is use.weight


def as_layer_use(use: MatrixUse, layer: Layer) -> LayerUse:
    """Return a product as a use of its layer."""
    a, version = use.input, use.input._version
    edges = use.input_edges
    return LayerUse(layer, None, use.outputs, a, use.edge, version, edges, None, use.bias)
