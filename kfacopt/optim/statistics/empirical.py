"""The empirical Fisher from the user's own backward pass; would-be gradients are in `would_be`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kfacopt.kfac.capture import LayerUse, group_by_layer, in_would_be_pass
from kfacopt.kfac.layers import Layer
from kfacopt.likelihoods import widened
from kfacopt.optim.statistics.backward_pass import CandidateMoments
from kfacopt.optim.watch.forward_pass import ForwardPass
from kfacopt.optim.watch.loss_calls import LossCall


class EmpiricalPass:
    """Records the gradients by the outputs of one forward pass's layers in one backward pass.

    For the objective κ Σ_n ℓ_n the gradients are g = κ ∇ℓ_n; Σ g gᵀ / κ is the factor of κ Σ_n ∇ℓ_n
    ∇ℓ_nᵀ. Losses on the same tensor add up to one with the sum of their κ; losses on different
    tensors are taken for losses on different data, κ for their mean.

    Args:
        forward_pass: The forward pass.
        receive: A method that takes this record, a use and its gradient.
    """

    def __init__(
        self, forward_pass: ForwardPass, receive: Callable[[EmpiricalPass, LayerUse, Tensor], None]
    ) -> None:
        self.forward_pass = forward_pass
        self._uses_of: dict[Layer, list[LayerUse]] = {}
        self._hooked, self._receive = 0, weakref.WeakMethod(receive)
        self._grads: dict[Layer, dict[LayerUse, Tensor]] = {}
        self._losses: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
        self.follow_uses()

    def follow_uses(self) -> None:
        """Put hooks on the uses that became known since: a loss may show further ones."""
        uses = self.forward_pass.uses
        for i, use in enumerate(uses[self._hooked :], self._hooked):
            hook = self._recorder(i, use.edge.output_nr, self._receive)
            use.edge.node.register_prehook(hook)
        if len(uses) > self._hooked:
            self._hooked, self._uses_of = len(uses), group_by_layer(uses)

    def add_loss(self, output: Tensor, scale: Tensor, terms: Tensor) -> None:
        """Take note of a loss.

        Args:
            output: The tensor z that it saw.
            scale: κ, its factor in the objective, a scalar.
            terms: Its number of data, a scalar.
        """
        key = (output.data_ptr(), output.shape)
        known = self._losses.get(key)
        self._losses[key] = (scale if known is None else known[0] + scale, terms)

    @property
    def of_losses(self) -> bool:
        """Whether the losses are known; else κ is not, and taken for that of a mean."""
        return bool(self._losses)

    def add_gradient(self, use: LayerUse, grad: Tensor) -> bool:
        """Take note of a gradient by a layer's output; tell whether it was the layer's last one."""
        arrived = self._grads.setdefault(use.layer, {})
        arrived[use] = grad
        return len(arrived) == len(self._uses_of[use.layer])

    def take_gradients(self, layer: Layer) -> dict[LayerUse, Tensor]:
        """Return the gradients that have arrived for a layer, by use, in order; forget them."""
        arrived = self._grads.pop(layer, {})
        return {use: arrived[use] for use in self._uses_of.get(layer, []) if use in arrived}

    def scale_and_terms(self) -> tuple[Tensor, Tensor]:
        """Return κ of the objective and its number of data; both are 0 where all are ignored."""
        scales, counts = (torch.stack(own) for own in zip(*self._losses.values(), strict=True))
        terms = counts.sum()
        return (scales * counts).sum() / terms.clamp(min=1), terms

    def _recorder(
        self, index: int, output_nr: int, receive: weakref.WeakMethod[Any]
    ) -> Callable[[Any], None]:
        # The hook belongs to the graph; a reference from it to the use, which holds the graph's
        # node, would be a cycle that nothing collects.
        this = weakref.ref(self)

        def record(grads: Any) -> None:
            entry, method = this(), receive()
            if entry is not None and method is not None and grads[output_nr] is not None:
                method(entry, entry.forward_pass.uses[index], grads[output_nr].detach())

        return record


class EmpiricalPasses:
    """The records of one backward pass of the user's.

    Args:
        task: The number of that pass.
        candidates: Counts the gradients.
        squares: Counts those of objectives of which nothing else is known.
    """

    def __init__(self, task: int, candidates: CandidateMoments, squares: CandidateMoments) -> None:
        self._task, self._candidates, self._squares = task, candidates, squares
        self._entries: dict[ForwardPass, EmpiricalPass] = {}
        self._rows = 0

    def add_loss(self, call: LossCall, passes: list[ForwardPass], upstream: Tensor) -> None:
        """Take note of a loss, at which the backward pass has arrived.

        Args:
            call: What the loss means.
            passes: The forward passes that it depends on.
            upstream: The derivative of the objective by the loss.
        """
        likelihood, z = call.likelihood, widened(call.output)
        terms = likelihood.num_terms(z, call.target)
        scale = upstream.abs().to(z)
        if likelihood.reduction == "mean":
            scale = scale / terms
        for p in passes:
            self._entry(p).add_loss(call.output, scale, terms)

    def add_unseen(self, value: Tensor, passes: list[ForwardPass]) -> None:
        """Take note of an objective that was not seen, whose gradient arrives at an output.

        Args:
            value: The output, whose rows are data.
            passes: The forward passes that it depends on.
        """
        self._rows = max(self._rows, value.shape[0] if value.ndim else 1)
        for p in passes:
            self._entry(p)

    def _entry(self, forward_pass: ForwardPass) -> EmpiricalPass:
        if forward_pass not in self._entries:
            self._entries[forward_pass] = EmpiricalPass(forward_pass, self._take_gradient)
        entry = self._entries[forward_pass]
        entry.follow_uses()
        return entry

    def fold(self, layer: Layer) -> None:
        """Count a layer's gradients; uses that none has reached are left out."""
        for entry in self._entries.values():
            self._fold(entry, layer)

    def _take_gradient(self, entry: EmpiricalPass, use: LayerUse, grad: Tensor) -> None:
        """Take a gradient by a layer's output; fold it when the layer's other uses have come."""
        if in_would_be_pass() or torch._C._current_graph_task_id() != self._task:
            return
        if entry.add_gradient(use, grad):
            self._fold(entry, use.layer)

    def _fold(self, entry: EmpiricalPass, layer: Layer) -> None:
        """Turn a layer's gradients in the user's own backward pass into moments."""
        grads = entry.take_gradients(layer)
        if not grads:
            return
        own, arrived = list(grads), list(grads.values())
        if not entry.of_losses:
            self._squares.count_gradients(layer, own, arrived, 1.0)
            self._squares.count_terms_together(layer, torch.tensor(float(self._rows)))
            self._squares.count_inputs(own)
            return
        scale, terms = entry.scale_and_terms()
        share = self._candidates.share(terms) / scale.masked_fill(terms == 0, 1.0)
        self._candidates.count_gradients(layer, own, arrived, share)
        self._candidates.count_terms(layer, terms)
        self._candidates.count_inputs(own)
