"""Watch forward passes, losses and gradients in the user's own loop; nothing is computed here.

Hooks on the modules that contain the parameters record the uses of layers; a hook on the loss value
that the user computes tells when the user's backward pass arrives there. That is the moment when it
is known that the loss counts, and with what factor: `loss / k`, `0.3 * loss_1 + 0.7 * loss_2`, or a
sum divided by the number of tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten

from kfacopt.data import is_evaluating
from kfacopt.kfac.capture import in_would_be_pass, record_use
from kfacopt.kfac.layers import Layer
from kfacopt.optim.settings import CurvatureSettings
from kfacopt.optim.watch.activation_checkpointing import refuse_reentrant_checkpointing
from kfacopt.optim.watch.arrivals import ArrivalWatch
from kfacopt.optim.watch.compilation import (
    is_called_from_compiled_code,
    leave_hooks_uncompiled,
    run_uncompiled,
)
from kfacopt.optim.watch.forward_pass import ForwardPass, note_loss
from kfacopt.optim.watch.hooks import come_first, gradient_hooks, module_hooks, remove_hooks
from kfacopt.optim.watch.loss_calls import LossCall
from kfacopt.optim.watch.objectives import Objective
from kfacopt.optim.watch.probed_tensors import (
    LossCallMode,
    ProbedTensor,
    carry_probes,
    passes_feeding,
    probe,
    record_call,
    unprobe,
)
from kfacopt.optim.watch.recorded_calls import LossOrigin, Surroundings
from kfacopt.optim.watch.recurrence import RecurrenceWatch
from kfacopt.optim.watch.wrappers import WrapperWatch, follow_through_wrapper, unwrapped


class LossReceiver(Protocol):
    """Who is told of what was watched: the one way from `watch` to the rooms below.

    Attributes:
        collecting: Whether statistics are due; where they are not, forward passes and losses may
            still be recorded.
    """

    collecting: bool

    def arrive_at_loss(
        self, call: LossCall, passes: list[ForwardPass], upstream: Tensor, origin: LossOrigin | None
    ) -> None:
        """Take note that the user's backward pass has arrived at a loss.

        Args:
            call: What the loss means.
            passes: The forward passes that it depends on.
            upstream: The derivative of the objective by the loss.
            origin: Where it was computed, if calls are recorded.
        """

    def arrive_at_objective(self, objective: Objective, upstream: Tensor) -> None:
        """Take note that the user's backward pass starts at a scalar, before all else.

        Args:
            objective: The scalar.
            upstream: The derivative that the pass starts with.
        """

    def arrive_at_output(
        self, behind: GradientEdge, value: Tensor, passes: list[ForwardPass]
    ) -> None:
        """Take note that the user's backward pass has arrived at an output z.

        Args:
            behind: Where a backward pass from z to the layers starts.
            value: z, without a graph.
            passes: The forward passes that it depends on.
        """

    def accumulate_gradient(self, layer: Layer) -> None:
        """Take note that the gradient of a layer's parameter has been accumulated."""


