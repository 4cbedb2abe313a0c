"""Moments from would-be gradients: extra backward passes, which touch no parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

from kfacopt.kfac.capture import LayerUse, WouldBePass, group_by_layer, loss_vectors
from kfacopt.kfac.layers import Layer
from kfacopt.likelihoods import widened
from kfacopt.optim.settings import CurvatureSettings
from kfacopt.optim.statistics.backward_pass import CandidateMoments
from kfacopt.optim.statistics.objectives import FoundCurvature
from kfacopt.optim.watch.forward_pass import ForwardPass
from kfacopt.optim.watch.loss_calls import LossCall
from kfacopt.optim.watch.wrappers import bookkeeping_kept


def known_vectors(
    call: LossCall, upstream: Tensor, settings: CurvatureSettings, generator: Generator
) -> tuple[Iterator[Tensor], Tensor]:
    """Return v `[*z.shape]` with Σ v vᵀ the curvature of a known loss, and its number of terms.

    Args:
        call: What the loss means.
        upstream: The derivative of the objective by the loss.
        settings: Which curvature is collected.
        generator: Draws labels, or signs.
    """
    likelihood, z = call.likelihood, widened(call.output)
    weights = likelihood.curvature_weights(z, call.target, upstream)
    sampling = (settings.fisher_type, settings.mc_samples, generator)
    vectors = loss_vectors(likelihood, z, weights, *sampling)
    return (v.to(call.output.dtype) for v in vectors), likelihood.num_terms(z, call.target)


def count_would_be(
    candidates: CandidateMoments,
    outputs: Tensor | Sequence[GradientEdge],
    vectors: Iterable[Tensor | Sequence[Tensor | None]],
    passes: Sequence[ForwardPass],
    terms: Tensor,
    share: Tensor | float = 1.0,
    layers: Collection[Layer] | None = None,
    told: set[Layer] | None = None,
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
        layers: Which layers count; all of them if `None`.
        told: Layers of which the number of terms was counted for the same data; grows.
    """
    counted = [[u for u in p.uses if layers is None or u.layer in layers] for p in passes]
    uses = [use for own in counted for use in own]
    # A layer's uses in one forward pass count together.
    groups = [same for own in counted for same in group_by_layer(own).values()]
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
    for own in counted:
        candidates.count_inputs([u for u in own if u in reached])
    for layer in group_by_layer(u for u in uses if u in reached):
        if layer not in (told or ()):
            candidates.count_terms(layer, terms)
    if told is not None:
        told.update(use.layer for use in reached)


def count_found(
    where: tuple[CandidateMoments, CandidateMoments],
    found: FoundCurvature,
    passes: Sequence[ForwardPass],
    settings: CurvatureSettings,
    generator: Generator,
    layers: Collection[Layer],
    told: set[Layer],
) -> None:
    """Count the curvature that was found of an objective.

    Args:
        where: Where it is counted, and where squares of whole objectives' gradients are.
        found: The curvature.
        passes: The forward passes that the objective depends on.
        settings: Which curvature is collected.
        generator: Draws labels, or signs.
        layers: Which layers count.
        told: Layers whose squares know the number of data; grows.
    """
    edges = found.edges
    with bookkeeping_kept(edges):
        for empirical in sorted({part.empirical for part in found.parts}):
            vectors = found.vectors(empirical, settings, generator)
            known = told if empirical else None
            counted = (vectors, passes, found.terms)
            count_would_be(where[empirical], edges, *counted, layers=layers, told=known)
