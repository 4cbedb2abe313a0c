"""Uses of parameters past their modules' calls: products count, others are told of; no hooks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Parameter

from kfacopt.kfac.layers import Layer
from kfacopt.kfac.matrix_uses import MatrixLayout, MatrixUse, as_layer_use, fits
from kfacopt.kfac.unseen_uses import is_undercounted, unseen_uses
from kfacopt.optim.watch.forward_pass import ForwardPass
from kfacopt.optim.watch.wrappers import bookkeeping_kept


class OtherUses:
    """What an optimizer's parameters are used for that no hook saw.

    Args:
        layers: The layers.
        params: Those that may be matrices in no layer.

    Attributes:
        found: Matrices in no layer that products alone use, and how.
        free: The matrices in no layer that are looked for.
        undercounted: The layers that are used in other ways, too, of which K-FAC knows nothing;
            since the last call of `finish`.
        looks_on: Whether there may be products that make a layer of a matrix, or count for one.
    """

    def __init__(self, layers: Sequence[Layer], params: Sequence[Parameter]) -> None:
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
        unseen, products, vectors = unseen_uses(edges, uses, [*self._layer_of, *self.free])
        explained = set()
        for p, own in products.items():
            layer = self._layer_of.get(p)
            if layer is None:
                self.found.setdefault(p, MatrixLayout.of(own))
            elif passes and layer.weight is p and all(fits(use, layer) for use in own):
                passes[-1].uses += [as_layer_use(use, layer) for use in own]
                explained |= {p, *_explained_bias(layer, own, vectors)}
        rest = [p for p in unseen if p in self._layer_of and p not in explained]
        uses = [use for p in passes for use in p.uses]
        with bookkeeping_kept(edges) if rest else nullcontext():
            self.undercounted |= {
                self._layer_of[p] for p in rest if is_undercounted(edges, values, uses, p)
            }


def _explained_bias(
    layer: Layer, uses: Sequence[MatrixUse], vectors: dict[Parameter, int]
) -> list[Parameter]:
    """Return the bias of a layer if the products with its matrix are all that add it."""
    adding = sum(use.bias is layer.bias for use in uses)
    bias = layer.bias
    return [bias] if bias is not None and vectors.get(bias) == adding else []
