"""From a node of autograd's graph to the product with a parameter that it is; not how it is used.

`F.linear`, `torch.addmm`, `x @ W`, `torch.einsum` and attention end in a node `Addmm`, `Mm`, `Bmm`,
`F.bilinear` in `Trilinear`, experts in `GroupedMm`; each keeps the input a, and g arrives at it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.added_biases import (
    Parents,
    added_bias,
    gathered_bias,
    places_of_bias,
    routed_bias,
)
from kfacopt.kfac.convolution_uses import CONVOLUTION, ConvolutionCall, convolution_call
from kfacopt.kfac.layers.entries import EntryCall
from kfacopt.kfac.layers.matrix import Product, Span, by_axis
from kfacopt.kfac.layers.patches import Upsampling
from kfacopt.kfac.layers.tied import Lookup
from kfacopt.kfac.lookup_uses import EMBEDDING, LOOKUP, lookup_call
from kfacopt.kfac.parameter_views import (
    AxisRange,
    ParameterView,
    joined,
    parameter_behind,
    ranges_of,
)
from kfacopt.kfac.saved_tensors import kept

# Of products L R: the operands' places among the node's inputs, and what has kept them.
PRODUCTS = {
    "AddmmBackward0": (1, 2, "_saved_mat1", "_saved_mat2"),
    "MmBackward0": (0, 1, "_saved_self", "_saved_mat2"),
    "MvBackward0": (0, 1, "_saved_self", "_saved_vec"),
    "AddmvBackward0": (1, 2, "_saved_mat", "_saved_vec"),
    "BmmBackward0": (0, 1, "_saved_self", "_saved_mat2"),
    "BaddbmmBackward0": (1, 2, "_saved_batch1", "_saved_batch2"),
    "AddbmmBackward0": (1, 2, "_saved_batch1", "_saved_batch2"),
}
_SUMMED, _GROUPED, _BILINEAR = "AddbmmBackward0", "GroupedMmBackward0", "TrilinearBackward0"


@dataclass(frozen=True, eq=False)
class MatrixUse:
    """A product of rows a with a matrix, z = W a (+ b).

    Attributes:
        weight: The parameter.
        bias: What is added, if it is a parameter with an entry for each output.
        roles: Of the parameter's axes, see `Matrix`; "c" or "t" and the number of groups for
            convolutions and transposed ones; `EMBEDDING` for lookups; `ENTRIES` for what has the
            parameter's entries, which is in `entry_uses`.
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
    call: Product | ConvolutionCall | Upsampling | Lookup | EntryCall


def products_at(
    p: Parameter,
    view: ParameterView,
    node: Any,
    place: int,
    parents: Parents,
    gathered: Tensor | None,
) -> list[MatrixUse] | None:
    """Return what a node computes with a parameter, as products; `None` if it is anything else.

    Args:
        p: The parameter.
        view: Which of its entries an operand has.
        node: The node.
        place: Which operand.
        parents: The graph.
        gathered: Which index of the parameter's first axis each of the operand's has, if it is
            `p[index]`.
    """
    name = node.name()
    if place < 0:
        return None
    if gathered is not None:
        known = name in ("BmmBackward0", "BaddbmmBackward0")
        return _gathered(p, view, node, place, parents, gathered) if known else None
    if name == _GROUPED:
        return _grouped(p, view, node, parents) if place == 1 else None
    use = None
    if name in PRODUCTS:
        use = _product(p, view, node, place, parents)
    elif name == _BILINEAR and place == 1:
        use = _bilinear(p, view, node, parents)
    elif name == CONVOLUTION and place == 1:
        use = _convolution(p, view, node)
    elif name == LOOKUP and place == 0:
        use = _lookup(p, view, node)
    return None if use is None else [use]


@dataclass(frozen=True)
class _Layout:
    """Which part of a parameter a product has.

    Attributes:
        roles: Of its axes.
        ranges: Of each axis of the operand `[..., d_in, outputs]`.
        outputs: Which outputs, if not all.
        inputs: Which inputs, if not all.
        groups: Which groups, if not all.
        counts: How many groups and outputs the parameter has.
    """

    roles: str
    ranges: list[list[AxisRange]]
    outputs: Span | None
    inputs: Span | None
    groups: Span | None
    counts: tuple[int, int]

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """The parameter's axes that the outputs have, if in another order than it has them."""
        order = tuple((r.axis, r.length) for r in self.ranges[-1])
        return () if order == tuple(sorted(order)) else order

    def rows(self, a: Tensor) -> Tensor:
        """Bring the last axis of rows into the order of the parameter's axes."""
        return by_axis(a, [(r.axis, r.length) for r in self.ranges[-2]])

    @property
    def all_groups(self) -> Span | None:
        """Which groups a product has; `None` where there are none."""
        if "g" not in self.roles:
            return None
        return self.groups or Span(0, self.counts[0], self.counts[0])


def _edges(node: Any, *places: int) -> tuple[GradientEdge, ...]:
    before = [node.next_functions[place] for place in places]
    return tuple(GradientEdge(*edge) for edge in before if edge[0] is not None)


