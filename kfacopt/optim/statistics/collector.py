"""Collect sums of moments from the losses and gradients of the user's own backward passes.

The factors are those of the user's objective: of `loss / k`, of a weighted sum of losses, of a sum
divided by the number of tokens. A layer's moments are candidates until the same backward pass
accumulates the gradient of its parameter: passes that differentiate by something else (inputs, for
a gradient penalty or an attack) do not count. Hooks, and what calls them, are in `watch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfacopt.kfac.eigenvalues import Bases
from kfacopt.kfac.layers import Block, Layer
from kfacopt.optim.settings import CurvatureSettings
from kfacopt.optim.statistics.addends import stand_ins
from kfacopt.optim.statistics.backward_pass import CandidateMoments
from kfacopt.optim.statistics.empirical import EmpiricalPasses
from kfacopt.optim.statistics.label_draws import LabelDraws, Mark, rewind
from kfacopt.optim.statistics.moments import Moments
from kfacopt.optim.statistics.objectives import ObjectiveLog, curvature_of
from kfacopt.optim.statistics.other_uses import OtherUses
from kfacopt.optim.statistics.waiting import WaitingMoments
from kfacopt.optim.statistics.would_be import count_found, count_would_be, known_vectors
from kfacopt.optim.watch.forward_pass import ForwardPass, node_key
from kfacopt.optim.watch.gradient_exchange import ExchangeWatch
from kfacopt.optim.watch.loss_calls import LossCall
from kfacopt.optim.watch.objectives import Objective
from kfacopt.optim.watch.recorded_calls import LossOrigin, ObjectiveTerm, ScalarTerm, Term
from kfacopt.optim.watch.wrappers import bookkeeping_kept


class Statistics:
    """What the losses since the last step add up to; the receiver of a `Watch`.

    Args:
        layers: The layers.
        others: Looks for uses that no hook saw.
        settings: Which curvature is collected.
        labels: Says what labels are drawn from.
        exchange: Is told of backward passes and gradients.

    Attributes:
        bases: The blocks' eigenbases, as far as they are known; read where second moments are
            collected.
        collecting: Whether statistics are due.
        reached: The layers whose gradients have been accumulated since the last step.
        exchange: As above.
        others: As above.
        maximised: The `id`s of parameters whose objective is to be maximised.
        undercounted: The layers whose parameters a loss of the last step with statistics depends on
            in other ways, too, than by calls of their modules. They got no statistics from it.
        objectives: What was differentiated so far, and which curvature was used for it.
        searched: Whether curvature was looked for since the last step, beside that of known losses.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        others: OtherUses,
        settings: CurvatureSettings,
        labels: LabelDraws,
        exchange: ExchangeWatch,
    ) -> None:
        self._layers = [part for layer in layers for part in layer.collected]
        self._settings, self._labels = settings, labels
        self.exchange, self.others = exchange, others
        self.bases: Mapping[Block, Bases] = {}
        self.collecting = True
        self.maximised: set[int] = set()
        self._task = -1  # of the user's backward pass that runs
        self.undercounted: set[Layer] = set()
        # Before the first label of a step and of a backward pass was drawn.
        self._labels_of_step: Mark | None = None
        self._labels_of_task: Mark | None = None
        self._confirmed = False
        self.objectives = ObjectiveLog()
        self.clear()

    def clear(self) -> None:
        """Forget all statistics since the last step, and take back the labels drawn for them."""
        self._start_task(-1)
        rewind(self._labels_of_step)
        self._labels_of_step = None
        self._pending = WaitingMoments()
        self._num_objectives, self.searched = 0, False
        self.reached: set[Layer] = set()
        self.others.finish()
        self._objective: list[Term] = []
        self.exchange.forget()

    def _start_task(self, task: int) -> None:
        """Forget what belongs to one backward pass of the user's alone."""
        rewind(self._labels_of_task)
        self._labels_of_task = None
        if self._confirmed:
            self._objective += self._candidate_terms
        self._task, self._confirmed, self._unseen = task, False, False
        self._candidate_terms: list[Term] = []
        drawn = (self._settings, self._labels.generator(), self.bases)
        self._candidates = CandidateMoments(*drawn)
        self._candidate_squares = CandidateMoments(*drawn)  # of whole objectives' gradients
        self._empirical = EmpiricalPasses(task, self._candidates, self._candidate_squares)

    def _begin_task(self) -> None:
        """Take note of the user's backward pass that runs, where it is a new one."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._start_task(task)
        self._drop_what_was_reset()
        if self.collecting:
            self.exchange.backward_begins()

    def arrive_at_loss(
        self, call: LossCall, passes: list[ForwardPass], upstream: Tensor, origin: LossOrigin | None
    ) -> None:
        """Collect moments; see `LossReceiver`."""
        self._begin_task()
        if self.collecting:
            edges = [get_gradient_edge(call.output)]
            self.others.look(edges, [call.output], passes)
            self.objectives.note(type(call.likelihood).__name__, "known")
            self._candidates.rows.note(call.likelihood, call.output, call.target, upstream)
            if self._settings.fisher_type == "empirical":
                self._empirical.add_loss(call, passes, upstream)
            else:
                vectors, terms = known_vectors(
                    call, upstream, self._settings, self._labels.generator()
                )
                args = (call.output, vectors, passes, terms, self._candidates.share(terms))
                with bookkeeping_kept(edges):
                    count_would_be(self._candidates, *args)
        if origin is not None:
            counts = not any(isinstance(term, ScalarTerm) for term in self._candidate_terms)
            term = ObjectiveTerm(origin, call.output.detach(), upstream, counts)
            self._candidate_terms.append(term)

    def arrive_at_objective(self, objective: Objective, upstream: Tensor) -> None:
        """Collect moments of what is no known loss; see `LossReceiver`."""
        self._begin_task()
        if not (self.collecting or self._settings.recording):
            return
        maximised = {la for la in self._layers if id(la.anchor) in self.maximised}
        for sign, own in ((1, {*self._layers} - maximised), (-1, maximised)):
            if own or (sign == 1 and not self._layers):
                self._count_objective(objective, sign * upstream, own)

    def _count_objective(self, objective: Objective, upstream: Tensor, layers: set[Layer]) -> None:
        """Collect moments of layers from what is to be minimised, but for its known losses."""
        with bookkeeping_kept([objective.edge]):
            seed = self._labels.seed_of(self._num_objectives)
            found = curvature_of(objective, upstream, self._settings, seed)
            extra = stand_ins(objective, upstream, found) if self.collecting else []
        self._num_objectives += 1
        term = found.term(objective, upstream) if found.parts else None
        self._candidate_terms += [] if term is None else [term]
        if not self.collecting:
            return
        passes = objective.passes
        if self._settings.fisher_type == "empirical":
            # The gradients of known losses in the user's own pass are those of the whole objective.
            known = {node_key(node) for node in found.piece.recognised}
            passes = [p for p in passes if not known & p.recognised]
        if found.piece.derived:
            self.objectives.note_derived(found)
        if found.parts and passes:
            self.searched = True
            self.others.look(found.edges, found.gradients, passes)
            where, told = (self._candidates, self._candidate_squares), set[Layer]()
            for ignored in found.piece.ignored:
                self._candidate_squares.rows.ignore(ignored)
            for own in (found, *extra):
                self.objectives.note(own.piece.title, own.description())
                drawn = (self._settings, self._labels.generator())
                count_found(where, own, passes, *drawn, layers, told)
        elif found.piece.derived and not found.piece.recognised:
            # All curvature there is lies behind derivatives: none is counted, not a part.
            like = [torch.ones_like(upstream)]
            self.others.look([objective.edge], like, passes)

    def arrive_at_output(
        self, behind: GradientEdge, value: Tensor, passes: list[ForwardPass]
    ) -> None:
        """Collect moments of an objective that was not seen; see `LossReceiver`."""
        if torch._C._current_graph_task_id() != self._task:
            self._begin_task()
            self._unseen = True
        if self._unseen and self.collecting:
            self.searched = True
            self.objectives.note_unseen(value)
            self.others.look([behind], [value], passes)
            self._empirical.add_unseen(value, passes)

    def _drop_what_was_reset(self) -> None:
        """Forget the statistics of gradients that others than `zero_grad` reset.

        `model.zero_grad()`, for instance, after a step that a GradScaler skipped.
        """
        kept = _accumulated_in(self._layers) if self._pending or self._objective else set()
        self._pending.keep(kept)
        if not self._pending:
            rewind(self._labels_of_step)
            self._labels_of_step = self._labels.mark()
        self._labels_of_task = self._labels.mark()
        if not kept:
            self._objective, self.reached = [], set()

    def accumulate_gradient(self, layer: Layer) -> None:
        """Let a layer's candidates count; see `LossReceiver`."""
        self.reached.add(layer)
        if torch._C._current_graph_task_id() != self._task:
            return
        self._confirmed = True
        self.exchange.accumulated(layer.anchor)
        for part in layer.collected:
            self._empirical.fold(part)
            if self._pending.take(part, self._candidates_by_layer()):
                self._labels_of_task = None

    def _candidates_by_layer(self) -> WaitingMoments:
        return WaitingMoments(self._candidates.by_layer, self._candidate_squares.by_layer)

    def objective(self) -> list[Term]:
        """Return the losses whose gradients have been accumulated since the last step."""
        if self._confirmed or not self._objective:
            return [*self._objective, *self._candidate_terms]
        return list(self._objective)

    def finish(self, loss_scale: float) -> dict[Layer, Moments]:
        """Return what was collected since the last step, and forget it.

        Where no gradient was accumulated at all, the last backward pass counts: the gradients come
        from `torch.autograd.grad`.

        Args:
            loss_scale: What a `GradScaler` multiplied the objective with.
        """
        accumulated = bool(self._pending)
        pending = (self._pending or self._candidates_by_layer()).summed(loss_scale)
        self.undercounted = self.others.finish()
        gone = {part for layer in self.undercounted for part in layer.collected}
        pending = {la: m for la, m in pending.items() if la not in gone}
        if pending:
            self._labels_of_step = None
        if not accumulated:  # else a task that was not confirmed gives its labels back
            self._labels_of_task = None
        likelihood = self._settings.likelihood
        if likelihood is not None and likelihood.reduction == "mean":
            for moments in pending.values():
                moments.scale_curvature(1 / moments.terms)
        self.clear()
        return pending


def _accumulated_in(layers: Iterable[Layer]) -> set[Layer]:
    """Return the layers with a gradient to accumulate on; none where all are zero.

    Zeros stem from a reset in place, which leaves no other trace (`grad.data.zero_()`).
    """
    grads = {la: la.anchor.grad for la in layers if la.anchor.grad is not None}
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads.values():
        by_device.setdefault(grad.device, []).append(grad.any())
    return set(grads) if any(bool(torch.stack(x).any()) for x in by_device.values()) else set()
