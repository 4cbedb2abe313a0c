"""The piece of graph between what a user differentiates and the outputs of models.

It ends at the first of these on each way back: an output of an outermost module, the value of a
known loss, which counts on its own, the output of a layer (where a model computes its loss itself,
or hands out what a hook caught), or a derivative of the model, behind which are the weights again.
Nothing here computes a derivative.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from kfacopt.kfac.capture import LayerUse
from kfacopt.optim.watch.forward_pass import ForwardPass, node_key
from kfacopt.optim.watch.recorded_calls import LayerSource, Source

# Nodes that are named where an objective is told of.
_NAMED_NODES = 4


@dataclass(frozen=True, eq=False)
class Arrival:
    """Where the piece meets a tensor z.

    Attributes:
        edge: The gradient edge at which ∂L/∂z arrives.
        behind: Where a backward pass from z to the layers starts.
        value: z without a graph; `None` for the output of a layer, which is not kept.
        source: Where z was computed, if calls are recorded.
        use: The use of a layer whose output z is.
    """

    edge: GradientEdge
    behind: GradientEdge
    value: Tensor | None
    source: Source | LayerSource | None = None
    use: LayerUse | None = None

    def known_value(self) -> Tensor | None:
        """Return z, computed again for a linear layer; `None` for others."""
        use = self.use
        if self.value is not None or use is None or type(use.module) is not nn.Linear:
            return self.value
        if use.constants is not None or use.input._version != use.version:
            return None
        weight, device = use.module.weight, use.input.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return F.linear(use.input.to(weight.dtype), weight, use.module.bias)


@dataclass(frozen=True, eq=False)
class Objective:
    """A scalar that the user differentiates.

    Attributes:
        edge: Its gradient edge.
        passes: The forward passes that it depends on.
        value: Its value.
        source: Where it was computed, if calls are recorded.
        others: What is differentiated with it: each counts on its own, also where this scalar
            depends on it.
    """

    edge: GradientEdge
    passes: list[ForwardPass]
    value: Tensor | None = None
    source: Source | None = None
    others: Sequence[GradientEdge] = ()

    def piece(self, through_outputs: bool = False) -> Piece:
        """Walk back from the scalar.

        Args:
            through_outputs: Whether outputs of models do not end the walk.
        """
        outputs = {} if through_outputs else self._outputs()
        uses = {(a.edge.node, a.edge.output_nr): a for a in self._layer_outputs()}
        losses = {key for p in self.passes for key in p.recognised}
        derivatives = {key for p in self.passes for key in p.derivatives}
        arrivals: dict[Any, Arrival] = {}
        recognised: list[Any] = []
        derived: list[GradientEdge] = []
        names: list[str] = []
        unreduced = {key: own for p in self.passes for key, own in p.ignored.items()}
        ignored: list[Tensor] = []
        others = {edge.node for edge in self.others} - {self.edge.node}
        ended: list[Any] = []
        waiting = [(self.edge.node, self.edge.output_nr)]
        seen = set(waiting)
        for key in waiting:  # which grows
            node = key[0]
            if node in others:
                ended.append(node)
            elif losses and node_key(node) in losses:
                recognised.append(node)
            elif derivatives and node_key(node) in derivatives:
                derived.append(GradientEdge(*key))
            elif key in outputs:
                arrivals[key] = outputs[key]
            elif key in uses:
                arrivals[key] = uses[key]
            else:
                if unreduced and node_key(node) in unreduced:
                    ignored.append(unreduced[node_key(node)])
                if len(names) < _NAMED_NODES and node.name() not in names:
                    names.append(node.name())
                new = [(n, nr) for n, nr in node.next_functions if n is not None]
                waiting += [entry for entry in dict.fromkeys(new) if entry not in seen]
                seen.update(new)
        found = (recognised, ended, derived)
        return Piece(self.edge, list(arrivals.values()), *found, _title(names), ignored)

    def _outputs(self) -> dict[Any, Arrival]:
        """Return where the walk ends; not at a scalar, which is a loss that the model computed."""
        return {
            (o.edge.node, o.edge.output_nr): Arrival(o.edge, o.behind, o.value, o.source)
            for p in self.passes
            for o in p.outputs
            if o.value.ndim and o.value._version == o.version
        }

    def _layer_outputs(self) -> Iterator[Arrival]:
        for p in self.passes:
            calls: Counter[nn.Module] = Counter()
            for use in p.uses:
                source = None
                if p.call is not None and use.module is not None:
                    source = LayerSource(p.call, use.module, calls[use.module])
                    calls[use.module] += 1
                yield Arrival(use.edge, use.edge, None, source, use)


@dataclass(frozen=True, eq=False)
class Piece:
    """What was found on the way back from a scalar.

    Attributes:
        edge: The scalar's gradient edge.
        arrivals: Where it ends.
        recognised: The nodes of known losses.
        ended: The nodes of scalars that are differentiated, too.
        derived: Where derivatives that `torch.autograd.grad` took begin.
        title: Its first operations, the last of them first.
        ignored: Which targets losses without a reduction ignore, for each of these, flat.
    """

    edge: GradientEdge
    arrivals: Sequence[Arrival]
    recognised: Sequence[Any]
    ended: Sequence[Any]
    derived: Sequence[GradientEdge]
    title: str
    ignored: Sequence[Tensor] = ()

    def deeper(self, passes: list[ForwardPass], number: int) -> Piece | None:
        """Return the piece that ends at the layers behind one of the outputs.

        Args:
            passes: The forward passes.
            number: The output.

        Returns:
            `None` if the output is a layer's own.
        """
        arrival = self.arrivals[number]
        if arrival.value is None:
            return None
        inner = Objective(arrival.behind, passes).piece(through_outputs=True)
        rest = [a for k, a in enumerate(self.arrivals) if k != number]
        if any(a.edge == b.edge for a in inner.arrivals for b in (arrival, *rest)):
            return None
        if any(a.edge == arrival.behind for a in inner.arrivals) or not inner.arrivals:
            return None
        return replace(self, arrivals=[*rest, *inner.arrivals])


def _title(names: Sequence[str]) -> str:
    """Return operations as their functions are called: `mean of huber_loss`."""
    stripped = [re.sub(r"Backward\d*$", "", name.rpartition("::")[2]) for name in names]
    snake = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in stripped]
    return " of ".join(snake)