def _product(
    p: Parameter, view: ParameterView, node: Any, place: int, parents: Parents
) -> MatrixUse | None:
    """Return a node as a product L R with a parameter; `None` if it is none that is known."""
    *places, left_name, right_name = PRODUCTS[node.name()]
    if place not in places:
        return None
    left = place == places[0]
    a = kept(node, right_name if left else left_name)
    if a is None:
        return None
    a = a.detach()
    if len(view.axes) == 1:  # of X w
        view = ParameterView(view.offset, (*view.axes, ()))
    a = a.unsqueeze(-1) if a.ndim == 1 else a  # of W v
    operand = view.permuted([*range(len(view.axes) - 2), -1, -2]) if left else view
    a = a.mT if left else a
    if node.name() == _SUMMED:  # over the first axis, which makes its inputs part of the others
        operand = ParameterView(operand.offset, (joined(operand.axes[:2]), operand.axes[2]))
        a = a.transpose(0, 1).flatten(1)
    layout = _layout(p, operand)
    if layout is None:
        return None
    a = layout.rows(a)
    if "g" not in layout.roles:
        a = a.reshape(-1, a.shape[-1])
    alpha = getattr(node, "_saved_alpha", 1)
    a = a if alpha == 1 else a * alpha
    before = node.next_functions[places[1] if left else places[0]][0]
    positions = _has_positions(node, before, parents)
    order = layout.order
    groups, outputs, inputs = layout.groups, layout.outputs, layout.inputs
    product = Product(left, outputs, inputs, groups, None, order, positions)
    bias = None if order else _bias(p, layout, node, parents, left)
    edges = _edges(node, places[1] if left else places[0])
    return MatrixUse(p, bias, layout.roles, a, GradientEdge(node, 0), edges, product)


def _bias(
    p: Parameter, layout: _Layout, node: Any, parents: Parents, left: bool
) -> Parameter | None:
    shape = tuple(node._input_metadata[0].shape)
    places = places_of_bias(shape, left, layout.outputs, layout.all_groups)
    return added_bias(node, parents, places, layout.counts, p.ndim)


def _bilinear(p: Parameter, view: ParameterView, node: Any, parents: Parents) -> MatrixUse | None:
    """Return `F.bilinear` as a product of W `[d_out, d_1 · d_2]` with the products x₁ ⊗ x₂."""
    expanded = (node._saved_expand1, node._saved_expand2, node._saved_expand3)
    if expanded != ((1, 3), (0,), (1, 2)) or node._saved_sumdim != (2, 3):
        return None
    outputs, first, second = view.axes
    layout = _layout(p, ParameterView(view.offset, (joined((first, second)), outputs)))
    x, y = kept(node, "_saved_i1"), kept(node, "_saved_i3")
    if layout is None or layout.order or x is None or y is None:
        return None
    a = layout.rows((x.detach().unsqueeze(2) * y.detach().unsqueeze(1)).flatten(1))
    befores = (node.next_functions[0][0], node.next_functions[2][0])
    positions = any(_has_positions(node, before, parents) for before in befores)
    product = Product(outputs=layout.outputs, inputs=layout.inputs, positions=positions)
    bias = _bias(p, layout, node, parents, False)
    edges = _edges(node, 0, 2)
    return MatrixUse(p, bias, layout.roles, a, GradientEdge(node, 0), edges, product)


def _grouped(
    p: Parameter, view: ParameterView, node: Any, parents: Parents
) -> list[MatrixUse] | None:
    """Return `torch._grouped_mm` of rows and a matrix for each group: a use for each with rows."""
    offsets, a = kept(node, "_saved_offs"), kept(node, "_saved_self")
    if offsets is None or a is None or a.ndim != 2 or len(view.axes) != 3:
        return None
    layout = _layout(p, view)
    groups = None if layout is None else layout.all_groups
    if layout is None or groups is None or layout.order or groups.length != len(offsets):
        return None
    ends = [int(n) for n in offsets.tolist()]
    starts = [0, *ends[:-1]]
    rows = [end - start for start, end in zip(starts, ends, strict=True)]
    bias = None
    if groups.length == groups.total:
        bias = routed_bias(node, parents, rows, layout.counts, p.ndim)
    a, edges, edge = layout.rows(a.detach()), _edges(node, 0), GradientEdge(node, 0)
    whole = Product(outputs=layout.outputs, inputs=layout.inputs)
    uses = []
    for i, (start, count) in enumerate(zip(starts, rows, strict=True)):
        if count:
            own = Span(groups.start + i, 1, groups.total)
            product = replace(whole, groups=own, rows=Span(start, count, ends[-1]))
            part = a[start : start + count]
            uses.append(MatrixUse(p, bias, layout.roles, part, edge, edges, product))
    return uses


