"""Objectives that a closure evaluates; what a step makes of them is in `self_tuning`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.optim.steps.replay import undisturbed
from kfacopt.optim.watch.recorded_calls import Term


@dataclass(frozen=True)
class ClosureLoss:
    """An objective that a closure evaluates.

    Attributes:
        value: What it returned at θ.
        evaluate: Calls it again, without a trace.
    """

    value: float
    evaluate: Callable[[], float]


def closure_loss(
    closure: Callable[[], Any],
    loss: Any,
    params: Sequence[Parameter],
    terms: Sequence[Term],
    over_ranks: Callable[[Tensor], Tensor],
) -> ClosureLoss:
    """Return an objective as a closure evaluates it, which leaves the gradients alone.

    Args:
        closure: Returns the objective.
        loss: What it returned at θ.
        params: The optimizer's parameters.
        terms: The losses that it computed then.
        over_ranks: Averages numbers over all processes.
    """

    def evaluate() -> float:
        grads = [(p, p.grad) for p in params]
        for p, _ in grads:
            p.grad = None
        try:
            with undisturbed(terms), torch.enable_grad():
                return float(over_ranks(_detached(closure())))
        finally:
            for p, grad in grads:
                p.grad = grad

    return ClosureLoss(float(over_ranks(_detached(loss))), evaluate)


def _detached(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor | float | int):
        raise ValueError(f'closure must return the loss for lr="auto", got {type(loss).__name__}.')
    return torch.as_tensor(loss, dtype=torch.float64).detach()
