"""Products with matrices, and lookups, past the calls of their modules, found in the graph.

`F.linear`, `torch.addmm`, `x @ W`, `torch.einsum` and attention end in a node `Addmm`, `Mm`, `Bmm`
whose operand is a parameter, or a view or cast of one; it keeps the input a, and g arrives at it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.convolution_uses import CONVOLUTION, ConvolutionCall, convolution_call
from kfacopt.kfac.layers.matrix import Product, Span, by_axis
from kfacopt.kfac.layers.patches import Upsampling
from kfacopt.kfac.layers.tied import HEAD, Lookup
from kfacopt.kfac.lookup_uses import EMBEDDING, LOOKUP, lookup_call
from kfacopt.kfac.parameter_views import (
    AxisRange,
    ParameterView,
    is_view,
    parameter_behind,
    ranges_of,
    view_at,
)

# Of products L R: the operands' places among the node's inputs, and what has kept them.
_PRODUCTS = {
    "AddmmBackward0": (1, 2, "_saved_mat1", "_saved_mat2"),
    "MmBackward0": (0, 1, "_saved_self", "_saved_mat2"),
    "BmmBackward0": (0, 1, "_saved_self", "_saved_mat2"),
    "BaddbmmBackward0": (1, 2, "_saved_batch1", "_saved_batch2"),
}

Parents = dict[Any, list[tuple[Any, int]]]


@dataclass(frozen=True, eq=False)
class MatrixUse:
    """A product of rows a with a matrix, z = W a (+ b).

    Attributes:
        weight: The parameter.
        bias: The vector that is added, if it is a parameter.
        roles: Of the parameter's axes, see `Matrix`; "c" or "t" and the number of groups for
            convolutions and transposed ones; `EMBEDDING` for lookups.
        input: a `[R, d_in]`, or `[B, R, d_in]` for groups; a convolution's input; tokens.
        edge: The gradient edge of the product.
        input_edges: Those of a.
        call: Which part of the matrix it has, and where; a convolution's sizes.
    """

    weight: Parameter
    bias: Parameter | None
    roles: str
    input: Tensor
    edge: GradientEdge
    input_edges: tuple[GradientEdge, ...]
    call: Product | ConvolutionCall | Upsampling | Lookup


def matrix_uses(parents: Parents, params: Iterable[Parameter]) -> dict[Parameter, list[MatrixUse]]:
    """Return the products with matrices, for those of which a graph uses them in no other way.

    Args:
        parents: For each node of the graph, whose input it is and which one; see `graph_parents`.
        params: The parameters to look for; vectors are not found.
    """
    leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
    found = {}
    for p in params:
        leaf = leaves.get(id(p))
        uses = None if leaf is None or p.ndim < 2 else _uses_of(p, leaf, parents)
        roles = {use.roles for use in uses or ()}
        if uses and (len(roles) == 1 or roles == {HEAD, EMBEDDING}):
            found[p] = uses
    return found


def vector_uses(parents: Parents, params: Iterable[Parameter]) -> dict[Parameter, int]:
    """Return how many operations have each of some vectors, or a view or cast, as an operand."""
    leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
    found = {}
    for p in params:
        if p.ndim == 1 and id(p) in leaves:
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
    waiting: list[tuple[Any, int, ParameterView]] = [(leaf, 0, ParameterView.whole(p.shape))]
    while waiting:
        node, output_nr, view = waiting.pop()
        own = [(n, k) for n, k in parents[node] if k < 0 or n.next_functions[k][1] == output_nr]
        if not own:
            return None
        for parent, place in own:
            if place >= 0 and is_view(parent):
                for nr in _outputs_used(parent, parents):
                    seen = view_at(parent, nr, view)
                    if seen is None:
                        return None
                    waiting.append((parent, nr, seen))
                continue
            use = None
            if place >= 0 and parent.name() in _PRODUCTS:
                use = _product(p, view, parent, place, parents)
            elif place == 1 and parent.name() == CONVOLUTION:
                use = _convolution(p, view, parent)
            elif place == 0 and parent.name() == LOOKUP:
                use = _lookup(p, view, parent)
            if use is None:
                return None
            uses.append(use)
    return uses


def _outputs_used(node: Any, parents: Parents) -> set[int]:
    """Return which outputs of a node others have as an input."""
    return {n.next_functions[k][1] if k >= 0 else 0 for n, k in parents[node]}


def _product(
    p: Parameter, view: ParameterView, node: Any, place: int, parents: Parents
) -> MatrixUse | None:
    """Return a node as a product with a parameter; `None` if it is none that is known.

    Args:
        p: The parameter.
        view: Which of its entries an operand has, `[..., n, m]`.
        node: The node.
        place: Which operand.
        parents: The graph.
    """
    *places, left_name, right_name = _PRODUCTS[node.name()]
    if place not in places or getattr(node, "_saved_alpha", 1) != 1:
        return None
    left = place == places[0]
    kept = right_name if left else left_name
    a = _kept(node, kept)
    if a is None:
        return None
    operand = view.permuted([*range(len(view.axes) - 2), -1, -2]) if left else view
    layout = _layout(p, operand)
    if layout is None:
        return None
    roles, ranges, outputs, groups = layout
    inputs = [(r.axis, r.length) for r in ranges[-2]]
    a = by_axis(a.detach().mT if left else a.detach(), inputs)
    if "g" not in roles:
        a = a.reshape(-1, a.shape[-1])
    before = node.next_functions[places[1] if left else places[0]]
    edges = () if before[0] is None else (GradientEdge(*before),)
    order = tuple((r.axis, r.length) for r in ranges[-1])
    order = () if order == tuple(sorted(order)) else order
    plain = not left and "g" not in roles and not order
    bias = _bias(node, parents, p, outputs, operand.shape[-1]) if plain else None
    product = Product(left, outputs, groups, order, _has_positions(node, before[0], parents))
    return MatrixUse(p, bias, roles, a, GradientEdge(node, 0), edges, product)


def _has_positions(node: Any, before: Any, parents: Parents) -> bool:
    """Tell whether rows were flattened before a product, or have more axes behind it."""
    views = ("ViewBackward0", "UnsafeViewBackward0")
    if before is not None and before.name() in views and len(before._saved_self_sym_sizes) > 2:
        return True
    shapes = [n._input_metadata[0].shape for n, _ in parents[node] if n.name() in views]
    return any(len(shape) > 2 for shape in shapes)


def _convolution(p: Parameter, view: ParameterView, node: Any) -> MatrixUse | None:
    """Return a node as a convolution with a whole parameter; `None` if it has a part of it."""
    x = _kept(node, "_saved_input") if view == ParameterView.whole(p.shape) else None
    if x is None:
        return None
    roles, call = convolution_call(p, node)
    before = node.next_functions[0]
    edges = () if before[0] is None else (GradientEdge(*before),)
    bias = _vector(node.next_functions[2], None, node._input_metadata[0].shape[1])
    return MatrixUse(p, bias, roles, x.detach(), GradientEdge(node, 0), edges, call)


def _lookup(p: Parameter, view: ParameterView, node: Any) -> MatrixUse | None:
    """Return a node as a lookup of rows of a whole parameter; `None` if it has a part of it."""
    tokens = _kept(node, "_saved_indices") if view == ParameterView.whole(p.shape) else None
    call = lookup_call(p, node)
    if tokens is None or call is None or p.ndim != 2:
        return None
    return MatrixUse(p, None, EMBEDDING, tokens.detach(), GradientEdge(node, 0), (), call)


def _kept(node: Any, saved: str) -> Tensor | None:
    """Return a saved tensor; `None` for one that is recomputed, which may be done once alone."""
    hook = getattr(getattr(node, saved.replace("_saved_", "_raw_saved_")), "unpack_hook", None)
    if getattr(hook, "__qualname__", "").startswith("_checkpoint_hook"):
        return None
    try:
        kept: Tensor | None = getattr(node, saved)
    except RuntimeError:  # changed in place since, or its memory is gone
        return None
    return kept


def _layout(
    p: Parameter, view: ParameterView
) -> tuple[str, list[list[AxisRange]], Span | None, Span | None] | None:
    """Return the roles of a parameter's axes, ranges, and which outputs and groups a product has.

    Args:
        p: The parameter.
        view: Which of its entries the product has as `[..., d_in, outputs]`.
    """
    if len(view.axes) == 3 and all(stride == 0 for _, stride in view.axes[0]):
        view = view.selected(0, 0)
    found = ranges_of(view, p.shape)
    if found is None:
        return None
    letters = "gio" if len(found) == 3 else "io"
    roles: dict[int, str] = {r.axis: x for x, own in zip(letters, found, strict=True) for r in own}
    single = [i for i, n in enumerate(p.shape) if i not in roles]
    starts = _starts(view, p)
    for i in reversed(single):  # one index, or an axis of one entry
        if "o" not in roles.values():
            roles[i] = "o"
        elif "i" not in roles.values() and p.shape[i] == 1:
            roles[i] = "i"
        elif p.ndim > 2:
            roles[i] = "g"
        else:
            return None
    ranges = [r for own in found for r in own] + [AxisRange(i, starts[i], 1) for i in single]
    if len(found) == 3 and found[0] != sorted(found[0], key=lambda r: r.axis):
        return None
    spans: dict[str, Span | None] = {"g": None, "o": None, "i": None}
    for role in "goi":
        own = [r for r in ranges if roles[r.axis] == role]
        partial = [r for r in own if r.length != p.shape[r.axis]]
        if partial and (role == "i" or len(own) != 1):
            return None
        for r in partial:
            spans[role] = Span(r.start, r.length, p.shape[r.axis])
    return "".join(roles[i] for i in range(p.ndim)), found, spans["o"], spans["g"]


def _starts(view: ParameterView, p: Parameter) -> list[int]:
    starts, offset = [], view.offset
    for size in reversed(p.shape):
        starts.append(offset % size)
        offset //= size
    return starts[::-1]


def _bias(
    node: Any, parents: Parents, weight: Parameter, outputs: Span | None, size: int
) -> Parameter | None:
    """Return the vector that is added to a product's rows, if it is a parameter.

    Args:
        node: The product.
        parents: The graph.
        weight: The matrix.
        outputs: Which of its outputs the product has, if not all.
        size: How many.
    """
    if node.name() == "AddmmBackward0":
        return _vector(node.next_functions[0], outputs, size) if node._saved_beta == 1 else None
    if node.name() == "BaddbmmBackward0":
        return None
    while len(parents[node]) == 1:
        parent, place = parents[node][0]
        if place < 0:
            return None
        if parent.name() in ("ViewBackward0", "UnsafeViewBackward0"):
            if parent._input_metadata[0].shape[-1] != size:
                return None
            node = parent
            continue
        if parent.name() != "AddBackward0" or parent._saved_alpha != 1:
            return None
        return _vector(parent.next_functions[1 - place], outputs, size)
    return None


def _vector(edge: tuple[Any, int], outputs: Span | None, size: int) -> Parameter | None:
    """Return the vector that an edge leads to, if it has the outputs of a product."""
    found = parameter_behind(*edge)
    if found is None or found[0].ndim != 1:
        return None
    p, view = found
    *lead, last = view.axes
    start, total = (0, size) if outputs is None else (outputs.start, outputs.total)
    repeated = all(stride == 0 for parts in lead for _, stride in parts)
    own = () if size == 1 else ((size, 1),)
    fits = repeated and last == own and view.offset == start and len(p) == total
    return p if fits else None
