"""Finding a DDP wrapper and leaving its bookkeeping alone; nothing is sent to other ranks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel


def data_parallel_wrapper(
    params: Sequence[Parameter],
) -> weakref.ref[DistributedDataParallel] | None:
    """Return a reference to the DDP wrapper around any of the parameters, if there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wanted = {id(p) for p in params}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), DistributedDataParallel) and any(
            id(p) in wanted for p in candidate.parameters()
        ):
            return weakref.ref(candidate)
    return None


def running_wrapper() -> DistributedDataParallel | None:
    """Return the DDP wrapper whose forward pass is running, if there is one."""
    wrapper: DistributedDataParallel | None = DistributedDataParallel._active_ddp_module
    return wrapper


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module in a DDP wrapper; any other module itself.

    An evaluation again must not go through the wrapper, which counts its forward passes.
    """
    inner: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    return inner


def follow_through_wrapper(carry: Callable[[Any, Any], Any]) -> None:
    """Call a function when the outputs of the forward pass that runs have left the wrapper.

    With `find_unused_parameters` or `static_graph` a wrapper puts a custom function of its own
    behind the outputs of its module, which makes plain tensors of them. A wrapper that was made
    after the optimizer has no hooks, and hooks that its running call has not seen in the beginning
    are not called, so that the method is replaced for this call.

    Args:
        carry: Gets the outputs before and after; returns what the wrapper returns.
    """
    wrapper = running_wrapper()
    if wrapper is None or "_post_forward" in vars(wrapper):
        return
    if not (wrapper.find_unused_parameters or wrapper.static_graph):
        return
    original = wrapper._post_forward

    def once(output: Any) -> Any:
        del vars(wrapper)["_post_forward"]
        return carry(output, original(output))

    vars(wrapper)["_post_forward"] = once


@contextmanager
def bookkeeping_kept(edges: Iterable[GradientEdge]) -> Iterator[None]:
    """Let extra backward passes from edges of a graph leave DDP wrappers as they are.

    In the first iteration of `static_graph` the wrapper's node, wherever it stands between the
    tensor and the layers, has all gradients averaged at the end of the backward pass that comes
    first. That must be the user's.

    Args:
        edges: Where the passes start.
    """
    waiting = []
    if dist.is_available() and dist.is_initialized():
        waiting = [
            wrapper
            for wrapper in _wrappers_in_graph(edges)
            if wrapper.static_graph and not wrapper._static_graph_delay_allreduce_enqueued
        ]
    for wrapper in waiting:
        wrapper._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for wrapper in waiting:
            wrapper._static_graph_delay_allreduce_enqueued = False


def _wrappers_in_graph(edges: Iterable[GradientEdge]) -> set[DistributedDataParallel]:
    """Return the wrappers that have nodes of their own in a graph."""
    found: set[DistributedDataParallel] = set()
    unseen: list[Node] = [edge.node for edge in edges]
    seen = set(unseen)
    while unseen:
        node = unseen.pop()
        wrapper = getattr(node, "ddp_weakref", None)
        if wrapper is not None:
            found.add(wrapper())
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        unseen += new
    return found


class WrapperWatch:
    """Knows the DDP wrapper around an optimizer's parameters, also one that comes later.

    A wrapper is seen when its forward pass reaches a layer. The process is searched, which takes
    long, once in a process group, and again when the wrapper that was known is gone.
    """

    def __init__(self) -> None:
        """Start without a wrapper."""
        self._known: weakref.ref[DistributedDataParallel] | None = None
        self._searched = False

    def look(self) -> None:
        """Take note of the wrapper whose forward pass is running."""
        wrapper = running_wrapper()
        if wrapper is not None and (self._known is None or self._known() is not wrapper):
            self._known = weakref.ref(wrapper)

    def rank_among_several(self) -> int | None:
        """Return this process's rank under a known wrapper; `None` if it is alone."""
        wrapper = None if self._known is None else self._known()
        if wrapper is None or not dist.is_initialized():
            return None
        several = dist.get_world_size(wrapper.process_group) > 1
        return dist.get_rank(wrapper.process_group) if several else None

    def ranks_without_wrapper(self) -> bool:
        """Tell whether this process is one of several, and no wrapper was seen."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        known = self._known is not None and self._known() is not None
        return not known and dist.get_world_size() > 1

    def wrapper(self, params: Sequence[Parameter]) -> DistributedDataParallel | None:
        """Return the wrapper around any of the parameters, or `None`."""
        known = None if self._known is None else self._known()
        gone = self._known is not None and known is None
        first = not self._searched and dist.is_available() and dist.is_initialized()
        if known is None and (gone or first):
            self._searched = True
            self._known = data_parallel_wrapper(params)
            known = None if self._known is None else self._known()
        return known
