"""How matrices are multiplied that no module calls, kept in the state; how it is found is not here.

A resumed optimizer then has their layers before its first forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import Parameter

from kfacopt.kfac.factor_forms import FactorForm
from kfacopt.kfac.layers.entries import ENTRIES
from kfacopt.kfac.layers.tied import tied_embedding
from kfacopt.kfac.lookup_uses import EMBEDDING, TIED
from kfacopt.kfac.matrix_layouts import MatrixLayout
from kfacopt.optim.state.initial import state_shapes
from kfacopt.optim.state.running_averages import States

Shapes = Mapping[str, tuple[int, ...]]

ROLES, BIAS = "matrix_roles", "matrix_bias"
_LETTERS, _CONVOLUTIONS, _LOOKUPS = "goi", "ct", EMBEDDING + TIED
_MANY = 2**40
_BY_ENTRIES = 2 * 3**20  # more than any with fewer axes
_ADAMW = ("exp_avg", "exp_avg_sq", "step")


def keep_layouts(
    states: States,
    layouts: Mapping[Parameter, MatrixLayout],
    params: Sequence[Parameter],
    are_layers: bool = True,
) -> None:
    """Put layouts into the state of matrices, which AdamW has trained until now.

    Args:
        states: The optimizer's state.
        layouts: By matrix.
        params: The optimizer's parameters, in order.
        are_layers: Whether AdamW does not train them any more.
    """
    numbers = {id(p): i for i, p in enumerate(params)}
    for p, layout in layouts.items():
        bias = -1 if layout.bias is None else numbers.get(id(layout.bias), -1)
        states[p] |= {ROLES: _number(layout.roles), BIAS: bias}
        for name in _ADAMW if are_layers else ():
            states[p].pop(name, None)


def agreed_layouts(
    found: Mapping[Parameter, MatrixLayout],
    free: Sequence[Parameter],
    params: Sequence[Parameter],
    group: Any,
) -> dict[Parameter, MatrixLayout]:
    """Return the layouts that any rank has found, unless two have found different ones.

    Args:
        found: What this rank has found.
        free: What all ranks have looked for, in order.
        params: The optimizer's parameters, in order.
        group: The process group; `None` if there is one process alone.
    """
    if group is None or not free:
        return dict(found)
    numbers = {id(p): i for i, p in enumerate(params)}
    rows = []
    for p in free:
        layout = found.get(p)
        bias = -1 if layout is None else numbers.get(id(layout.bias), -1)
        own = (0, 0) if layout is None else (_number(layout.roles) + 1, bias + 2)
        rows.append([n for x in own for n in (x, _MANY - x if layout is not None else 0)])
    table = torch.tensor(rows, device=free[0].device)
    dist.all_reduce(table, dist.ReduceOp.MAX, group=group)  # of each number, and of its negative
    agreed = {}
    for p, (roles, other_roles, bias, other_bias) in zip(free, table.tolist(), strict=True):
        if roles and roles + other_roles == bias + other_bias == _MANY:
            own_bias = params[bias - 2] if bias > 1 else None
            agreed[p] = MatrixLayout(_roles(roles - 1, p.ndim), own_bias)
    return agreed


def shapes_to_load(
    p: Parameter, entries: Mapping[str, Any], shapes: Mapping[Parameter, Shapes], form: FactorForm
) -> Shapes:
    """Return the shapes that a parameter's saved entries must have.

    Args:
        p: The parameter.
        entries: Its saved state, which tells whether it is a tied weight.
        shapes: What they are by the layers that the optimizer has.
        form: How factors are formed.
    """
    if entries.get(ROLES) == _number(TIED) and p.ndim == 2:
        return state_shapes([p], [tied_embedding("", p)], form)[p]
    return shapes[p]


def kept_layouts(states: States, params: Sequence[Parameter]) -> dict[Parameter, MatrixLayout]:
    """Return the layouts that a state has."""
    found = {}
    for p in params:
        entries = states.get(p, {})
        if ROLES in entries and (p.ndim > 1 or entries[ROLES] == _BY_ENTRIES):
            number = int(entries.get(BIAS, -1))
            bias = params[number] if 0 <= number < len(params) else None
            found[p] = MatrixLayout(_roles(int(entries[ROLES]), p.ndim), bias)
    return found


def _number(roles: str) -> int:
    """Return roles as a number, as states have numbers alone: an even one for digits to the base 3.

    An odd one is for convolutions, with their number of groups, or, as if of none, for lookups; one
    is for parameters by their entries.
    """
    if roles == ENTRIES:
        return _BY_ENTRIES
    if roles in _LOOKUPS:
        return 1 + 2 * _LOOKUPS.index(roles)
    if roles[0] in _CONVOLUTIONS:
        return 4 * int(roles[1:]) + 1 + 2 * _CONVOLUTIONS.index(roles[0])
    digits: list[int] = [_LETTERS.index(x) * 3**i for i, x in enumerate(roles)]
    return 2 * sum(digits)


def _roles(number: int, axes: int) -> str:
    if number == _BY_ENTRIES:
        return ENTRIES
    if number % 2 and number < 4:
        return _LOOKUPS[number // 2]
    if number % 2:
        return f"{_CONVOLUTIONS[number // 2 % 2]}{number // 4}"
    number //= 2
    return "".join(_LETTERS[number // 3**i % 3] for i in range(axes))
