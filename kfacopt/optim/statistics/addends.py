"""Terms of an objective that have no second derivative beside others that have one.

H of the sum says nothing of them: L1 beside a small mean square has the curvature of that alone.
The empirical Fisher stands in for each such term, as it does for an objective that has no other.
Not for terms that are linear in z (the targets' part of a cross entropy that is written as two
sums): these are part of what the others mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfacopt.kfac.capture import would_be_pass
from kfacopt.likelihoods.graph_products import GraphPiece
from kfacopt.likelihoods.structure import find_parts
from kfacopt.optim.statistics.objectives import FoundCurvature, retained_gradients_kept
from kfacopt.optim.watch.objectives import Objective, Piece

_SUMS = ("AddBackward0", "SubBackward0")
_FACTORS = ("MulBackward0", "DivBackward0", "NegBackward0")
_MAX_ADDENDS = 16

# Linear operations, and those that are linear in each of two operands.
_LINEAR = {
    *("Add", "Sub", "Neg", "Mean", "Sum", "View", "UnsafeView", "ReshapeAlias", "T", "Transpose"),
    *("Permute", "Squeeze", "Unsqueeze", "Expand", "Select", "Slice", "Split", "SplitWithSizes"),
    *("Unbind", "Index", "IndexSelect", "Gather", "Take", "Diagonal", "Trace", "Alias", "Clone"),
    *("ToCopy", "Stack", "Cat", "Cumsum", "NllLoss", "NllLoss2D", "AsStrided", "Repeat", "Roll"),
}
_BILINEAR = {"Mul", "Div", "Mm", "Addmm", "Bmm", "Baddbmm", "Mv", "Dot"}


def stand_ins(
    objective: Objective, upstream: Tensor, found: FoundCurvature
) -> list[FoundCurvature]:
    """Return the empirical Fisher of terms without a second derivative, each on its own.

    Args:
        objective: The objective, whose graph is alive.
        upstream: The derivative that the backward pass started with.
        found: Its curvature as a whole.
    """
    if all(part.empirical for part in found.parts):
        return []  # of all terms together
    edges = list(_addends(objective.edge))
    if not 1 < len(edges) <= _MAX_ADDENDS:
        return []
    with would_be_pass(), retained_gradients_kept(objective.passes):
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        upstreams = torch.autograd.grad([objective.edge], edges, [upstream], **options)
        pairs = zip(edges, upstreams, strict=True)
        own = [(replace(objective, edge=edge), up) for edge, up in pairs if up is not None]
        terms = [_stand_in(term.piece(), up) for term, up in own]
    return [term for term in terms if term is not None]


def _addends(edge: GradientEdge) -> Iterator[GradientEdge]:
    """Yield the terms of a sum, through factors that have no graph of their own."""
    waiting = [edge]
    while waiting:
        edge = waiting.pop()
        name = edge.node.name()
        following = edge.node.next_functions
        behind = [GradientEdge(node, number) for node, number in following if node is not None]
        if name in _SUMS or (name in _FACTORS and len(behind) == 1):
            waiting += behind
        else:
            yield edge


def _stand_in(piece: Piece, upstream: Tensor) -> FoundCurvature | None:
    if not piece.arrivals or _is_linear(piece):
        return None
    edges = [arrival.edge for arrival in piece.arrivals]
    cut = [*piece.recognised, *piece.ended, *(edge.node for edge in piece.derived)]
    graph = GraphPiece(piece.edge, edges, upstream, cut)
    numbers = [k for k, g in enumerate(graph.gradients) if g is not None]
    gradients = [g for g in graph.gradients if g is not None]
    if not numbers or not graph.is_flat():
        return None
    parts = find_parts([None] * len(numbers), gradients, None)
    return FoundCurvature(piece, numbers, gradients, parts)


def _is_linear(piece: Piece) -> bool:
    """Tell whether a term is a linear function of z, by its operations."""
    ends = {arrival.edge.node for arrival in piece.arrivals}
    waiting = [piece.edge.node]
    seen = set(waiting) | ends
    for node in waiting:  # which grows
        if node in ends:
            continue
        following = [n for n, _ in node.next_functions if n is not None]
        stem = re.sub(r"Backward\d*$", "", node.name())
        if stem not in _LINEAR and not (stem in _BILINEAR and len(following) == 1):
            return False
        new = [n for n in dict.fromkeys(following) if n not in seen]
        waiting += new
        seen.update(new)
    return True
