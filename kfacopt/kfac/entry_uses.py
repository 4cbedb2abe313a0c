"""Uses of parameters entry by entry in the graph: what they multiply, or are added to, has data.

Which axis is the data's the graph does not tell: `t * W` looks like `t * x`. It is tested in
`kfacopt.kfac.data_axes`; here is what may be such a use at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.added_biases import Parents
from kfacopt.kfac.convolution_uses import CONVOLUTION
from kfacopt.kfac.entry_functions import FUNCTIONS
from kfacopt.kfac.layers.entries import ENTRIES, EntryCall
from kfacopt.kfac.lookup_uses import LOOKUP
from kfacopt.kfac.matrix_products import PRODUCTS, MatrixUse
from kfacopt.kfac.parameter_views import ParameterView, is_view, view_at
from kfacopt.kfac.saved_tensors import kept

NO_AXIS = "no data axis is known where it is multiplied or added"

_SUMS, _PRODUCT, _QUOTIENT = ("AddBackward0", "SubBackward0"), "MulBackward0", "DivBackward0"
_BINARY = (*_SUMS, _PRODUCT, _QUOTIENT)
# Of products, convolutions and normalisations: which operand is added, or scales what is normal.
_INNER = {
    **dict.fromkeys(("AddmmBackward0", "AddmvBackward0", "BaddbmmBackward0"), (0,)),
    CONVOLUTION: (2,),
    **dict.fromkeys(("NativeLayerNormBackward0", "NativeGroupNormBackward0"), (1, 2)),
}
_REPEATS = ("ExpandBackward0", "RepeatBackward0")


@dataclass(frozen=True, eq=False)
class _Place:
    """A node whose output has entries of a parameter, or functions of these."""

    node: Any
    output_nr: int
    view: ParameterView
    slope: Tensor | float  # of the parameter's entries


class EntryUses:
    """Looks for uses in one graph.

    Args:
        parents: The graph.
        known: Nodes whose outputs depend on data: those of recorded uses, and of products.
        rows: How many rows the tensors z have, where the graph begins.
    """

    def __init__(self, parents: Parents, known: Iterable[Any], rows: Sequence[int]) -> None:
        self._parents, self._known, self._rows = parents, set(known), rows
        self._without: set[Any] = set()  # nodes that depend on no data
        self._kept: dict[tuple[Any, str], Tensor | None] = {}  # saved tensors are to be read once

    def of(self, p: Parameter, leaf: Any) -> list[MatrixUse] | str:
        """Return all uses of a parameter, whose data are not counted yet; or why it has others."""
        uses: list[MatrixUse] = []
        waiting = [_Place(leaf, 0, ParameterView.whole(p.shape), 1.0)]
        while waiting:
            here = waiting.pop()
            for parent, place in self._parents[here.node]:
                if place >= 0 and parent.next_functions[place][1] != here.output_nr:
                    continue
                found = self._at(p, here, parent, place)
                if isinstance(found, str):
                    return found
                waiting += [own for own in found if isinstance(own, _Place)]
                uses += [own for own in found if isinstance(own, MatrixUse)]
        return uses

    def _at(
        self, p: Parameter, here: _Place, node: Any, place: int
    ) -> Sequence[_Place | MatrixUse] | str:
        """Return the use that a node is, or where to go on; or why it is neither."""
        if place < 0:
            return "it is the input of a layer"
        name = node.name()
        if name in _REPEATS:
            use = self._repeated(p, here, node)
            if use is not None:
                return [use]
        if is_view(node):
            numbers = {n.next_functions[k][1] if k >= 0 else 0 for n, k in self._parents[node]}
            views = [(nr, view_at(node, nr, here.view)) for nr in numbers]
            if any(view is None for _, view in views):
                return NO_AXIS
            return [_Place(node, nr, view, here.slope) for nr, view in views if view is not None]
        if place in _INNER.get(name, ()):
            use = self._within(p, here, node, place)
            return NO_AXIS if use is None else [use]
        if name not in _BINARY and name not in FUNCTIONS:
            return f"it is used in {name.removesuffix('0').removesuffix('Backward')}"
        other = node.next_functions[1 - place][0] if name in _BINARY else None
        if other is not None and self.has_data(other):
            use = self._with_data(p, here, node, place)
            return NO_AXIS if use is None else [use]
        if tuple(node._input_metadata[0].shape) != here.view.shape:
            return NO_AXIS
        slope = self._slope(p, here, node, place)
        return NO_AXIS if slope is None else [_Place(node, 0, here.view, slope)]

    # Uses -----------------------------------------------------------------------------------------

    def _repeated(self, p: Parameter, here: _Place, node: Any) -> MatrixUse | None:
        """Return the repetition of a parameter for each of the data as a use."""
        shape = tuple(node._input_metadata[0].shape)
        view = here.view.expanded((1,) * (len(shape) - len(here.view.axes)) + here.view.shape)
        fits = all(old in (1, n) for old, n in zip(view.shape, shape, strict=True))
        if not fits or view.axes[0] or not self._may_be_data(shape[0]) or shape[0] < 2:
            return None
        return self._use(p, view, here.slope, node, 1.0, ())

    def _with_data(self, p: Parameter, here: _Place, node: Any, place: int) -> MatrixUse | None:
        """Return a sum or product of a parameter with what depends on data as a use."""
        if not self._fits(here.view, node):
            return None
        edges = (GradientEdge(*node.next_functions[1 - place]),)
        return self._use(p, here.view, here.slope, node, self._factor(node, place), edges)

    def _within(self, p: Parameter, here: _Place, node: Any, place: int) -> MatrixUse | None:
        """Return the bias of a product or convolution, or what scales or shifts, as a use."""
        name, shape = node.name(), node._input_metadata[0].shape
        others = [e for k, e in enumerate(node.next_functions) if k not in _INNER[name]]
        edges = tuple(GradientEdge(*edge) for edge in others if edge[0] is not None)
        has_data = _multiplies_a_constant(node) or any(self.has_data(e.node) for e in edges)
        view: ParameterView | None = here.view
        if name in (CONVOLUTION, "NativeGroupNormBackward0"):
            view = here.view.reshaped((*here.view.shape, *(1,) * (len(shape) - 2)))
        if not has_data or view is None or not self._fits(view, node):
            return None
        if name.startswith("Native"):
            factor = 1.0 if place == 2 else self._normalised(node)
        else:
            factor = float(getattr(node, "_saved_beta", 1))
        return self._use(p, view, here.slope, node, factor, edges)

    def _normalised(self, node: Any) -> Tensor | None:
        """Return x̂ of a layer or group normalisation."""
        kept_ones = [self._read(node, f"_saved_{x}") for x in ("input", "result1", "result2")]
        x, mean, scale = kept_ones
        if x is None or mean is None or scale is None:
            return None
        if node.name() == "NativeGroupNormBackward0":
            groups = x.reshape(*mean.shape, x.numel() // mean.numel())
            return ((groups - mean.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(x.shape)
        return (x - mean) * scale

    def _fits(self, view: ParameterView, node: Any) -> bool:
        """Tell whether a node's output has the same entries for all rows, which may be data."""
        metadata = node._input_metadata[0]
        shape = tuple(metadata.shape)
        if not shape or not metadata.dtype.is_floating_point or len(shape) < len(view.axes):
            return False
        repeated = ((shape[0], 0),) if shape[0] > 1 else ()
        return view.expanded(shape).axes[0] == repeated and self._may_be_data(shape[0])

    def _factor(self, node: Any, place: int) -> Tensor | float | None:
        """Return the derivative of a sum, product or quotient by one of its operands."""
        name, left, right = node.name(), "_saved_self", "_saved_other"
        if name in _SUMS:
            sign = 1.0 if name == "AddBackward0" else -1.0
            return 1.0 if place == 0 else sign * float(node._saved_alpha)
        if name == _PRODUCT:
            return self._read(node, left if place else right)
        divisor = self._read(node, right)
        if divisor is None or place == 0:
            return None if divisor is None else divisor.reciprocal()
        dividend = self._read(node, left)
        return None if dividend is None else -dividend / divisor.square()

    def _use(
        self,
        p: Parameter,
        view: ParameterView,
        slope: Tensor | float,
        node: Any,
        factor: Tensor | float | None,
        edges: tuple[GradientEdge, ...],
    ) -> MatrixUse | None:
        if factor is None:
            return None
        metadata = node._input_metadata[0]
        view = view.expanded(tuple(metadata.shape))
        if not isinstance(factor, Tensor):
            factor = torch.full((), factor, device=p.device, dtype=metadata.dtype)
        x = factor.expand(metadata.shape)
        call = EntryCall(p, view.offset, view.axes[1:], slope, 1, False)
        return MatrixUse(p, None, ENTRIES, x, GradientEdge(node, 0), edges, call)

    def _slope(self, p: Parameter, here: _Place, node: Any, place: int) -> Tensor | float | None:
        """Return the derivative of a function of each entry by the parameter's entries."""
        name = node.name()
        if name in FUNCTIONS:
            saved, derivative = FUNCTIONS[name]
            x = self._read(node, saved) if saved else None
            local = None if saved and x is None else derivative(x, node)
        else:
            local = self._factor(node, place)
        if local is None or not isinstance(local, Tensor):
            return None if local is None else here.slope * local
        parts = [part for axis in here.view.axes for part in axis]
        if any(stride == 0 for _, stride in parts):
            return None
        slope = local.new_ones(p.numel()) * here.slope
        own = slope.as_strided([n for n, _ in parts], [s for _, s in parts], here.view.offset)
        own.mul_(local.expand(here.view.shape).reshape(own.shape))
        return slope

    # The graph ------------------------------------------------------------------------------------

    def _may_be_data(self, count: int) -> bool:
        return all(count % n == 0 or n % max(count, 1) == 0 for n in self._rows)

    def _read(self, node: Any, saved: str) -> Tensor | None:
        if (node, saved) not in self._kept:
            found = kept(node, saved)
            self._kept[node, saved] = found.detach() if isinstance(found, Tensor) else None
        return self._kept[node, saved]

    def has_data(self, start: Any) -> bool:
        """Tell whether a node's output depends on data, as far as that is sure.

        Products with a constant operand do: of parameters alone there are none with one.
        """
        waiting, seen = [start], {start}
        while waiting:
            node = waiting.pop()
            if node in self._without:
                continue
            name = node.name()
            if node in self._known or name == LOOKUP or _multiplies_a_constant(node):
                return True
            new = [n for n, _ in node.next_functions if n is not None and n not in seen]
            waiting += new
            seen.update(new)
        self._without |= seen
        return False


def _multiplies_a_constant(node: Any) -> bool:
    places = PRODUCTS[node.name()][:2] if node.name() in PRODUCTS else ()
    if node.name() == CONVOLUTION:
        places = (0, 1)
    return any(node.next_functions[place][0] is None for place in places)


def by_data(uses: Sequence[MatrixUse], data: int) -> list[MatrixUse]:
    """Return the uses of a parameter by so many data, each of which has some rows."""
    whole, found = any(len(use.input) != data for use in uses), []
    for use in uses:
        assert isinstance(use.call, EntryCall)
        call = replace(use.call, rows=len(use.input) // data, whole=whole)
        found.append(replace(use, call=call))
    return found
