"""Moments from would-be gradients: extra backward passes, which touch no parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfacopt.kfac.capture import LayerUse, WouldBePass, group_by_layer
from kfacopt.optim.statistics.backward_pass import CandidateMoments
from kfacopt.optim.watch.forward_pass import ForwardPass


def count_would_be(
    candidates: CandidateMoments,
    outputs: Tensor | Sequence[GradientEdge],
    vectors: Iterable[Tensor | Sequence[Tensor | None]],
    passes: Sequence[ForwardPass],
    terms: Tensor,
    share: Tensor | float = 1.0,
) -> None:
    """Count the gradients of a loss with drawn labels, or of its Hessian's columns.

    They touch no parameter, so that no `.grad` changes.

    Args:
        candidates: Where they are counted.
        outputs: z with its graph, or the gradient edges of several tensors z.
        vectors: v with Σ v vᵀ the curvature at z; see `WouldBePass.run`.
        passes: The forward passes that the loss depends on.
        terms: The loss's number of terms.
        share: What their G counts.
    """
    uses = [use for p in passes for use in p.uses]
    # A layer's uses in one forward pass count together.
    groups = [own for p in passes for own in group_by_layer(p.uses).values()]
    group_of = {use: number for number, own in enumerate(groups) for use in own}
    reached: set[LayerUse] = set()
    arrived: dict[int, dict[LayerUse, Tensor]] = {}

    def count(number: int) -> None:
        grads = arrived.pop(number)
        own = [use for use in groups[number] if use in grads]
        candidates.count_gradients(own[0].layer, own, [grads[use] for use in own], share)

    def take(use: LayerUse, grad: Tensor) -> None:
        number = group_of[use]
        reached.add(use)
        arrived.setdefault(number, {})[use] = grad
        if len(arrived[number]) == len(groups[number]):
            count(number)

    backward = WouldBePass(outputs, uses)
    for vector in vectors:
        backward.run(vector, take)
        for number in list(arrived):  # other uses of these layers were not reached
            count(number)
    for p in passes:
        candidates.count_inputs([u for u in p.uses if u in reached])
    for layer in group_by_layer(u for u in uses if u in reached):
        candidates.count_terms(layer, terms)
