"""How matrices are multiplied that no module calls, kept in the state; how it is found is not here.

A resumed optimizer then has their layers before its first forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.nn import Parameter

from kfacopt.kfac.matrix_uses import MatrixLayout
from kfacopt.optim.state.running_averages import States

INPUTS_FIRST, BIAS = "matrix_inputs_first", "matrix_bias"
_ADAMW = ("exp_avg", "exp_avg_sq", "step")


def keep_layouts(
    states: States, layouts: Mapping[Parameter, MatrixLayout], params: Sequence[Parameter]
) -> None:
    """Put layouts into the state of matrices, which AdamW has trained until now.

    Args:
        states: The optimizer's state.
        layouts: By matrix.
        params: The optimizer's parameters, in order.
    """
    numbers = {id(p): i for i, p in enumerate(params)}
    for p, layout in layouts.items():
        bias = -1 if layout.bias is None else numbers.get(id(layout.bias), -1)
        states[p] |= {INPUTS_FIRST: int(layout.inputs_first), BIAS: bias}
        for name in _ADAMW:
            states[p].pop(name, None)


def kept_layouts(states: States, params: Sequence[Parameter]) -> dict[Parameter, MatrixLayout]:
    """Return the layouts that a state has."""
    found = {}
    for p in params:
        entries = states.get(p, {})
        if INPUTS_FIRST in entries and p.ndim == 2:
            number = int(entries.get(BIAS, -1))
            bias = params[number] if 0 <= number < len(params) else None
            found[p] = MatrixLayout(bool(entries[INPUTS_FIRST]), bias)
    return found
