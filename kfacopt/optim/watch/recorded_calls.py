"""Calls of modules and functions, recorded up to the losses; `steps.replay` runs them again."""

from __future__ import annotations

import dataclasses
import itertools
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_flatten

from kfacopt.data import random_devices

_call_numbers = itertools.count()


@dataclass(frozen=True)
class Surroundings:
    """The state of the process that the outcome of a forward pass depends on.

    Attributes:
        random_states: Of torch's global generators: the CPU's, then the devices'.
        autocast_dtype: What the forward pass was autocast to, if it was.
    """

    random_states: list[Tensor]
    autocast_dtype: torch.dtype | None

    @classmethod
    def now(cls) -> Surroundings:
        """Take note of the present state."""
        devices = random_devices()
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
        kinds = [kind for kind in device_types() if torch.is_autocast_enabled(kind)]
        return cls(states, torch.get_autocast_dtype(kinds[0]) if kinds else None)

    def set_random_states(self) -> None:
        """Let torch's global generators draw again what they drew then."""
        torch.set_rng_state(self.random_states[0])
        for state, device in zip(self.random_states[1:], random_devices(), strict=True):
            torch.cuda.set_rng_state(state, device)


def device_types() -> tuple[str, ...]:
    """Return the kinds of devices that can be autocast here."""
    return ("cpu", "cuda") if random_devices() else ("cpu",)


@dataclass(eq=False)
class Call:
    """A recorded call of an outermost module or of a function of torch.

    Attributes:
        function: What was called.
        args: Its arguments; a `Source` where an argument was the result of a recorded call.
        kwargs: Its keyword arguments, likewise.
        surroundings: What a forward pass of a module depends on; `None` for functions.
        fixes: Whether an argument follows from parameters in a way that is not recorded. It stays
            what it was where the call is evaluated again.
        number: Counts calls in the order of time.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    surroundings: Surroundings | None = None
    fixes: bool = False
    number: int = field(default_factory=lambda: next(_call_numbers))


@dataclass(frozen=True, eq=False)
class Source:
    """Where a tensor came from: a leaf of a call's result."""

    call: Call
    leaf: int


@dataclass(frozen=True, eq=False)
class LayerSource:
    """Where a tensor came from: the output of a layer within a module's recorded call.

    Attributes:
        call: The call of the module.
        module: The layer's module.
        ordinal: Which of its calls within the module's it was.
    """

    call: Call
    module: nn.Module
    ordinal: int


@dataclass(frozen=True, eq=False)
class LossOrigin:
    """Where a loss was computed.

    Attributes:
        call: The call of the loss function, or of the module inside which it was called.
        ordinal: Which of the loss calls inside the module it was; `None` outside.
    """

    call: Call
    ordinal: int | None = None


@dataclass(eq=False)
class ObjectiveTerm:
    """A known loss with its factor in the user's objective.

    Attributes:
        origin: Where it was computed.
        output: The tensor z that it saw, without a graph.
        upstream: The derivative of the objective by the loss.
        counts: Whether it adds its value to the objective; else that of a `ScalarTerm` has it. Its
            derivatives count always.
    """

    origin: LossOrigin
    output: Tensor
    upstream: Tensor
    counts: bool = True

    @property
    def calls(self) -> list[Call]:
        """The calls that it follows from."""
        return [self.origin.call]


@dataclass(eq=False)
class ScalarTerm:
    """Any scalar of the user's objective, with the curvature that was found.

    Attributes:
        source: Where it was computed.
        output: Its value.
        upstream: The derivative that the backward pass started with.
        arrivals: Where the tensors z were computed that the curvature is at.
        gradients: Its derivatives by z, but for what goes through known losses.
        product: H⁺ v of tensors v, one for each z, from them and the factor on the objective.
    """

    source: Source
    output: Tensor
    upstream: Tensor
    arrivals: Sequence[Source | LayerSource]
    gradients: Sequence[Tensor]
    product: Callable[[Sequence[Tensor], float], list[Tensor]]

    @property
    def calls(self) -> list[Call]:
        """The calls that it follows from."""
        return [self.source.call, *(arrival.call for arrival in self.arrivals)]


Term = ObjectiveTerm | ScalarTerm


# Values that hold tensors as attributes, and may be copied.
CONTAINERS = (Distribution, SimpleNamespace, UserDict)


def tensor_leaves(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers, pytrees, dataclasses and `CONTAINERS`, in a fixed order."""
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for entry in dataclasses.fields(leaf):
                yield from tensor_leaves(getattr(leaf, entry.name))
        elif isinstance(leaf, CONTAINERS):
            for value in vars(leaf).values():
                yield from tensor_leaves(value)


def in_order(roots: Iterable[Call]) -> list[Call]:
    """Return the calls that calls depend on, themselves included, in the order of time."""
    found: dict[Call, None] = {}
    unseen = list(roots)
    while unseen:
        call = unseen.pop()
        if call not in found:
            found[call] = None
            leaves = tree_flatten((call.args, call.kwargs))[0]
            unseen += [leaf.call for leaf in leaves if isinstance(leaf, Source)]
    return sorted(found, key=lambda call: call.number)
