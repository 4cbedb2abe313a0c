"""What was found out about derivatives of graphs, and how long it holds; not how it is found out.

Whether a way to a derivative is right depends on the functions of a graph alone, if they are
torch's own. It is not so with functions of others, or under `torch.no_grad()`: a gate that is 0, a
batch of zeros or a masked loss hide them, and nothing is seen that is wrong. What was found there
holds for that graph; for later ones as long as the model is as it was, and only if a gradient that
is not 0 came to every function of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from kfacopt.linalg.snapshots import Observation, Snapshot

# What is asked, and the signature of the graph's functions.
Key = tuple[str, int]


class Functions:
    """The functions of which a tensor's graph is made.

    Args:
        tensor: The tensor.

    Attributes:
        signature: A number that tells graphs of other functions apart.
        custom: The names of those that are not torch's own.
    """

    def __init__(self, tensor: Tensor) -> None:
        kinds: list[str] = []
        custom: set[str] = set()
        for node in _nodes_of(tensor):
            kind = type(node).__name__
            if isinstance(node, BackwardCFunction) or kind == "CppFunction":
                custom.add(node.name().removesuffix("Backward"))
                written = getattr(type(node), "_forward_cls", None)
                kind = f"{node.name()} {getattr(written, '__module__', '')} {written}"
            kinds.append(kind)
        self.signature = hash(tuple(kinds))
        self.custom = sorted(custom)

    def __str__(self) -> str:
        return ", ".join(self.custom) or "an operation of torch"


def _nodes_of(tensor: Tensor) -> Iterator[Node]:
    """Yield the nodes of a tensor's graph, each once."""
    seen: set[Node] = set()
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(child for child, _ in node.next_functions)


def counts_everywhere(output: Tensor, leaves: Sequence[Tensor], u: Tensor) -> bool:
    """Tell whether a backward pass brings gradients that are not 0 to all functions and leaves.

    Args:
        output: A tensor with its graph.
        leaves: What it is differentiated by.
        u: A random vector at the output.
    """
    met: list[Tensor] = []

    def note(gradients: Sequence[Tensor | None]) -> None:
        met.extend((g.detach() != 0).any() for g in gradients if g is not None)

    with ExitStack() as stack:
        for node in _nodes_of(output):
            stack.callback(node.register_prehook(note).remove)
        grads = torch.autograd.grad(output, leaves, u, retain_graph=True, allow_unused=True)
    if any(g is None for g in grads):
        return False
    note([g.to_dense() if g is not None and g.is_sparse else g for g in grads])
    return bool(torch.stack(met).all())


class Verdicts:
    """Whether derivatives were found to be right."""

    def __init__(self) -> None:
        self._known: dict[Key, bool] = {}
        self._said: set[Key] = set()
        self._for_now: set[Key] = set()
        self._snapshot: Snapshot | None = None

    def get(self, key: Key, roots: Sequence[Any]) -> bool | None:
        """Return what is known, or `None`.

        Args:
            key: Of what.
            roots: What a verdict may depend on, that is not for ever.
        """
        if key in self._known:
            return self._known[key]
        if self._snapshot is not None and not self._snapshot.is_like(Observation(roots)):
            self._for_now, self._snapshot = set(), None
        return True if key in self._for_now else None

    def keep(self, key: Key, verdict: bool) -> None:
        """Keep a verdict for ever."""
        self._known[key] = verdict

    def keep_while(self, key: Key, roots: Sequence[Any]) -> None:
        """Keep that a derivative is right, as long as what it depends on stays as it is."""
        if self._snapshot is None:
            self._snapshot = Snapshot(roots)
        self._for_now.add(key)

    def warn_once(self, key: Key, message: str) -> None:
        """Warn of something when it happens for the first time."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(message, stacklevel=2)


class GraphVerdicts:
    """Verdicts on one graph.

    Args:
        verdicts: Those on all graphs of the model.
        careful: Whether they may depend on more than the graph's functions.
        roots: What they may depend on, or `None` if nobody knows.
    """

    def __init__(self, verdicts: Verdicts, careful: bool, roots: Sequence[Any] | None) -> None:
        self.careful = careful
        self._verdicts, self._roots = verdicts, roots
        self._here: dict[Key, bool] = {}

    def ask(
        self, key: Key, judge: Callable[[], bool | None], counts: Callable[[], bool] = lambda: False
    ) -> bool | None:
        """Return whether a derivative is right; what says nothing is asked again.

        Args:
            key: Which, of which functions.
            judge: Finds out. `None`: it cannot tell.
            counts: Tells whether all of the graph took part in that.
        """
        if key in self._here:
            return self._here[key]
        known = self._verdicts.get(key, self._roots or [])
        if known is None:
            known = judge()
            if known is None:
                return None
            if not known or not self.careful:
                self._verdicts.keep(key, known)
            elif self._roots is not None and counts():
                self._verdicts.keep_while(key, self._roots)
        self._here[key] = known
        return known
