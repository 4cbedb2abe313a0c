"""Hooks on models' outputs: backward passes that arrive there; what scalars are is elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfacopt.kfac.capture import in_would_be_pass
from kfacopt.likelihoods import Likelihood
from kfacopt.optim.watch.forward_pass import ForwardPass
from kfacopt.optim.watch.loss_calls import LossCall
from kfacopt.optim.watch.probed_tensors import differentiable_tensors, unprobe
from kfacopt.optim.watch.recorded_calls import LossOrigin


class ArrivalReceiver(Protocol):
    """Who is told of backward passes at outputs; see `LossReceiver`."""

    def arrive_at_loss(
        self, call: LossCall, passes: list[ForwardPass], upstream: Tensor, origin: LossOrigin | None
    ) -> None:
        """Take note of a loss."""

    def arrive_at_output(
        self, behind: GradientEdge, value: Tensor, passes: list[ForwardPass]
    ) -> None:
        """Take note of an output."""


class ArrivalWatch:
    """Tells of the user's backward passes that arrive at the outputs of models.

    Args:
        receiver: Is told.

    Attributes:
        foreign_task: The backward pass that is not by parameters, of which nobody is told.
    """

    def __init__(self, receiver: ArrivalReceiver) -> None:
        self._receiver = weakref.ref(receiver)
        self.foreign_task = -1

    def watch_stated(self, likelihood: Likelihood, output: Any, probed: Any, own: Any) -> None:
        """Take the stated loss at a model's output, when a backward pass arrives there.

        Args:
            likelihood: The stated loss.
            output: What the model returned.
            probed: What the user gets.
            own: The forward passes, the model's last.
        """
        call, forward_pass = _stated_call(likelihood, output), own[-1]
        receiver = self._receiver

        def on_backward(grads: Any) -> None:
            alive = receiver()
            if alive is not None and not forward_pass.consumed and not in_would_be_pass():
                alive.arrive_at_loss(call, own, torch.ones(()), None)

        # On the probe's own node, behind z: a hook on z's node that refers to z would be a cycle.
        (probed_output,) = differentiable_tensors(probed)
        get_gradient_edge(probed_output).node.register_prehook(on_backward)

    def watch_unseen(self, own: list[ForwardPass]) -> None:
        """Tell of backward passes that arrive at outputs from nowhere that was seen.

        From a function that returns plain tensors, as those of `torch.autograd.Function` do.

        Args:
            own: The forward passes, that whose outputs are meant last.
        """
        this = weakref.ref(self)

        def hook(output_nr: int, behind: GradientEdge, value: Tensor) -> Callable[[Any], None]:
            def on_backward(grads: Any) -> None:
                watch = this()
                if watch is None or in_would_be_pass() or grads[output_nr] is None:
                    return
                receiver = watch._receiver()
                foreign = torch._C._current_graph_task_id() == watch.foreign_task
                if receiver is not None and not foreign:
                    receiver.arrive_at_output(behind, value, own)

            return on_backward

        for output in own[-1].outputs:
            record = hook(output.edge.output_nr, output.behind, output.value)
            output.edge.node.register_prehook(record)


def _stated_call(likelihood: Likelihood, output: Any) -> LossCall:
    """Return what a stated loss means at a model's output."""
    outputs = differentiable_tensors(unprobe(output))
    if len(outputs) != 1:
        raise ValueError(
            "loss_func: the model must return one differentiable tensor for a stated loss, "
            f"got {len(outputs)}. Let the loss be recognised, or wrap the model."
        )
    return LossCall(likelihood, outputs[0], None)
