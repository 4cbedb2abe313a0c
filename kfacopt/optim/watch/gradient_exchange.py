"""Notice gradients that ranks average without a wrapper; nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import Parameter

from kfacopt.optim.watch.wrappers import WrapperWatch

# How many entries of a gradient are kept to tell whether it was changed.
_SAMPLE = 1024

# Of a change that is not a scaling, relative: far beyond the round-off of a product in bfloat16.
_CHANGE = 0.05


class ExchangeWatch:
    """Tells whether this rank's gradients were mixed with those of others.

    Nothing is sent for it, as ranks may train models of their own. There are two signs: a
    collective that runs during the backward pass, or one that runs between it and the step, with a
    gradient that is another than before in more than its scale, which clipping changes.

    Args:
        wrappers: Knows the DDP wrapper, which averages what has to be averaged.
    """

    def __init__(self, wrappers: WrapperWatch) -> None:
        self._wrappers = wrappers
        self.forget()

    def forget(self) -> None:
        """Start anew, without a backward pass."""
        self._during = False
        self._last: int | None = None
        self._sampled: tuple[Parameter, Tensor] | None = None

    def backward_begins(self) -> None:
        """Take note that a backward pass has arrived at a loss."""
        self._last, self._sampled = None, None
        if self._wrappers.ranks_without_wrapper():
            self._last = _collectives()

    def accumulated(self, parameter: Parameter) -> None:
        """Take note of a gradient that has been accumulated."""
        if self._last is None or parameter.grad is None:
            return
        now = _collectives()
        self._during = self._during or now != self._last
        self._last = now
        if self._sampled is None or self._sampled[0] is parameter:
            self._sampled = parameter, _sample(parameter.grad).clone()

    def noticed(self) -> bool:
        """Tell, in a step, whether there were signs since the last one."""
        if self._during or self._last is None or self._sampled is None:
            return self._during
        parameter, before = self._sampled
        if _collectives() == self._last or parameter.grad is None:
            return False
        return _differs_in_more_than_scale(before, _sample(parameter.grad))


def _collectives() -> int | None:
    """Return how many collectives this process has taken part in; `None` where none are counted."""
    try:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(int(group._get_sequence_number_for_group()) for group in groups)
    except (AttributeError, RuntimeError):  # private, and not every backend counts
        return None


def _sample(grad: Tensor) -> Tensor:
    flat = grad.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]


def _differs_in_more_than_scale(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    x, y = before.double(), after.double()
    rest = y - x * ((x @ y) / (x @ x).clamp(min=torch.finfo(x.dtype).tiny))
    return bool(rest.norm() > _CHANGE * y.norm())
