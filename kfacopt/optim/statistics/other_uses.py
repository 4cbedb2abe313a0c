"""Uses of parameters past their modules' calls: products count, others are told of; no hooks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.choice import Choice
from kfacopt.kfac.data_axes import DataAxes
from kfacopt.kfac.layers import Layer
from kfacopt.kfac.layers.entries import ENTRIES
from kfacopt.kfac.matrix_layouts import MatrixLayout
from kfacopt.kfac.unseen_uses import is_undercounted, past_modules
from kfacopt.optim.watch.forward_pass import ForwardPass
from kfacopt.optim.watch.wrappers import bookkeeping_kept


class OtherUses:
    """What an optimizer's parameters are used for that no hook saw.

    Args:
        layers: The layers.
        params: All parameters.
        choice: Which of them may be layers.
        axes: Which of them have data known where they are multiplied or added entry by entry.

    Attributes:
        found: Parameters that products and lookups alone use, and how: those in no layer, and those
            whose layer has to be another.
        free: The parameters in no layer that are looked for: matrices, and vectors as an option.
        candidates: The parameters that may be among the found ones.
        undercounted: The layers that are used in other ways, too, of which K-FAC knows nothing;
            since the last call of `finish`.
        hidden: Those of the last loss whose graph has none of them, but reentrant activation
            checkpointing, which may hide them.
        reasons: Why parameters that are looked for are no layers, in words.
        by_entries: Parameters that are added to activations, or the like, where these are no
            layers; see `added_tables`.
        looks_on: Whether there may be products that make a layer of a matrix, or count for one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        params: Sequence[Parameter],
        choice: Choice,
        axes: DataAxes,
    ) -> None:
        self._choice = choice
        self._layer_of = {p: la for la in layers for p in (la.weight, la.bias) if p is not None}
        own = [p for p in params if p.requires_grad and p.is_floating_point() and p.numel()]
        self.free = [p for p in own if p not in self._layer_of and choice.looks_for(p)]
        self.candidates = (
            [p for p in own if p in self._layer_of and p.ndim > 1] if choice.ties else []
        )
        self.candidates += self.free
        self.found: dict[Parameter, MatrixLayout] = {}
        self.undercounted: set[Layer] = set()
        self.hidden: set[Parameter] = set()
        self.by_entries: dict[Parameter, MatrixLayout] = {}
        self._axes = axes
        self.reasons: dict[Parameter, str] = {}
        self._unexplained = [] if choice.by_entries else self.free
        self.looks_on = bool(self.free or self._layer_of)

    def is_table(self, layout: MatrixLayout) -> bool:
        """Tell whether what is used so, on this rank or on another, is no layer but a table."""
        return layout.roles == ENTRIES and not self._choice.by_entries

    def finish(self) -> set[Layer]:
        """Return the layers that were undercounted, and forget them."""
        undercounted, self.undercounted = self.undercounted, set()
        return undercounted

    def look(
        self, edges: list[GradientEdge], values: Sequence[Tensor], passes: Sequence[ForwardPass]
    ) -> None:
        """Add products to the uses that forward passes recorded, and take note of other uses.

        Args:
            edges: The gradient edges of tensors z, whose graph is alive.
            values: A tensor of the shape and dtype of each z.
            passes: The forward passes that z depends on.
        """
        uses = [use for p in passes for use in p.uses]
        entries = (self._axes, values) if self._choice.by_entries else None
        with nullcontext() if entries is None else bookkeeping_kept(edges):
            new, self._unexplained = self._unexplained, []
            past = past_modules(edges, uses, self._layer_of, self.free, entries, new)
        self.reasons |= past.reasons | self._axes.reasons
        if not self._choice.by_entries:
            self.by_entries |= dict.fromkeys(past.tables, MatrixLayout(ENTRIES, None))
        self.hidden, rest = set(past.hidden), list(past.rest)
        for p, layout in past.found.items():
            layer = self._layer_of.get(p)
            if self._choice.makes_layer(p, layout):
                self.found.setdefault(p, layout)
                self.undercounted |= set() if layer is None else {layer}
            elif layer is not None:
                rest.append(p)
            else:
                self.reasons[p] = self._choice.leaves_out(p, layout)
        if passes:
            passes[-1].uses += past.uses
        uses = [*uses, *past.uses]
        with bookkeeping_kept(edges) if rest else nullcontext():
            self.undercounted |= {
                self._layer_of[p] for p in rest if is_undercounted(edges, values, uses, p)
            }
