"""Inverses that one rank computes for all and sends; how they are computed is in `inverses`.

Ranks with other numbers of threads, or other processors, get inverses that differ by round-off, and
eigenbases that differ by much more where eigenvalues are close. Their parameters would drift apart,
which DDP never notices. So all use the same, and each computes only its share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import Parameter

from kfacopt.kfac.layers import Block
from kfacopt.linalg.kronecker import DecompositionError
from kfacopt.optim.state.inverses import INVERSE_KEYS
from kfacopt.optim.state.running_averages import State, States

# What a rank says of a block: nothing changed, a new inverse, a failure that is passed over for the
# last inverse, and one that is an error.
_UNCHANGED, _NEW, _FAILED, _RAISED = range(4)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def share_out(blocks: Sequence[Block], ranks: int) -> list[int]:
    """Return which rank computes which block's inverse: the largest first, to who has least."""
    costs = [
        b.layer.groups * (_cost(b.layer.d_out, b.layer.ranks[1]) + _input_cost(b)) for b in blocks
    ]
    loads, owners = [0] * ranks, [0] * len(blocks)
    for i in sorted(range(len(blocks)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def _cost(side: int, rank: int) -> int:
    return side * (rank or side) ** 2


def _input_cost(block: Block) -> int:
    if block.weight is not None and block.layer.positions:
        return block.layer.positions * block.layer.channels**3
    if block.weight is None or block.layer.diagonal_input:
        return block.d_in
    return _cost(block.d_in, block.layer.ranks[0])


def update_shared(
    states: States,
    blocks: Sequence[Block],
    compute: Callable[[list[Block]], dict[Block, DecompositionError]],
    shapes: Mapping[Parameter, Mapping[str, tuple[int, ...]]],
    step: int,
    group: dist.ProcessGroup,
) -> dict[Block, DecompositionError]:
    """Compute this rank's share of the inverses of some blocks, and exchange them.

    Args:
        states: The optimizer's state.
        blocks: The blocks, in the same order on every rank.
        compute: Refreshes the state of blocks; returns those that cannot do without.
        shapes: The shapes of the entries of each parameter's state.
        step: The number of the step.
        group: The process group.

    Returns:
        The errors of all ranks.
    """
    rank, owners = dist.get_rank(group), share_out(blocks, dist.get_world_size(group))
    own = [block for block, owner in zip(blocks, owners, strict=True) if owner == rank]
    before = {b: states[b.anchor].get("inverse_failures", 0) for b in own}
    errors = compute(own)
    report = torch.zeros(len(blocks), 1 + len(INVERSE_KEYS), dtype=torch.int64)
    for row, block in zip(report, blocks, strict=True):
        if block in before:
            state = states[block.anchor]
            failed = state.get("inverse_failures", 0) > before[block]
            new = state.get("inverse_step") == step and not failed
            row[0] = _RAISED if block in errors else _FAILED if failed else _NEW * new
            row[1:] = torch.tensor([_code(state.get(key)) for key in INVERSE_KEYS])
    report = report.to(blocks[0].anchor.device)
    dist.all_reduce(report, group=group)
    for block, owner, (outcome, *codes) in zip(blocks, owners, report.tolist(), strict=True):
        state = states[block.anchor]
        if outcome == _NEW:
            _send_entries(state, block, codes, shapes[block.anchor], owner, group)
            state["inverse_step"], state["inverse_failures"] = step, 0
        elif outcome != _UNCHANGED and owner != rank:
            state["inverse_failures"] = state.get("inverse_failures", 0) + 1
        if outcome == _RAISED and owner != rank:
            errors[block] = DecompositionError(
                f"layer {block.layer.name!r}: rank {owner}, which inverts its factors for all, "
                "could not; its own error says why."
            )
    return errors


def _code(value: Tensor | None) -> int:
    return 0 if value is None else 1 + _DTYPES.index(value.dtype)


def _send_entries(
    state: State,
    block: Block,
    codes: Sequence[int],
    shapes: Mapping[str, tuple[int, ...]],
    owner: int,
    group: dist.ProcessGroup,
) -> None:
    """Give every rank the owner's entries, in the same layout, which products' round-off sees."""
    mine = dist.get_rank(group) == owner
    for key, code in zip(INVERSE_KEYS, codes, strict=True):
        if code == 0:
            state.pop(key, None)
            continue
        if mine:
            value = state[key].contiguous()
        else:
            dtype = _DTYPES[code - 1]
            value = torch.empty(shapes[key], dtype=dtype, device=block.anchor.device)
        dist.broadcast(value, dist.get_global_rank(group, owner), group=group)
        state[key] = value