class Watch:
    """The hooks on a model, and what they have seen since the last step.

    Args:
        layers: The layers with their modules.
        modules: All modules that contain any trained parameter, with their names.
        settings: Which curvature is collected.
        receiver: Is told of losses and gradients.
        wrappers: Is told when a forward pass reaches a layer.
        recurrence: Makes loops of recurrent modules.

    Attributes:
        uncompiled: The kind of the module that was called with hooks from compiled code, if any.
        forward_seen: Whether a forward pass went through the hooks since the last step.
        transformed: Whether one happened within transforms of `torch.func`, or in forward mode.
        used: Whether one of them called a layer.
        recording: Whether forward passes and losses are recorded, to be evaluated again.
    """

    def __init__(
        self,
        layers: Iterable[tuple[Layer, list[nn.Module]]],
        modules: Iterable[tuple[str, nn.Module]],
        settings: CurvatureSettings,
        receiver: LossReceiver,
        wrappers: WrapperWatch,
        recurrence: RecurrenceWatch,
    ) -> None:
        self._settings, self._receiver, self._wrappers = settings, receiver, wrappers
        self.recording = settings.recording
        self._outermost: tuple[nn.Module, ForwardPass, list[ForwardPass]] | None = None
        self._mode: LossCallMode | None = None
        self._arrivals, self._recurrence = ArrivalWatch(receiver), recurrence
        leave_hooks_uncompiled(ProbedTensor)
        self._passes: weakref.WeakSet[ForwardPass] = weakref.WeakSet()
        self.uncompiled: type[nn.Module] | None = None
        self._layers_of: dict[int, list[Layer]] = {}
        self._layers: list[Layer] = []
        for layer, own in layers:
            self._layers.append(layer)
            for module in own:
                self._layers_of.setdefault(id(module), []).append(layer)
        self._modules = [(name, weakref.ref(module)) for name, module in modules]
        self._handles: list[Any] = []
        weakref.finalize(self, remove_hooks, self._handles)
        self.forget()
        self.active = True

    @property
    def active(self) -> bool:
        """Whether hooks are on the modules; they are taken off where no statistics are due."""
        return bool(self._handles)

    @active.setter
    def active(self, active: bool) -> None:
        if active and not self._handles:
            modules = [module for _, module in self.living_modules()]
            layers = {layer.anchor: layer for layer in self._layers}
            self._handles += module_hooks(modules, self._enter, self._leave)
            self._handles += self._recurrence.hooks(modules)
            self._handles += gradient_hooks(layers, self._receiver.accumulate_gradient)
        elif not active:
            remove_hooks(self._handles)

    def living_modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that can have hooks, and their names."""
        living = [(name, ref()) for name, ref in self._modules]
        return [(name, module) for name, module in living if module is not None]

    def forget(self, forward_is_over: bool = True) -> None:
        """Forget what was seen since the last step.

        Args:
            forward_is_over: Whether no backward pass of an earlier forward pass will come.
        """
        if forward_is_over:
            self.forward_seen = self.used = self.transformed = False

    def close_passes(self) -> None:
        """Let outputs and losses that are left of the step be plain tensors."""
        for forward_pass in list(self._passes):
            forward_pass.close()
        self._passes.clear()

    # Forward passes --------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if is_evaluating():
            run_uncompiled()
            return None
        if not torch.is_grad_enabled() and self._outermost is None:
            self._sleep_during(module)
            return None
        if self._outermost is not None and module is self._outermost[0]:
            self._end_pass()  # it was left by an exception that runs no hooks, as Ctrl-C does
        if run_uncompiled() and self._outermost is None:
            self.uncompiled = type(module)
        come_first(module)
        if self._outermost is not None or not torch.is_grad_enabled():
            return None
        self.transformed |= _is_transformed()
        if _is_foreign_call(module):
            _refuse_recomputation(self._layers_of.get(id(module), ()))
            return None
        parents = passes_feeding((args, kwargs))
        for parent in parents:
            parent.consumed = True
        call = None
        if self.recording:
            call = record_call(unwrapped(module), args, kwargs, Surroundings.now())
        forward_pass = ForwardPass(self, call)
        self._outermost = (module, forward_pass, parents)
        self._passes.add(forward_pass)
        if self._settings.likelihood is None:
            self._mode = LossCallMode(forward_pass, parents)
            self._mode.__enter__()
        return unprobe(args), unprobe(kwargs)

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
        wanted = self._receiver.collecting or self.recording
        if wanted and not torch._C._are_functorch_transforms_active():
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
        if output is None or not (forward_pass.uses or parents or wanted):
            return None
        probed = probe(output, forward_pass, parents)
        own = [p for p in (*parents, forward_pass) if p.observer is self]
        if self._settings.likelihood is not None:
            self._arrivals.watch_stated(self._settings.likelihood, output, probed, own)
        else:
            self._arrivals.watch_unseen(own)
        follow_through_wrapper(carry_probes)
        return probed

    # Losses ----------------------------------------------------------------------------------

    def observe_loss(
        self,
        call: LossCall,
        loss: Tensor,
        passes: list[ForwardPass],
        origin: LossOrigin | None,
    ) -> None:
        """Tell the receiver when the user's backward pass arrives at a loss."""
        if self._settings.likelihood is not None or is_evaluating():
            return
        empirical = self._settings.fisher_type == "empirical"
        if not note_loss(passes, call, loss, empirical):
            return
        watch = weakref.ref(self)

        def on_backward(upstream: Tensor) -> None:
            alive = watch()
            if alive is None or in_would_be_pass():
                return
            alive._receiver.arrive_at_loss(call, passes, upstream.detach(), origin)

        loss.register_hook(on_backward)

    def observe_objective(
        self, root: Tensor, passes: list[ForwardPass], others: Sequence[Tensor], inputs: Any
    ) -> list[Any]:
        """Tell the receiver when the user's backward pass starts; see `PassObserver`."""
        if self._settings.likelihood is not None or is_evaluating() or in_would_be_pass():
            return []
        modules = [module for _, module in self.living_modules()]
        foreign = inputs is not None and not _any_parameter(modules, inputs)
        source = vars(root).get("_source")
        edges = [get_gradient_edge(other) for other in others if other.grad_fn is not None]
        objective = Objective(get_gradient_edge(root), passes, root.detach(), source, edges)
        watch = weakref.ref(self)

        def on_backward(upstream: Tensor) -> None:
            alive = watch()
            if alive is None or in_would_be_pass():
                return
            if foreign:
                alive._arrivals.foreign_task = torch._C._current_graph_task_id()
            else:
                alive._receiver.arrive_at_objective(objective, upstream.detach())

        return [root.register_hook(on_backward)]


def _any_parameter(modules: Iterable[nn.Module], inputs: Any) -> bool:
    """Tell whether parameters of modules are among what a backward pass is to end at."""
    own = {id(p) for module in modules for p in module._parameters.values()}
    return any(id(x) in own for x in tree_flatten(inputs)[0])


def _refuse_recomputation(layers: Iterable[Layer]) -> None:
    """Raise if a whole model is called by reentrant activation checkpointing.

    Its first forward pass looks like an evaluation without gradients.

    Args:
        layers: The layers that the module itself is.
    """
    if torch._C._current_graph_task_id() != -1 and not is_evaluating():
        for layer in layers:
            refuse_reentrant_checkpointing(layer.name)


def _is_transformed() -> bool:
    """Tell whether the user calls a module in a transform of `torch.func`, or in forward mode."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    active = torch._C._are_functorch_transforms_active() or forward_mode
    return bool(active) and not is_evaluating()


def _is_foreign_call(module: nn.Module) -> bool:
    """Tell whether a forward pass is none of the user's training loop.

    kfacopt's own evaluations, transforms of `torch.func`, forward mode, traces of `torch.jit` and
    `torch.export`, and the recomputation of activation checkpointing, which happens within a
    backward pass.
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
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._current_graph_task_id() != -1
    )
