"""Products and lookups past the calls of their modules: all uses that a graph makes of a matrix.

Which node is which product is in `matrix_products`; here parameters, views and casts of them are
followed to the nodes whose operands they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.added_biases import Parents
from kfacopt.kfac.layers.tied import HEAD
from kfacopt.kfac.lookup_uses import EMBEDDING
from kfacopt.kfac.matrix_products import MatrixUse, gathered_index, products_at
from kfacopt.kfac.parameter_views import ParameterView, is_view, view_at
from kfacopt.kfac.saved_tensors import where_it_can_be_read


def matrix_uses(parents: Parents, params: Iterable[Parameter]) -> dict[Parameter, list[MatrixUse]]:
    """Return products with matrices, and lookups, for those that a graph uses in no other way.

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
            roles = {use.roles for use in uses or ()}
            if uses and (len(roles) == 1 or roles == {HEAD, EMBEDDING}):
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
    """Return all uses of a matrix; `None` if one of them is no product or lookup."""
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
