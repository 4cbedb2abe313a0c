"""Which uses of a parameter entry by entry have data along their first axis; found by a test.

A gradient that starts at some of the data of z ends, where the first axis is the data's, in the
rows of these data alone. Each two of N data are told apart by one of the bits of their numbers: two
backward passes for each bit, from the data that have it and from those that lack it. That is done
once for each kind of uses of a parameter, in graphs of the same operations, where all have one row
for each datum; else each time, as rows may be chosen otherwise in the next batch. Where data see
each other, as through batch normalisation, nothing is certain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.added_biases import Parents
from kfacopt.kfac.capture import LayerUse, would_be_pass
from kfacopt.kfac.entry_uses import NO_AXIS, EntryUses, by_data
from kfacopt.kfac.layers.entries import EntryCall
from kfacopt.kfac.matrix_products import MatrixUse
from kfacopt.kfac.saved_tensors import where_it_can_be_read

_Kind = tuple[Any, ...]


class DataAxes:
    """Uses of parameters entry by entry whose data are known, and what was found to be such.

    Attributes:
        reasons: Why parameters have others, or none, since the last graph.
    """

    def __init__(self) -> None:
        """Start without any."""
        self.reasons: dict[Parameter, str] = {}
        self._certain: dict[Parameter, set[_Kind]] = {}

    def uses_of(
        self,
        outputs: Sequence[GradientEdge],
        values: Sequence[Tensor],
        parents: Parents,
        params: Iterable[Parameter],
        uses: Sequence[LayerUse],
        products: Iterable[MatrixUse],
        adopted: Container[Parameter] = (),
    ) -> dict[Parameter, list[MatrixUse]]:
        """Return the uses of parameters all of whose uses have data along their first axis.

        Args:
            outputs: The gradient edges of tensors z, whose graph is alive.
            values: A tensor of the shape and dtype of each z.
            parents: The graph.
            params: The parameters to look for.
            uses: The uses of layers that were recorded in this graph.
            products: Products that were found in it.
            adopted: Parameters whose axes were certain before, so that a single datum counts, too.
        """
        leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
        wanted = {p: leaves[id(p)] for p in params if id(p) in leaves}
        rows = [len(z) if z.ndim else 0 for z in values]
        if not (wanted and rows) or 0 in rows:
            return {}
        known = [use.edge.node for use in uses] + [use.edge.node for use in products]

        def look() -> dict[Parameter, list[MatrixUse] | str]:
            own = EntryUses(parents, known, rows)
            return {p: own.of(p, leaf) for p, leaf in wanted.items()}

        found: dict[Parameter, list[MatrixUse]] = {}
        for p, own in where_it_can_be_read(look).items():
            self.reasons.pop(p, None)
            if isinstance(own, str):
                self.reasons[p] = own
            elif own:
                counts = [*rows, *(len(use.input) for use in own)]
                data = min(counts)
                if data == 0 or any(count % data for count in counts):
                    self.reasons[p] = NO_AXIS
                else:
                    found[p] = by_data(own, data)
        operations = tuple(sorted(Counter(node.name() for node in parents).items()))
        self._test(outputs, values, found, adopted, operations)
        return found

    def _test(
        self,
        outputs: Sequence[GradientEdge],
        values: Sequence[Tensor],
        found: dict[Parameter, list[MatrixUse]],
        adopted: Container[Parameter],
        graph: _Kind,
    ) -> None:
        """Leave what is certain."""
        unknown: dict[int, list[Parameter]] = {}
        for p, own in list(found.items()):
            data = _data(own[0])
            known = self._certain.get(p, set())
            same = not known or any(_operations(own) == kind[0] for kind in known)
            if data == 1 and not (same and p in adopted):
                self.reasons[p] = NO_AXIS
                del found[p]
            elif data > 1 and not (
                _single_rows(own, values) and (_operations(own), graph) in known
            ):
                unknown.setdefault(data, []).append(p)
        for data, params in unknown.items():
            edges = [use.edge for p in params for use in found[p]]
            certain = _keep_apart(outputs, values, edges, data)
            for p in params:
                if all(certain[use.edge] for use in found[p]):
                    kind = (_operations(found[p]), graph)
                    self._certain.setdefault(p, set()).add(kind)
                else:
                    self.reasons[p] = NO_AXIS
                    del found[p]


def _data(use: MatrixUse) -> int:
    assert isinstance(use.call, EntryCall)
    return len(use.input) // use.call.rows


def _operations(uses: Sequence[MatrixUse]) -> _Kind:
    return tuple(sorted((use.edge.node.name(), use.input.ndim) for use in uses))


def _single_rows(uses: Sequence[MatrixUse], values: Sequence[Tensor]) -> bool:
    """Tell whether each datum has one row in all tensors, so that none can be chosen wrongly."""
    data = _data(uses[0])
    return all(len(x) == data for x in (*(use.input for use in uses), *values))


def _keep_apart(
    outputs: Sequence[GradientEdge],
    values: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    data: int,
) -> dict[GradientEdge, bool]:
    """Return at which edges the gradients of data are in rows of their own, and not all zero.

    Args:
        outputs: The gradient edges of tensors z, whose graph stays alive.
        values: A tensor of the shape and dtype of each z.
        edges: Where the gradients are looked at.
        data: How many data z has, one behind the other.
    """
    draws = Generator().manual_seed(0)
    numbers, distinct = torch.arange(data), list(dict.fromkeys(edges))
    apart, seen = dict.fromkeys(distinct, True), dict.fromkeys(distinct, False)
    for bit in range((data - 1).bit_length()):
        own = (numbers >> bit) & 1
        for starting in (own, 1 - own):
            vectors = []
            for z in values:
                v = torch.randn(data, z.numel() // data, generator=draws, dtype=torch.float64)
                vectors.append((v * starting.unsqueeze(1)).reshape(z.shape).to(z))
            with would_be_pass():
                options = {"retain_graph": True, "allow_unused": True}
                grads = torch.autograd.grad(outputs, distinct, vectors, **options)
            for edge, grad in zip(distinct, grads, strict=True):
                if grad is not None:
                    reached = (grad.reshape(data, -1) != 0).any(1).cpu()
                    seen[edge] = seen[edge] or bool(reached.any())
                    apart[edge] = apart[edge] and not bool((reached & (starting == 0)).any())
        distinct = [edge for edge in distinct if apart[edge]]
        if not distinct:
            break
    return {edge: apart[edge] and seen[edge] for edge in apart}
