"""One call of an outermost module: what it used and returned; tensors that tell are elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.live_rows import ignored_targets
from kfacopt.optim.watch.compilation import EAGER_SPELL
from kfacopt.optim.watch.loss_calls import LossCall
from kfacopt.optim.watch.recorded_calls import Call, LossOrigin, Source


def node_key(node: Any) -> tuple[str, int]:
    """Return what tells a node of autograd's graph from others, without keeping it alive."""
    return node.name(), node._sequence_nr()


class PassObserver(Protocol):
    """Whoever wants to know about losses."""

    def observe_loss(
        self,
        call: LossCall,
        loss: Tensor,
        passes: list[ForwardPass],
        origin: LossOrigin | None,
    ) -> None:
        """Take note of a recognised loss on the outputs of forward passes.

        Args:
            call: What the loss means.
            loss: Its value.
            passes: The forward passes.
            origin: Where it was computed, if calls are recorded.
        """

    def observe_objective(
        self, root: Tensor, passes: list[ForwardPass], others: Sequence[Tensor], inputs: Any
    ) -> list[Any]:
        """Take note of a tensor that the user differentiates, until the handles are removed.

        Args:
            root: The tensor, plain while it is differentiated.
            passes: The forward passes that it depends on.
            others: What is differentiated with it, plain tensors, too.
            inputs: What it is differentiated by; `None` for all parameters.
        """


@dataclass(eq=False)
class ModelOutput:
    """A differentiable tensor z that an outermost module returned.

    Attributes:
        edge: The gradient edge of the probe that the user has: ∂L/∂z of an objective L arrives
            there, without what goes through other outputs.
        behind: That of the module's own tensor: a backward pass to the layers starts there.
        value: z, without a graph.
        version: Its version counter.
        source: Where it was computed, if calls are recorded.
    """

    edge: GradientEdge
    behind: GradientEdge
    value: Tensor
    version: int
    source: Source | None

    @classmethod
    def of(cls, probe: Tensor, tensor: Tensor, source: Source | None) -> ModelOutput:
        """Make the record of a tensor and its probe."""
        with torch._C.DisableTorchFunctionSubclass():
            value = tensor.detach()
            edges = get_gradient_edge(probe), get_gradient_edge(tensor)
        return cls(*edges, value, value._version, source)


class ModelOutputs(list[ModelOutput]):
    """What an outermost module returned; can be referred to weakly."""


class ForwardPass:
    """One call of an outermost module: the layers that it used.

    It is referred to by the outputs and the loss's graph alone and goes away with them. Until then,
    or until it is closed, compiled code runs eagerly.

    Attributes:
        uses: The uses of layers, in order.
        consumed: Whether its output became the input of another outermost module.
        call: The call, recorded for a replay; `None` where nothing is recorded.
        recognised: The nodes of known losses on it, as `node_key` has them.
        ignored: Which targets known losses without a reduction ignore, by these losses' nodes.
        derivatives: Those of derivatives that `torch.autograd.grad` took of it.
    """

    def __init__(self, observer: PassObserver, call: Call | None = None) -> None:
        """Start without any use."""
        # Weak: an output that is kept must not keep a deleted optimizer at work.
        self._observer = weakref.ref(observer)
        self.uses: list[LayerUse] = []
        self._new_outputs: ModelOutputs | None = ModelOutputs()
        self._outputs = weakref.ref(self._new_outputs)
        self.recognised: set[tuple[str, int]] = set()
        self.ignored: dict[tuple[str, int], Tensor] = {}
        self.derivatives: set[tuple[str, int]] = set()
        self.consumed = False
        self.call = call
        EAGER_SPELL.begin(self)
        self._probed: list[weakref.ref[Tensor]] = []

    @property
    def observer(self) -> PassObserver | None:
        """Who asked for this pass, or `None` if it is gone."""
        return self._observer()

    @property
    def outputs(self) -> ModelOutputs:
        """What it returned, as long as anybody has it, or tensors that follow from it."""
        outputs = self._outputs()
        return ModelOutputs() if outputs is None else outputs

    def hand_over_outputs(self) -> None:
        """Let the tensors that tell of losses on this pass alone hold its outputs.

        Hooks on the graph, up to these outputs, refer to the pass: it must not refer back.
        """
        self._new_outputs = None

    def probe(self, tensor: Tensor) -> None:
        """Take note of a tensor that tells of losses on this pass."""
        self._probed.append(weakref.ref(tensor))

    def probed_tensors(self) -> list[Tensor]:
        """Return the tensors that tell of losses on this pass, and are alive."""
        return [tensor for ref in self._probed if (tensor := ref()) is not None]

    def carry(self, before: Tensor, after: Tensor) -> None:
        """Take note that the user has another tensor in the place of one of the outputs."""
        with torch._C.DisableTorchFunctionSubclass():
            old, new = get_gradient_edge(before), get_gradient_edge(after)
        for output in self.outputs:
            if output.edge == old:
                output.edge = new

    def close(self) -> None:
        """Let the tensors that told of losses on this pass alone be plain ones again."""
        EAGER_SPELL.end(self)
        for ref in self._probed:
            tensor = ref()
            own = {} if tensor is None else vars(tensor)
            if "_passes" in own:
                own["_passes"] = tuple(p for p in own["_passes"] if p is not self)
                if not own["_passes"]:
                    own.pop("_source", None)
                    own.pop("_outputs", None)
                    del own["_passes"]
                    tensor.__class__ = Tensor
        self._probed.clear()


def note_loss(passes: Sequence[ForwardPass], call: LossCall, loss: Tensor, empirical: bool) -> bool:
    """Take note of a known loss on forward passes, and tell whether it counts on its own.

    For the empirical Fisher the loss of a datum is whatever the objective makes of it; what a loss
    without a reduction tells is which targets are ignored.

    Args:
        passes: The forward passes.
        call: What the loss means.
        loss: Its value.
        empirical: Whether the empirical Fisher is collected.
    """
    key = node_key(loss.grad_fn)
    if not (empirical and call.likelihood.reduction == "none"):
        for forward_pass in passes:
            forward_pass.recognised.add(key)
        return True
    ignored = ignored_targets(call.likelihood, call.target)
    if ignored is not None:
        for forward_pass in passes:
            forward_pass.ignored[key] = ignored
    return False
