"""Collect the statistics of curvature in the user's own training loop.

Hooks on the modules that contain the parameters record the uses of layers; a hook on the loss value
that the user computes turns them into moments when the user's backward pass arrives there. That is
the moment when it is known with what factor the loss counts: `loss / k`,
`0.3 * loss_1 + 0.7 * loss_2`, or a sum divided by the number of tokens are the user's objective,
and the factors are those of the objective. A layer's moments are candidates until the same backward
pass accumulates the gradient of its parameter: passes that differentiate by something else (inputs,
for a gradient penalty or an attack) do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfacopt.data import is_evaluating
from kfacopt.kfac.capture import (
    LayerUse,
    WouldBePass,
    group_by_layer,
    in_would_be_pass,
    loss_vectors,
    record_use,
)
from kfacopt.kfac.eigenvalues import Bases
from kfacopt.kfac.layers import Block, Layer
from kfacopt.kfac.unseen_uses import is_undercounted, unseen_parameters
from kfacopt.likelihoods import UnsupportedLossError, widened
from kfacopt.optim.activation_checkpointing import refuse_reentrant_checkpointing
from kfacopt.optim.candidates import CandidateMoments
from kfacopt.optim.compilation import (
    is_called_from_compiled_code,
    leave_hooks_uncompiled,
    run_uncompiled,
)
from kfacopt.optim.distributed import (
    WrapperWatch,
    bookkeeping_kept,
    follow_through_wrapper,
    unwrapped,
)
from kfacopt.optim.empirical import EmpiricalPass
from kfacopt.optim.gradient_exchange import ExchangeWatch
from kfacopt.optim.hooks import gradient_hooks, module_hooks, remove_hooks
from kfacopt.optim.label_draws import LabelDraws, Mark, rewind
from kfacopt.optim.loss_calls import LossCall
from kfacopt.optim.loss_probe import (
    ForwardPass,
    LossCallMode,
    ProbedTensor,
    carry_probes,
    differentiable_tensors,
    passes_feeding,
    probe,
    record_call,
    unprobe,
)
from kfacopt.optim.moments import Moments
from kfacopt.optim.replay import LossOrigin, ObjectiveTerm, Surroundings
from kfacopt.optim.settings import CurvatureOptions


class StatisticsCollector:
    """Statistics of layers in ordinary forward and backward passes.

    Args:
        layers: The layers with their modules.
        modules: All modules that contain any trained parameter, with their names.
        options: Which curvature is collected.
        labels: Says what labels are drawn from.
        wrappers: Is told when a forward pass reaches a layer.

    Attributes:
        uncompiled: The kind of the module that was called with hooks from compiled code, if any.
        bases: The blocks' eigenbases, as far as they are known; read where second moments are
            collected.
        collecting: Whether statistics are due; where they are not, forward passes and losses may
            still be recorded.
        reached: The layers whose gradients have been accumulated since the last step.
        exchange: Looks at what happens to gradients without a wrapper.
        undercounted: The layers whose parameters a loss of the last step with statistics depends on
            in other ways, too, than by calls of their modules. They got no statistics from it.
        used: Whether a forward pass since the last step called a layer.
    """

    def __init__(
        self,
        layers: Iterable[tuple[Layer, list[nn.Module]]],
        modules: Iterable[tuple[str, nn.Module]],
        options: CurvatureOptions,
        labels: LabelDraws,
        wrappers: WrapperWatch,
    ) -> None:
        self._options, self._labels, self._wrappers = options, labels, wrappers
        self.exchange = ExchangeWatch(wrappers)
        self.bases: Mapping[Block, Bases] = {}
        self.collecting = True
        self._outermost: tuple[nn.Module, ForwardPass, list[ForwardPass]] | None = None
        self._task = -1  # of the user's backward pass that runs
        self._mode: LossCallMode | None = None
        leave_hooks_uncompiled(ProbedTensor)
        self.undercounted: set[Layer] = set()
        self._passes: weakref.WeakSet[ForwardPass] = weakref.WeakSet()
        self.uncompiled: type[nn.Module] | None = None  # called from compiled code, with hooks
        self._layers_of: dict[int, list[Layer]] = {}
        for layer, own in layers:
            for module in own:
                self._layers_of.setdefault(id(module), []).append(layer)
        self._modules = [(name, weakref.ref(module)) for name, module in modules]
        self._handles: list[Any] = []
        # Before the first label of a step and of a backward pass was drawn.
        self._labels_of_step: Mark | None = None
        self._labels_of_task: Mark | None = None
        self._confirmed = False
        weakref.finalize(self, remove_hooks, self._handles)
        self.clear()
        self.active = True

    @property
    def active(self) -> bool:
        """Whether hooks are on the modules; they are taken off where no statistics are due."""
        return bool(self._handles)

    @active.setter
    def active(self, active: bool) -> None:
        if active and not self._handles:
            modules = [module for _, module in self.living_modules()]
            layers = {layer.anchor: layer for own in self._layers_of.values() for layer in own}
            self._handles += module_hooks(modules, self._enter, self._leave)
            self._handles += gradient_hooks(layers, self._confirm)
        elif not active:
            remove_hooks(self._handles)

    def living_modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that can have hooks, and their names."""
        living = [(name, ref()) for name, ref in self._modules]
        return [(name, module) for name, module in living if module is not None]

    def clear(self, forward_is_over: bool = True) -> None:
        """Forget all statistics since the last step, and take back the labels drawn for them.

        Args:
            forward_is_over: Whether no backward pass of an earlier forward pass will come.
        """
        self._start_task(-1)
        rewind(self._labels_of_step)
        self._labels_of_step = None
        self._pending: dict[Layer, Moments] = {}
        self.reached: set[Layer] = set()
        self.unknown_losses: set[str] = set()
        self.unknown_objectives: set[str] = set()
        if forward_is_over:
            self.forward_seen = self.used = False
        self._also_used_otherwise: set[Layer] = set()
        self._objective: list[ObjectiveTerm] = []
        self.exchange.forget()

    def close_passes(self) -> None:
        """Let outputs and losses that are left of the step be plain tensors."""
        for forward_pass in list(self._passes):
            forward_pass.close()
        self._passes.clear()

    def _start_task(self, task: int) -> None:
        """Forget what belongs to one backward pass of the user's alone."""
        rewind(self._labels_of_task)
        self._labels_of_task = None
        if self._confirmed:
            self._objective += self._candidate_terms
        self._task, self._confirmed = task, False
        self._candidate_terms: list[ObjectiveTerm] = []
        self._candidates = CandidateMoments(self._options, self._labels.generator(), self.bases)
        self._empirical: list[EmpiricalPass] = []

    # Hooks -----------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and self._outermost is None:
            self._sleep_during(module)
            return None
        if self._outermost is not None and module is self._outermost[0]:
            self._end_pass()  # it was left by an exception that runs no hooks, as Ctrl-C does
        if run_uncompiled() and self._outermost is None:
            self.uncompiled = type(module)
        if self._outermost is not None or not torch.is_grad_enabled():
            return None
        if _is_foreign_call(module):
            self._refuse_recomputation(module)
            return None
        parents = passes_feeding((args, kwargs))
        for parent in parents:
            parent.consumed = True
        call = None
        if self._options.recording:
            call = record_call(unwrapped(module), args, kwargs, Surroundings.now())
        forward_pass = ForwardPass(self, call)
        self._outermost = (module, forward_pass, parents)
        self._passes.add(forward_pass)
        if self._options.likelihood is None:
            self._mode = LossCallMode(forward_pass, parents)
            self._mode.__enter__()
        return unprobe(args), unprobe(kwargs)

    def _refuse_recomputation(self, module: nn.Module) -> None:
        """Raise if a whole model is called by reentrant activation checkpointing.

        Its first forward pass looks like an evaluation without gradients.
        """
        if torch._C._current_graph_task_id() != -1 and not is_evaluating():
            for layer in self._layers_of.get(id(module), ()):
                refuse_reentrant_checkpointing(layer.name)

    def _end_pass(self) -> None:
        self._outermost = None
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def _sleep_during(self, module: nn.Module) -> None:
        """Take the hooks off for a compiled forward pass without gradients."""
        if not is_called_from_compiled_code():
            return
        self.active = False
        self._alarm = module_hooks([module], self._ignore, self._wake)

    def _ignore(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Let a forward pass begin."""

    def _wake(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        remove_hooks(self._alarm)
        self.active = True

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._outermost is None:
            return None
        outermost, forward_pass, parents = self._outermost
        layers = self._layers_of.get(id(module), ())
        if layers:
            self._wrappers.look()
        if self.collecting and not torch._C._are_functorch_transforms_active():
            for layer in layers:
                if not torch.is_grad_enabled():
                    refuse_reentrant_checkpointing(layer.name)
                use = record_use(layer, module, args, kwargs, output)
                if use is not None:
                    forward_pass.uses.append(use)
        if module is not outermost:
            return None
        self._end_pass()
        self.forward_seen = True
        self.used = self.used or bool(forward_pass.uses)
        if output is None or not (forward_pass.uses or parents or self._options.recording):
            return None
        probed = probe(output, forward_pass, parents)
        if self._options.likelihood is not None:
            self._watch_output(output, probed, forward_pass, parents)
        follow_through_wrapper(carry_probes)
        return probed

    # Losses ----------------------------------------------------------------------------------

    def observe_unknown_loss(self, name: str, loss: Tensor) -> None:
        """Remember a loss function that is not known, and whether the objective contains it."""
        self.unknown_losses.add(name)
        collector = weakref.ref(self)

        def on_backward(_: Tensor) -> None:
            alive = collector()
            if alive is not None:
                alive.unknown_objectives.add(name)

        loss.register_hook(on_backward)

    def observe_loss(
        self,
        call: LossCall | UnsupportedLossError,
        loss: Tensor,
        passes: list[ForwardPass],
        origin: LossOrigin | None,
    ) -> None:
        """Collect moments when the user's backward pass arrives at a loss."""
        if self._options.likelihood is not None or is_evaluating():
            return
        collector = weakref.ref(self)

        def on_backward(upstream: Tensor) -> None:
            alive = collector()
            if alive is None or in_would_be_pass():
                return
            if origin is None and not any(p.uses for p in passes):
                return
            if isinstance(call, UnsupportedLossError):
                raise call
            alive._collect(call, passes, upstream.detach())
            if origin is not None:
                term = ObjectiveTerm(origin, call.output.detach(), upstream.detach())
                alive._candidate_terms.append(term)

        loss.register_hook(on_backward)

    def _watch_output(
        self, output: Any, probed: Any, forward_pass: ForwardPass, parents: list[ForwardPass]
    ) -> None:
        """Take the stated loss at the model's output, when the backward pass arrives there."""
        likelihood = self._options.likelihood
        assert likelihood is not None
        outputs = differentiable_tensors(unprobe(output))
        if len(outputs) != 1:
            raise ValueError(
                "loss_func: the model must return one differentiable tensor for a stated loss, "
                f"got {len(outputs)}. Let the loss be recognised, or wrap the model."
            )
        call = LossCall(likelihood, outputs[0], None)
        passes = [p for p in (*parents, forward_pass) if p.observer is self]
        collector = weakref.ref(self)

        def on_backward(grads: Any) -> None:
            alive = collector()
            if alive is not None and not forward_pass.consumed and not in_would_be_pass():
                alive._collect(call, passes, torch.ones(()))

        # On the probe's own node, behind z: a hook on z's node that refers to z would be a cycle.
        (probed_output,) = differentiable_tensors(probed)
        get_gradient_edge(probed_output).node.register_prehook(on_backward)

    # Moments ---------------------------------------------------------------------------------

    def _collect(self, call: LossCall, passes: list[ForwardPass], upstream: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        begins = task != self._task
        if begins:
            self._start_task(task)
            # Gradients that others than `zero_grad` reset (`model.zero_grad()`, after a step that a
            # GradScaler skipped) take their statistics along.
            known = {layer for own in self._layers_of.values() for layer in own}
            kept = self._accumulated_in(known) if self._pending or self._objective else set()
            self._pending = {la: m for la, m in self._pending.items() if la in kept}
            if not self._pending:
                rewind(self._labels_of_step)
                self._labels_of_step = self._labels.mark()
            self._labels_of_task = self._labels.mark()
            if not kept:
                self._objective, self.reached = [], set()
        if not self.collecting:
            return
        if begins:
            self.exchange.backward_begins()
        self._look_for_other_uses(call.output, [use for p in passes for use in p.uses])
        if self._options.fisher_type == "empirical":
            self._collect_empirical(call, passes, upstream)
        else:
            self._collect_would_be(call, passes, upstream)

    def _look_for_other_uses(self, output: Tensor, uses: list[LayerUse]) -> None:
        """Take note of the layers whose factors would lack uses that no hook saw."""
        params = {
            p: la for la in group_by_layer(uses) for p in (la.weight, la.bias) if p is not None
        }
        unseen = unseen_parameters([output], uses, params)
        with bookkeeping_kept(output) if unseen else nullcontext():
            own = {params[p] for p in unseen if is_undercounted(output, uses, p)}
        self._also_used_otherwise |= own

    @staticmethod
    def _accumulated_in(layers: Iterable[Layer]) -> set[Layer]:
        """Return the layers with a gradient to accumulate on; none where all are zero.

        Zeros stem from a reset in place, which leaves no other trace (`grad.data.zero_()`).
        """
        grads = {la: la.anchor.grad for la in layers if la.anchor.grad is not None}
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in grads.values():
            by_device.setdefault(grad.device, []).append(grad.any())
        return set(grads) if any(bool(torch.stack(x).any()) for x in by_device.values()) else set()

    def _collect_would_be(
        self, call: LossCall, passes: list[ForwardPass], upstream: Tensor
    ) -> None:
        options, likelihood, z = self._options, call.likelihood, widened(call.output)
        uses = [use for p in passes for use in p.uses]
        weights = likelihood.curvature_weights(z, call.target, upstream)
        sampling = (options.fisher_type, options.mc_samples, self._labels.generator())
        terms = likelihood.num_terms(z, call.target)
        share = self._share(terms)
        # A layer's uses in one forward pass count together.
        groups = [own for p in passes for own in group_by_layer(p.uses).values()]
        group_of = {use: number for number, own in enumerate(groups) for use in own}
        candidates, reached = self._candidates, set[LayerUse]()
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

    def _share(self, terms: Tensor) -> Tensor | float:
        """Return what a backward pass's G counts in a step of several.

        A recognised loss brings its factor in the objective. A stated mean is taken for the mean
        over all data since the last step; `finish` divides by the number of terms.
        """
        likelihood = self._options.likelihood
        return terms if likelihood is not None and likelihood.reduction == "mean" else 1.0

    def _collect_empirical(
        self, call: LossCall, passes: list[ForwardPass], upstream: Tensor
    ) -> None:
        likelihood, z = call.likelihood, widened(call.output)
        if likelihood.reduction == "none":
            raise UnsupportedLossError(
                'fisher_type="empirical" needs a loss with reduction "mean" or "sum"; got "none". '
                'Let the loss reduce, or use fisher_type="mc".'
            )
        terms = likelihood.num_terms(z, call.target)
        scale = upstream.abs().to(z)
        if likelihood.reduction == "mean":
            scale = scale / terms
        for p in passes:
            entry = next((e for e in self._empirical if e.forward_pass is p), None)
            if entry is None:
                entry = EmpiricalPass(p, self._empirical_gradient)
                self._empirical.append(entry)
            entry.add_loss(call.output, scale, terms)

    def _empirical_gradient(self, entry: EmpiricalPass, use: LayerUse, grad: Tensor) -> None:
        """Take a gradient by a layer's output; fold it when the layer's other uses have come."""
        if in_would_be_pass() or torch._C._current_graph_task_id() != self._task:
            return
        if entry.add_gradient(use, grad):
            self._fold_empirical(entry, use.layer)

    def _fold_empirical(self, entry: EmpiricalPass, layer: Layer) -> None:
        """Turn a layer's gradients in the user's own backward pass into moments."""
        grads = entry.take_gradients(layer)
        if not grads:
            return
        scale, terms = entry.scale_and_terms()
        own = list(grads)
        share = self._share(terms) / scale
        self._candidates.count_gradients(layer, own, list(grads.values()), share)
        self._candidates.count_terms(layer, terms)
        self._candidates.count_inputs(own)

    def _confirm(self, layer: Layer) -> None:
        """Let a layer's candidates count: its parameter's gradient has been accumulated."""
        self.reached.add(layer)
        if torch._C._current_graph_task_id() != self._task:
            return
        self._confirmed = True
        self.exchange.accumulated(layer.anchor)
        for entry in self._empirical:  # uses of the layer that no gradient reached are left out
            self._fold_empirical(entry, layer)
        candidate = self._candidates.by_layer.pop(layer, None)
        if candidate is not None:
            self._labels_of_task = None
            self._pending.setdefault(layer, Moments()).add(candidate)

    def objective(self) -> list[ObjectiveTerm]:
        """Return the losses whose gradients have been accumulated since the last step."""
        if self._confirmed or not self._objective:
            return [*self._objective, *self._candidate_terms]
        return list(self._objective)

    def finish(self) -> dict[Layer, Moments]:
        """Return what was collected since the last step, and forget it.

        Where no gradient was accumulated at all, the last backward pass counts: the gradients come
        from `torch.autograd.grad`.
        """
        pending = self._pending or self._candidates.by_layer
        self.undercounted = self._also_used_otherwise
        pending = {la: m for la, m in pending.items() if la not in self.undercounted}
        if pending:
            self._labels_of_step = None
        if not self._pending:  # else a task that was not confirmed gives its labels back
            self._labels_of_task = None
        likelihood = self._options.likelihood
        if likelihood is not None and likelihood.reduction == "mean":
            for moments in pending.values():
                moments.scale_curvature(1 / moments.terms)
        self.clear()
        return pending


def _is_foreign_call(module: nn.Module) -> bool:
    """Tell whether a forward pass is none of the user's training loop.

    kfacopt's own evaluations, transforms of `torch.func`, traces of `torch.jit` and `torch.export`,
    and the recomputation of activation checkpointing, which happens within a backward pass.
    """
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel runs copies of the modules whose parameters are not the optimizer's. "
            "Use nn.parallel.DistributedDataParallel."
        )
    return (
        is_evaluating()
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._current_graph_task_id() != -1
    )
