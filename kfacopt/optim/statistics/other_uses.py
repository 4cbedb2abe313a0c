"""Uses of parameters past their modules' calls: products count, others are told of; no hooks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.layers import Kinds, Layer
from kfacopt.kfac.matrix_uses import MatrixLayout
from kfacopt.kfac.unseen_uses import is_undercounted, past_modules
from kfacopt.optim.watch.forward_pass import ForwardPass
from kfacopt.optim.watch.wrappers import bookkeeping_kept


class OtherUses:
    """What an optimizer's parameters are used for that no hook saw.

    Args:
        layers: The layers.
        params: Those that may be matrices in no layer.
        kinds: The kinds of modules that are layers; a product is what `nn.Linear` does.
        chosen: Parameters whose products are layers whatever they do: of recurrent modules.

    Attributes:
        found: Matrices in no layer that products alone use, and how.
        free: The matrices in no layer that are looked for.
        undercounted: The layers that are used in other ways, too, of which K-FAC knows nothing;
            since the last call of `finish`.
        looks_on: Whether there may be products that make a layer of a matrix, or count for one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        params: Sequence[Parameter],
        kinds: Kinds,
        chosen: Collection[Parameter] = (),
    ) -> None:
        self._kinds, self._chosen = tuple(kinds), chosen
        self._layer_of = {p: la for la in layers for p in (la.weight, la.bias) if p is not None}
        free = [p for p in params if p.ndim > 1 and p.requires_grad and p.is_floating_point()]
        self.free = [p for p in free if p not in self._layer_of and p.numel()]
        self.found: dict[Parameter, MatrixLayout] = {}
        self.undercounted: set[Layer] = set()
        self.looks_on = bool(self.free or self._layer_of)

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
        past = past_modules(edges, uses, self._layer_of, self.free)
        for p, layout in past.found.items():
            if p in self._chosen or layout.kind(p) in self._kinds:
                self.found.setdefault(p, layout)
        if passes:
            passes[-1].uses += past.uses
        uses = [*uses, *past.uses]
        with bookkeeping_kept(edges) if past.rest else nullcontext():
            self.undercounted |= {
                self._layer_of[p] for p in past.rest if is_undercounted(edges, values, uses, p)
            }