def _gathered(
    p: Parameter, view: ParameterView, node: Any, place: int, parents: Parents, index: Tensor
) -> list[MatrixUse] | None:
    """Return a product `[S, ., .]` with a matrix for each s: a use for each matrix that has any."""
    *places, left_name, right_name = PRODUCTS[node.name()]
    if place not in places or len(view.axes) != 3 or any(stride for _, stride in view.axes[0]):
        return None
    left = place == places[0]
    a = kept(node, right_name if left else left_name)
    operand = view.selected(0, 0)
    layout = _layout(p, operand.permuted([1, 0]) if left else operand)
    if a is None or layout is None or layout.roles[0] != "g" or "g" in layout.roles[1:]:
        return None
    if layout.order or getattr(node, "_saved_alpha", 1) != 1:
        return None
    a = layout.rows(a.detach().mT if left else a.detach())
    bias = gathered_bias(node, parents, index, layout.counts, p.ndim)
    edges, edge = _edges(node, places[1] if left else places[0]), GradientEdge(node, 0)
    whole = Product(left, layout.outputs, layout.inputs)
    uses = []
    for e in sorted(set(index.tolist())):
        chosen = (index == e).nonzero()[:, 0]
        product = replace(whole, groups=Span(e % len(p), 1, len(p)), chosen=chosen)
        rows = a[chosen].flatten(0, 1)
        uses.append(MatrixUse(p, bias, layout.roles, rows, edge, edges, product))
    return uses


def gathered_index(node: Any) -> Tensor | None:
    """Return the index `[S]` of a node that is `p[index]`; `None` for any other."""
    if node.name() != "IndexBackward0":
        return None
    indices = kept(node, "_saved_indices")
    if indices is None or len(indices) != 1 or not isinstance(indices[0], Tensor):
        return None
    index = indices[0]
    return (
        index
        if index.ndim == 1 and len(index) and index.dtype in (torch.int32, torch.int64)
        else None
    )


def _has_positions(node: Any, before: Any, parents: Parents) -> bool:
    """Tell whether rows were flattened before a product, or have more axes behind it."""
    views = ("ViewBackward0", "UnsafeViewBackward0")
    if before is not None and before.name() in views and len(before._saved_self_sym_sizes) > 2:
        return True
    shapes = [n._input_metadata[0].shape for n, _ in parents[node] if n.name() in views]
    return any(len(shape) > 2 for shape in shapes)


def _convolution(p: Parameter, view: ParameterView, node: Any) -> MatrixUse | None:
    """Return a node as a convolution with a whole parameter; `None` if it has a part of it."""
    x = kept(node, "_saved_input") if view == ParameterView.whole(p.shape) else None
    if x is None:
        return None
    roles, call = convolution_call(p, node)
    bias, found = None, parameter_behind(*node.next_functions[2])
    if found is not None and found[1] == ParameterView.whole(node._input_metadata[0].shape[1:2]):
        bias = found[0] if found[0].ndim == 1 and len(found[0]) == found[1].shape[0] else None
    return MatrixUse(p, bias, roles, x.detach(), GradientEdge(node, 0), _edges(node, 0), call)


def _lookup(p: Parameter, view: ParameterView, node: Any) -> MatrixUse | None:
    """Return a node as a lookup of rows of a whole parameter; `None` if it has a part of it."""
    whole = p.ndim == 2 and view == ParameterView.whole(p.shape)
    call = lookup_call(p, node) if whole else None
    tokens = None if call is None else kept(node, "_saved_indices")
    if call is None or tokens is None:
        return None
    return MatrixUse(p, None, EMBEDDING, tokens.detach(), GradientEdge(node, 0), (), call)


def _layout(p: Parameter, view: ParameterView) -> _Layout | None:
    """Return which part of a parameter a product has; `None` if it is none of a matrix.

    Args:
        p: The parameter.
        view: Which of its entries the product has as `[..., d_in, outputs]`.
    """
    expanded = len(view.axes) == 3 and all(stride == 0 for _, stride in view.axes[0])
    repeated = expanded and view.shape[0] > 1
    if expanded:
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
        elif "i" not in roles.values() and (p.shape[i] == 1 or p.ndim == 2):
            roles[i] = "i"
        elif p.ndim > 2 and not repeated:
            roles[i] = "g"
        else:
            return None
    ranges = [r for own in found for r in own] + [AxisRange(i, starts[i], 1) for i in single]
    if len(found) == 3 and found[0] != sorted(found[0], key=lambda r: r.axis):
        return None
    spans: dict[str, Span | None] = {"g": None, "o": None, "i": None}
    sizes = {"g": 1, "o": 1, "i": 1}
    for role in "goi":
        own = [r for r in ranges if roles[r.axis] == role]
        partial = [r for r in own if r.length != p.shape[r.axis]]
        if partial and len(own) != 1:
            return None
        for r in own:
            sizes[role] *= p.shape[r.axis]
        for r in partial:
            spans[role] = Span(r.start, r.length, p.shape[r.axis])
    letters = "".join(roles[i] for i in range(p.ndim))
    return _Layout(letters, found, spans["o"], spans["i"], spans["g"], (sizes["g"], sizes["o"]))


def _starts(view: ParameterView, p: Parameter) -> list[int]:
    starts, offset = [], view.offset
    for size in reversed(p.shape):
        starts.append(offset % size)
        offset //= size
    return starts[::-1]
