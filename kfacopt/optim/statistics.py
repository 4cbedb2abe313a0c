"""Collect the statistics of curvature in the user's own training loop.

Hooks on the modules that contain the parameters record the uses of layers; a hook on the loss value
that the user computes turns them into moments when the user's backward pass arrives there. That is
the moment when it is known that the loss counts, and with what factor: `loss / k`,
`0.3 * loss_1 + 0.7 * loss_2`, or a sum divided by the number of tokens are the user's objective,
and the factors are those of the objective.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfacopt.data import is_evaluating
from kfacopt.kfac.capture import (
    LayerUse,
    group_by_layer,
    in_would_be_pass,
    loss_vectors,
    record_use,
    would_be_gradients,
)
from kfacopt.kfac.factors import FactorForm, grad_output_moment, input_moment
from kfacopt.kfac.layers import Layer
from kfacopt.likelihoods import FisherType, Likelihood, UnsupportedLossError
from kfacopt.optim.loss_calls import LossCall
from kfacopt.optim.loss_probe import (
    ForwardPass,
    LossCallMode,
    differentiable_tensors,
    passes_feeding,
    probe,
    unprobe,
)


@dataclass
class Moments:
    """What one layer's statistics since the last step add up to.

    Attributes:
        input_sum: Σ a aᵀ.
        rows: How many vectors it sums.
        grad_output_sum: Σ g gᵀ.
        terms: How many terms of the loss they stem from, a scalar tensor.
    """

    input_sum: Tensor | float = 0.0
    rows: int = 0
    grad_output_sum: Tensor | float = 0.0
    terms: Tensor | float = 0.0

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, G and the number of terms."""
        A, G = (torch.as_tensor(x) for x in (self.input_sum, self.grad_output_sum))
        return A / self.rows, G, torch.as_tensor(self.terms)


@dataclass(frozen=True)
class CurvatureOptions:
    """Which curvature is collected.

    Attributes:
        fisher_type: `"mc"`, `"type-2"` or `"empirical"`.
        mc_samples: Labels drawn for each datum.
        form: How factors are formed.
        likelihood: The stated loss at the model's output; `None` recognises it.
    """

    fisher_type: FisherType
    mc_samples: int
    form: FactorForm
    likelihood: Likelihood | None

    @property
    def loss_scale_power(self) -> int:
        """How often G carries a factor on the loss that is not the objective's: a loss scale.

        A recognised loss's factor is carried once. A stated loss is not looked at, but the
        gradients of an empirical Fisher carry the factor, squared.
        """
        if self.likelihood is None:
            return 1
        return 2 if self.fisher_type == "empirical" else 0


