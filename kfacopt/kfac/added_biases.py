"""Which parameter is added to the outputs of a product, whatever views lie between."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.layers.matrix import Span
from kfacopt.kfac.parameter_views import ParameterView, is_view, parameter_behind, view_at
from kfacopt.kfac.saved_tensors import kept

_SQUEEZES = tuple(f"SqueezeBackward{number}" for number in range(5))

Parents = dict[Any, list[tuple[Any, int]]]

# Those that have an operand that is added, at place 0.
_ADDING = ("AddmmBackward0", "AddmvBackward0", "AddbmmBackward0", "BaddbmmBackward0")


def places_of_bias(
    shape: tuple[int, ...], left: bool, outputs: Span | None, groups: Span | None
) -> ParameterView:
    """Return which entry of a bias `[groups, outputs]` each entry of a product has.

    Args:
        shape: The product's, `[B, R, outputs]`, `[B, outputs, R]`, or less of it.
        left: Whether the outputs are the last axis but one, or the only one.
        outputs: Which outputs the product has, if not all.
        groups: Which groups the first axis of three has; `None` where it has none.
    """
    axis = -2 if left and len(shape) > 1 else -1
    alone = len(shape) == 1 and not left  # rows of a single output
    width = 1 if alone else shape[axis]
    strides = [0] * len(shape)
    if not alone:
        strides[axis] = 1
    total = width if outputs is None else outputs.total
    offset = 0 if outputs is None else outputs.start
    if groups is not None:
        offset += groups.start * total
        if len(shape) == 3:
            strides[0] = total
    axes = zip(shape, strides, strict=True)
    return ParameterView(offset, tuple(() if n == 1 else ((n, s),) for n, s in axes))


def added_bias(
    node: Any, parents: Parents, places: ParameterView, counts: tuple[int, int], axes: int
) -> Parameter | None:
    """Return the parameter that is added to a product, if it is one for each output.

    Args:
        node: The product.
        parents: The graph.
        places: See `places_of_bias`.
        counts: How many groups and outputs the matrix has.
        axes: How many axes the matrix has.
    """
    if node.name() in _ADDING and node.next_functions[0][0] is not None:
        if node._saved_beta != 1:
            return None
        return _fitting(node.next_functions[0], places, counts, axes)
    while len(parents[node]) == 1:
        parent, place = parents[node][0]
        if place < 0:
            return None
        if is_view(parent):
            single = len(parent._input_metadata) == 1
            moved = view_at(parent, 0, places) if single else None
            if moved is None:
                return None
            node, places = parent, moved
            continue
        if parent.name() != "AddBackward0" or parent._saved_alpha != 1:
            return None
        shape = tuple(parent._input_metadata[0].shape)
        if len(shape) < len(places.axes):
            return None
        return _fitting(parent.next_functions[1 - place], places.expanded(shape), counts, axes)
    return None


def _fitting(
    edge: tuple[Any, int], places: ParameterView, counts: tuple[int, int], axes: int
) -> Parameter | None:
    """Return the parameter that an edge leads to, if its entries are at the places wanted."""
    found = parameter_behind(*edge)
    if found is None:
        return None
    p, view = found
    if not _has_shape(p, counts, axes) or len(view.axes) > len(places.axes):
        return None
    return p if view.expanded(places.shape) == places else None


def _has_shape(p: Parameter, counts: tuple[int, int], axes: int) -> bool:
    right = p.numel() == prod(counts) and 0 < p.ndim < axes
    return right and (counts[0] == 1 or p.shape[0] == counts[0])


def routed_bias(
    node: Any, parents: Parents, rows: list[int], counts: tuple[int, int], axes: int
) -> Parameter | None:
    """Return a parameter `[groups, outputs]` of which each row gets its own group's, if any.

    Args:
        node: A grouped product.
        parents: The graph.
        rows: How many rows each group has.
        counts: How many groups and outputs the matrix has.
        axes: How many axes the matrix has.
    """
    groups = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    return gathered_bias(node, parents, groups, counts, axes)


def gathered_bias(
    node: Any, parents: Parents, groups: Tensor, counts: tuple[int, int], axes: int
) -> Parameter | None:
    """Return a parameter `[groups, outputs]` that is added as `b[index]`, to `[S, outputs]`.

    Args:
        node: A product, of which views may make `[S, outputs]`.
        parents: The graph.
        groups: The group of each s, or of the first ones, behind which nothing counts.
        counts: How many groups and outputs the matrix has.
        axes: How many axes the matrix has.
    """
    parent, place = node, 0
    while len(parents[parent]) == 1:
        node = parent
        parent, place = parents[node][0]
        if place < 0 or parent.name() not in _SQUEEZES:
            break
    if parent is node or place < 0 or parent.name() != "AddBackward0" or parent._saved_alpha != 1:
        return None
    chosen = parent.next_functions[1 - place][0]
    if chosen is None or chosen.name() != "IndexBackward0":
        return None
    found = parameter_behind(*chosen.next_functions[0])
    if found is None or found[1] != ParameterView.whole(found[0].shape):
        return None
    indices = kept(chosen, "_saved_indices")
    if indices is None or len(indices) != 1 or not isinstance(indices[0], Tensor):
        return None
    shapes = [tuple(n._input_metadata[0].shape) for n in (node, chosen)]
    index = indices[0]
    if index.ndim != 1 or shapes[0] != shapes[1] or len(shapes[0]) != 2:
        return None
    same = index.dtype is not torch.bool and torch.equal(
        index[: len(groups)].to(torch.int64), groups.to(index.device, torch.int64)
    )
    return found[0] if same and _has_shape(found[0], counts, axes) else None
