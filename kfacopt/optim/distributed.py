"""What an optimizer does as one of several ranks; what each room sends is in the room."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from kfacopt.kfac.layers import Block, Layer
from kfacopt.optim.settings import Settings
from kfacopt.optim.state.running_averages import States
from kfacopt.optim.watch.wrappers import WrapperWatch


class Ranks:
    """The ranks that train one model under DistributedDataParallel; alone without a wrapper.

    Attributes:
        wrappers: Knows the wrapper.
    """

    def __init__(self) -> None:
        self.wrappers = WrapperWatch()

    def group(self, params: Sequence[Parameter]) -> dist.ProcessGroup | None:
        """Return the process group that parameters are trained in, if there is one."""
        wrapper = self.wrappers.wrapper(params)
        return None if wrapper is None else group_of(wrapper)

    def refuse_different(
        self, params: Sequence[Parameter], layers: Iterable[Layer], settings: Settings, step: int
    ) -> None:
        """Raise on all ranks if their optimizers are not the same, before they exchange more.

        Raises:
            RuntimeError: If a rank differs in what decides what it sends.
        """
        wrapper = self.wrappers.wrapper(params)
        assert wrapper is not None
        positions = {id(p): i for i, p in enumerate(wrapper.parameters())}
        own = [
            (
                positions.get(id(la.anchor)),
                (la.groups, la.d_in, la.d_out, la.positions, la.ranks),
                la.anchor.dtype,
            )
            for la in layers
        ]
        alike = (settings.inverse, settings.schedule, settings.steps, settings.curvature.form)
        described = repr((own, *alike, settings.curvature.fisher_type))
        sent = (zlib.crc32(described.encode()), step)
        extremes = torch.tensor([*sent, *(-x for x in sent)], device=params[0].device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group_of(wrapper))
        largest, steps_largest, smallest, steps_smallest = extremes.tolist()
        if largest != -smallest:
            raise RuntimeError(
                "KFACOptimizer: the ranks' optimizers have different layers or settings, so that "
                "their factors cannot be averaged. Make it with the same parameters (all of them, "
                "frozen alike) and the same settings on every rank."
            )
        if steps_largest != -steps_smallest:
            raise RuntimeError(
                f"KFACOptimizer: the ranks' optimizers have made from {-steps_smallest} to "
                f"{steps_largest} steps. Load a saved state on every rank, and let all step "
                "together."
            )

    def align(self, states: States, params: Sequence[Parameter], own: list[Block]) -> None:
        """Give every rank the first one's parameters and momentum, which differ by round-off.

        Products with an inverse are rounded in other ways by other numbers of threads; over
        thousands of steps such differences grow.

        Args:
            states: The optimizer's state.
            params: Its parameters.
            own: The blocks, in the same order on every rank; parameters that their wrapper was
                told to ignore are left alone.
        """
        wrapper = self.wrappers.wrapper(params)
        if wrapper is None or dist.get_world_size(wrapper.process_group) == 1:
            return
        group, ignored = wrapper.process_group, wrapper.parameters_to_ignore
        shared = {p for name, p in wrapper.module.named_parameters() if name not in ignored}
        first, mine = dist.get_global_rank(group, 0), dist.get_rank(group) == 0
        for p in (p for block in own for p in block.parameters if p in shared):
            for value in (p.detach(), states[p].get("momentum_buffer")):
                if value is not None:
                    buffer = value.contiguous()
                    dist.broadcast(buffer, first, group=group)
                    if not mine:
                        value.copy_(buffer)


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


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the mean of numbers over all ranks; the numbers themselves without a group."""
    if group is None:
        return values
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)
