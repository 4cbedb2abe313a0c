"""Factors under DistributedDataParallel: what is captured is local and averaged here."""

from __future__ import annotations

import gc
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.graph import Node
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from kfacopt.kfac.factors import FactorForm, factor_dtype
from kfacopt.kfac.layers import Block, Layer
from kfacopt.optim.moments import Moments


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
def bookkeeping_kept(output: Tensor) -> Iterator[None]:
    """Let extra backward passes from a tensor leave DDP wrappers as they are.

    In the first iteration of `static_graph` the wrapper's node, wherever it stands between the
    tensor and the layers, has all gradients averaged at the end of the backward pass that comes
    first. That must be the user's.

    Args:
        output: Where the passes start.
    """
    waiting = []
    if dist.is_available() and dist.is_initialized():
        waiting = [
            wrapper
            for wrapper in _wrappers_in_graph(output)
            if wrapper.static_graph and not wrapper._static_graph_delay_allreduce_enqueued
        ]
    for wrapper in waiting:
        wrapper._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for wrapper in waiting:
            wrapper._static_graph_delay_allreduce_enqueued = False


def _wrappers_in_graph(output: Tensor) -> set[DistributedDataParallel]:
    """Return the wrappers that have nodes of their own in a tensor's graph."""
    found: set[DistributedDataParallel] = set()
    unseen: list[Node] = [] if output.grad_fn is None else [output.grad_fn]
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


def group_of(wrapper: DistributedDataParallel) -> dist.ProcessGroup:
    """Return the process group of a DDP wrapper, and refuse what would leave ranks waiting.

    Raises:
        RuntimeError: Within `wrapper.join()`, where ranks stop stepping at different times.
    """
    if wrapper._join_config.enable:
        raise RuntimeError(
            "KFACOptimizer averages factors over all ranks in step, which ranks that ran out of "
            "data in DistributedDataParallel.join() would not take part in. Give every rank the "
            "same number of batches, for instance with DistributedSampler(drop_last=True)."
        )
    group: dist.ProcessGroup = wrapper.process_group
    return group


def refuse_different_optimizers(
    description: str, steps: int, device: torch.device, group: dist.ProcessGroup
) -> None:
    """Raise on all ranks if their optimizers do not have the same to send.

    Args:
        description: What decides what this rank sends.
        steps: How many steps this rank's optimizer has made.
        device: Where the group's tensors are.
        group: The process group.

    Raises:
        RuntimeError: If a rank differs.
    """
    own = (zlib.crc32(description.encode()), steps)
    extremes = torch.tensor([*own, *(-x for x in own)], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    largest, steps_largest, smallest, steps_smallest = extremes.tolist()
    if largest != -smallest:
        raise RuntimeError(
            "KFACOptimizer: the ranks' optimizers have different layers or settings, so that their "
            "factors cannot be averaged. Make it with the same parameters (all of them, frozen "
            "alike) and the same settings on every rank."
        )
    if steps_largest != -steps_smallest:
        raise RuntimeError(
            f"KFACOptimizer: the ranks' optimizers have made from {-steps_smallest} to "
            f"{steps_largest} steps. Load a saved state on every rank, and let all step together."
        )


def average_moments(
    pending: dict[Layer, Moments],
    layers: Sequence[Layer],
    form: FactorForm,
    group: dist.ProcessGroup,
) -> dict[Layer, Moments]:
    """Combine the statistics of all ranks, second moments excepted.

    DDP's gradient is that of the mean of the ranks' objectives, whose G is the mean of theirs; A
    is the mean over all ranks' inputs. Every rank sends the same tensors, whatever it has reached,
    in one all-reduce for each dtype.

    Args:
        pending: This rank's statistics.
        layers: All layers, in the same order on every rank.
        form: How factors are formed.
        group: The process group.

    Returns:
        The same statistics on every rank.
    """
    by_dtype: dict[torch.dtype, list[tuple[Layer, list[Tensor]]]] = {}
    for layer in layers:
        dtype, device = factor_dtype(layer.anchor.dtype), layer.anchor.device
        own = pending.get(layer, Moments())
        pieces = []
        for value, side in ((own.input_sum, layer.d_in), (own.grad_output_sum, layer.d_out)):
            shape = (layer.groups, side) if form.diagonal(side) else (layer.groups, side, side)
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            pieces.append(zeros + value)
        numbers = (own.rows, own.terms)
        pieces += [torch.as_tensor(n, dtype=dtype, device=device) for n in numbers]
        by_dtype.setdefault(dtype, []).append((layer, pieces))
    result: dict[Layer, Moments] = {}
    for entries in by_dtype.values():
        flat = torch.cat([piece.reshape(-1) for _, pieces in entries for piece in pieces])
        dist.all_reduce(flat, group=group)
        split = iter(flat.split([p.numel() for _, pieces in entries for p in pieces]))
        summed = [
            tuple(next(split).reshape(piece.shape) for piece in pieces) for _, pieces in entries
        ]
        counts = torch.stack([rows for _, _, rows, _ in summed]).tolist()  # asks the device once
        for (layer, _), (A, G, _, terms), rows in zip(entries, summed, counts, strict=True):
            if rows > 0:
                mean, own = G / dist.get_world_size(group), pending.get(layer, Moments())
                corrections = (own.second_moments, own.unprojected)
                result[layer] = Moments(A, int(rows), mean, terms, *corrections)
    return result


def average_second_moments(
    values: Mapping[Block, Tensor], blocks: Sequence[Block], group: dist.ProcessGroup
) -> dict[Block, Tensor]:
    """Return the mean over all ranks of second moments, in eigenbases that they have in common.

    Args:
        values: This rank's Λ `[B, d_out, d_in]` of the blocks that it has reached.
        blocks: The blocks, in the same order on every rank.
        group: The process group.
    """
    result: dict[Block, Tensor] = {}
    for block in blocks:
        shape = (block.layer.groups, block.layer.d_out, block.d_in)
        dtype, device = factor_dtype(block.anchor.dtype), block.anchor.device
        value = torch.zeros(shape, dtype=dtype, device=device) + values.get(block, 0.0)
        dist.all_reduce(value, group=group)
        result[block] = value / dist.get_world_size(group)
    return result


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the mean of numbers over all ranks; the numbers themselves without a group.

    Args:
        values: Numbers, the same kind on every rank.
        group: The process group.
    """
    if group is None:
        return values
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)
