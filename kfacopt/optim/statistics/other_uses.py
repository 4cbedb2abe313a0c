"""Layers whose factors would lack uses that no hook saw; the search itself is in `kfac`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfacopt.kfac.capture import group_by_layer
from kfacopt.kfac.layers import Layer
from kfacopt.kfac.unseen_uses import is_undercounted, unseen_parameters
from kfacopt.optim.watch.forward_pass import ForwardPass
from kfacopt.optim.watch.wrappers import bookkeeping_kept


def layers_used_otherwise(
    edges: list[GradientEdge], values: Sequence[Tensor], passes: Sequence[ForwardPass]
) -> set[Layer]:
    """Return the layers of forward passes on whose parameters tensors z depend in other ways, too.

    Args:
        edges: The gradient edges of z.
        values: A tensor of the shape and dtype of each z.
        passes: The forward passes.
    """
    uses = [use for p in passes for use in p.uses]
    params = {p: la for la in group_by_layer(uses) for p in (la.weight, la.bias) if p is not None}
    unseen = unseen_parameters(edges, uses, params)
    with bookkeeping_kept(edges) if unseen else nullcontext():
        return {params[p] for p in unseen if is_undercounted(edges, values, uses, p)}