class _Hook:
    """A module hook that keeps its owner alive no longer than others do.

    A copied or unpickled module carries a dead hook: the copy is not the optimizer's.
    """

    def __init__(self, method: Callable[..., Any] | None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        method = None if self._method is None else self._method()
        return None if method is None else method(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


class StatisticsCollector:
    """Statistics of layers in ordinary forward and backward passes.

    Args:
        layers: The layers with their modules.
        modules: All modules that contain any trained parameter, with their names.
        options: Which curvature is collected.
        generator: Draws labels.
    """

    def __init__(
        self,
        layers: Iterable[tuple[Layer, list[nn.Module]]],
        modules: Iterable[tuple[str, nn.Module]],
        options: CurvatureOptions,
        generator: Generator,
    ) -> None:
        self._options, self._generator = options, generator
        self.active = True
        self.pending: dict[Layer, Moments] = {}
        self.forward_seen = False
        self.unknown_losses: set[str] = set()
        self._open: list[_EmpiricalPass] = []
        self._outermost: tuple[nn.Module, ForwardPass, list[ForwardPass]] | None = None
        self._depth = 0
        self._task = -1  # of the user's backward pass that runs
        self._mode: LossCallMode | None = None
        self._layers_of: dict[int, list[Layer]] = {}
        for layer, own in layers:
            for module in own:
                self._layers_of.setdefault(id(module), []).append(layer)
        handles = []
        self._modules: list[tuple[str, weakref.ref[nn.Module]]] = []
        for name, module in modules:
            self._modules.append((name, weakref.ref(module)))
            enter, leave = _Hook(self._enter), _Hook(self._leave)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        self._finalizer = weakref.finalize(self, _remove, handles)

    def living_modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules with hooks, and their names."""
        living = [(name, ref()) for name, ref in self._modules]
        return [(name, module) for name, module in living if module is not None]

    def remove_hooks(self) -> None:
        """Take the hooks off the modules."""
        self._finalizer()

    def clear(self) -> None:
        """Forget all statistics since the last step."""
        self.pending, self._open = {}, []
        self.forward_seen = False
        self.unknown_losses = set()

    # Hooks -----------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.active or not torch.is_grad_enabled():
            return None
        if self._outermost is not None:
            self._depth += module is self._outermost[0]
            return None
        if _is_foreign_call(module):
            return None
        parents = [p for p in passes_feeding((args, kwargs)) if p.observer is self]
        for parent in parents:
            parent.consumed = True
        self._depth = 1
        forward_pass = ForwardPass(self)
        self._outermost = (module, forward_pass, parents)
        self._mode = None
        if self._options.likelihood is None:
            self._mode = LossCallMode(forward_pass, parents)
            self._mode.__enter__()
        return unprobe(args), unprobe(kwargs)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._outermost is None:
            return None
        outermost, forward_pass, parents = self._outermost
        for layer in self._layers_of.get(id(module), ()):
            if torch._C._are_functorch_transforms_active():
                continue
            use = record_use(layer, module, args, kwargs, output)
            if use is not None:
                forward_pass.uses.append(use)
        if module is not outermost:
            return None
        self._depth -= 1
        if self._depth:
            return None
        self._outermost = None
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None
        if output is None or not (forward_pass.uses or parents):
            return None
        self.forward_seen = True
        probed = probe(output, forward_pass, parents)
        if self._options.likelihood is not None:
            self._watch_output(output, probed, forward_pass, [*parents, forward_pass])
        return probed

    # Losses ----------------------------------------------------------------------------------

    def observe_unknown_loss(self, name: str) -> None:
        """Remember the name of a loss function that is not known, for the error message."""
        self.unknown_losses.add(name)

    def observe_loss(
        self, call: LossCall | UnsupportedLossError, loss: Tensor, passes: list[ForwardPass]
    ) -> None:
        """Collect moments when the user's backward pass arrives at a loss."""
        if self._options.likelihood is not None or is_evaluating():
            return
        collector = weakref.ref(self)

        def on_backward(upstream: Tensor) -> None:
            alive = collector()
            if alive is None or in_would_be_pass():
                return
            if isinstance(call, UnsupportedLossError):
                raise call
            alive._collect(call, passes, upstream.detach())

        loss.register_hook(on_backward)

    def _watch_output(
        self, output: Any, probed: Any, forward_pass: ForwardPass, passes: list[ForwardPass]
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
        collector = weakref.ref(self)

        def on_backward(grads: Any) -> None:
            alive = collector()
            if alive is not None and not forward_pass.consumed and not in_would_be_pass():
                alive._collect(call, passes, torch.ones(()))

        # On the probe's own node, behind z: a hook on z's node that refers to z would be a cycle.
        (probed_output,) = differentiable_tensors(probed)
        get_gradient_edge(probed_output).node.register_prehook(on_backward)

    def _drop_stale(self) -> None:
        """Forget statistics whose gradients were reset by others than `zero_grad` here.

        A `GradScaler` skips steps, after which `model.zero_grad()` may follow. An earlier backward
        pass that reached a layer has left a gradient there.
        """
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self.pending = {
                layer: moments
                for layer, moments in self.pending.items()
                if layer.anchor.grad is not None
            }

    def _collect(self, call: LossCall, passes: list[ForwardPass], upstream: Tensor) -> None:
        self._drop_stale()
        if self._options.fisher_type == "empirical":
            self._collect_empirical(call, passes, upstream)
            return
        options, likelihood, z = self._options, call.likelihood, call.output
        uses = [use for p in passes for use in p.uses]
        weights = likelihood.curvature_weights(z.detach(), call.target, upstream)
        sampling = (options.fisher_type, options.mc_samples, self._generator)
        reached: set[LayerUse] = set()
        for vector in loss_vectors(likelihood, z, weights, *sampling):
            grads = would_be_gradients(z, uses, vector)
            by_use = {u: g for u, g in zip(uses, grads, strict=True) if g is not None}
            reached.update(by_use)
            for p in passes:
                for layer, own in group_by_layer(u for u in p.uses if u in by_use).items():
                    moment = grad_output_moment(layer, own, [by_use[u] for u in own], options.form)
                    self._moments(layer).grad_output_sum += moment
        terms = likelihood.num_terms(z.detach(), call.target)
        for p in passes:
            self._count_inputs(p, reached)
        for layer in group_by_layer(u for u in uses if u in reached):
            self._moments(layer).terms += terms

    def _collect_empirical(
        self, call: LossCall, passes: list[ForwardPass], upstream: Tensor
    ) -> None:
        likelihood, z = call.likelihood, call.output.detach()
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
            known = next((e for e in self._open if e.forward_pass is p), None)
            if known is None:
                self._open.append(_EmpiricalPass(self, p, scale, terms))
            else:
                known.scale = torch.maximum(known.scale, scale)

    def _fold_empirical(self, entry: _EmpiricalPass, layers: Iterable[Layer]) -> None:
        """Turn gradients of the user's own backward pass into moments."""
        form = self._options.form
        by_layer = group_by_layer(u for u in entry.forward_pass.uses if u in entry.grads)
        for layer in layers:
            own = by_layer.get(layer, [])
            moments = self._moments(layer)
            moment = grad_output_moment(layer, own, [entry.grads.pop(u) for u in own], form)
            moments.grad_output_sum += moment / entry.scale
            moments.terms += entry.terms
            self._count_inputs(entry.forward_pass, set(own))

    def empirical_gradient(self, entry: _EmpiricalPass, use: LayerUse, grad: Tensor) -> None:
        """Take a gradient by a layer's output; fold it when the layer's other uses have come."""
        entry.grads[use] = grad
        own = [u for u in entry.forward_pass.uses if u.layer is use.layer]
        if all(u in entry.grads for u in own):
            self._fold_empirical(entry, [use.layer])
            entry.missing.difference_update(own)
        if not entry.missing and entry in self._open:
            self._open.remove(entry)

    def finish(self) -> dict[Layer, Moments]:
        """Return what was collected since the last step, and forget it."""
        for entry in self._open:  # layers of which not every use was reached
            self._fold_empirical(entry, list(group_by_layer(entry.grads)))
        pending = self.pending
        self.clear()
        return pending

    def _count_inputs(self, forward_pass: ForwardPass, reached: set[LayerUse]) -> None:
        """Count the inputs of uses once, however many losses reach them."""
        new = [u for u in forward_pass.uses if u in reached and u not in forward_pass.counted]
        forward_pass.counted.update(new)
        for layer, own in group_by_layer(new).items():
            moment, rows = input_moment(layer, own, self._options.form)
            moments = self._moments(layer)
            moments.input_sum += moment
            moments.rows += rows

    def _moments(self, layer: Layer) -> Moments:
        return self.pending.setdefault(layer, Moments())


class _EmpiricalPass:
    """Records the gradients by the outputs of one forward pass's layers in the user's backward.

    The gradients carry the objective's factor once; G = Σ g gᵀ / scale carries it once too.
    """

    def __init__(
        self,
        collector: StatisticsCollector,
        forward_pass: ForwardPass,
        scale: Tensor,
        terms: Tensor,
    ) -> None:
        self.forward_pass, self.scale, self.terms = forward_pass, scale, terms
        self.grads: dict[LayerUse, Tensor] = {}
        self.missing = set(forward_pass.uses)
        self._collector = weakref.ref(collector)
        for i, use in enumerate(forward_pass.uses):
            use.edge.node.register_prehook(self._recorder(i, use.edge.output_nr))

    def _recorder(self, index: int, output_nr: int) -> Callable[[Any], None]:
        # The hook belongs to the graph; a reference from it to the use, which holds the graph's
        # node, would be a cycle that nothing collects.
        this = weakref.ref(self)

        def record(grads: Any) -> None:
            entry = this()
            collector = None if entry is None else entry._collector()
            if entry is None or collector is None or in_would_be_pass():
                return
            if grads[output_nr] is None:
                return
            use = entry.forward_pass.uses[index]
            if use in entry.missing:
                collector.empirical_gradient(entry, use, grads[output_nr].detach())

        return record


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _is_foreign_call(module: nn.Module) -> bool:
    """Tell whether a forward pass is none of the user's training loop.

    kfacopt's own evaluations, transforms of `torch.func`, and the recomputation of activation
    checkpointing, which happens within a backward pass.
    """
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel runs copies of the modules whose parameters are not the optimizer's. "
            "Use nn.parallel.DistributedDataParallel."
        )
    return (
        is_evaluating()
        or torch._C._are_functorch_transforms_active()
        or torch._C._current_graph_task_id() != -1
    )
