"""Moments from would-be gradients: extra backward passes, which touch no parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from kfacopt.kfac.capture import LayerUse, WouldBePass, group_by_layer, loss_vectors
from kfacopt.likelihoods import widened
from kfacopt.optim.settings import CurvatureSettings
from kfacopt.optim.statistics.backward_pass import CandidateMoments
from kfacopt.optim.watch.loss_calls import LossCall
from kfacopt.optim.watch.probed_tensors import ForwardPass
from kfacopt.optim.watch.wrappers import bookkeeping_kept


def count_would_be(
    candidates: CandidateMoments,
    call: LossCall,
    passes: Sequence[ForwardPass],
    upstream: Tensor,
    settings: CurvatureSettings,
    generator: Generator,
    terms: Tensor,
    share: Tensor | float,
) -> None:
    """Count the gradients of a loss with drawn labels, or of its Hessian's columns.

    They touch no parameter, so that no `.grad` changes.

    Args:
        candidates: Where they are counted.
        call: What the loss means.
        passes: The forward passes that it depends on.
        upstream: The derivative of the objective by the loss.
        settings: Which curvature is collected.
        generator: Draws labels.
        terms: The loss's number of terms.
        share: What their G counts.
    """
    likelihood, z = call.likelihood, widened(call.output)
    uses = [use for p in passes for use in p.uses]
    weights = likelihood.curvature_weights(z, call.target, upstream)
    sampling = (settings.fisher_type, settings.mc_samples, generator)
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

    backward = WouldBePass(call.output, uses)
    with bookkeeping_kept(call.output):
        for vector in loss_vectors(likelihood, z, weights, *sampling):
            backward.run(vector.to(call.output.dtype), take)
            for number in list(arrived):  # other uses of these layers were not reached
                count(number)
    for p in passes:
        candidates.count_inputs([u for u in p.uses if u in reached])
    for layer in group_by_layer(u for u in uses if u in reached):
        candidates.count_terms(layer, terms)
