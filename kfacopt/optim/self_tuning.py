"""Steps that tune themselves: step size, momentum and damping from the quadratic model.

For a proposal Δ = −F̂⁻¹g and the last step d₀ (momentum), the step is d = s (α Δ + μ d₀), where α
and μ minimise the quadratic model M with the *exact* GGN of the same data and s is the schedule's
factor. Every `DAMPING_INTERVAL` steps the reduction ratio

    ρ = (L(θ + d) − L(θ)) / (gᵀd + ½ dᵀFd)

changes the damping: λ ← ω λ where ρ > ¾, λ ← λ / ω where ρ < ¼.

References:
    Martens & Grosse (2015), https://arxiv.org/abs/1503.05671, sections 6.4, 6.5 and 7.

Deviations: the denominator of ρ has no damping, so that ρ = 1 where the objective is quadratic (as
in kfac-jax). ρ is known after every step, and λ follows it every 2 steps instead of 5, with which
the examples' PINN and autoencoder were faster. A step that raises the loss on its own data is
undone, and α and μ are solved for again with more damping. K-FAC's factors are damped by λ itself,
without a search for a second damping γ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.factors import factor_dtype
from kfacopt.optim.quadratic_model import QuadraticModel, evaluate, quadratic_model
from kfacopt.optim.replay import ObjectiveTerm

DAMPING_INTERVAL = 2
DAMPING_DECAY = 0.95**5  # ω
REJECTION_FACTOR = 4.0  # λ grows by it when a step is undone
MAX_ATTEMPTS = 12

_PREVIOUS = "previous_parameter"
_HAS_PREVIOUS = "has_previous_parameter"


def initialise_previous(state: dict[str, Any], p: Parameter) -> None:
    """Give a parameter's state the entries that the last step leaves in it, as before any step."""
    if _HAS_PREVIOUS not in state:
        state |= {_PREVIOUS: p.detach().clone(), _HAS_PREVIOUS: 0}


@dataclass
class TuningStatistics:
    """What the last self-tuned step was made of, as plain numbers.

    Attributes:
        loss: L(θ), of the losses that were recognised.
        step_size: α.
        momentum: μ.
        damping: λ, of the first group, after the step.
        reduction_ratio: ρ; `nan` where it was not evaluated.
        predicted_change: gᵀd + ½ dᵀFd.
        change: L(θ + d) − L(θ); `nan` where it was not evaluated.
        rejected_steps: How many steps were undone or left out so far.
    """

    loss: float = math.nan
    step_size: float = math.nan
    momentum: float = math.nan
    damping: float = math.nan
    reduction_ratio: float = math.nan
    predicted_change: float = math.nan
    change: float = math.nan
    rejected_steps: int = 0


def reduction_ratio_damping(damping: float, ratio: float, floor: float) -> float:
    """Return the Levenberg–Marquardt update of the damping.

    Args:
        damping: λ.
        ratio: ρ.
        floor: What λ does not go below.
    """
    if ratio > 0.75:
        return max(DAMPING_DECAY * damping, floor)
    if ratio < 0.25:
        return damping / DAMPING_DECAY
    return damping


def damping_floor(dtype: torch.dtype) -> float:
    """Return the smallest damping that decompositions of factors in a dtype make sense with."""
    return float(torch.finfo(factor_dtype(dtype)).eps)


@dataclass(frozen=True)
class ClosureLoss:
    """An objective that a closure evaluates.

    Attributes:
        value: What it returned at θ.
        evaluate: Calls it again, without a trace.
    """

    value: float
    evaluate: Callable[[], float]


class SelfTuning:
    """Chooses steps along preconditioned gradients, and keeps what the last one was made of.

    The parameters before a step stay in the optimizer's state: they give the last step d₀, and a
    step after which the loss turns out infinite or NaN is undone with them, to the bit.

    Args:
        use_momentum: Whether the last step d₀ is a direction, too.
    """

    def __init__(self, use_momentum: bool) -> None:
        self._use_momentum = use_momentum
        self.statistics = TuningStatistics()

    def step(
        self,
        states: MutableMapping[Tensor, Any],
        groups: Sequence[dict[str, Any]],
        preconditioned: Mapping[Parameter, Tensor],
        terms: Sequence[ObjectiveTerm],
        closure: ClosureLoss | None,
        loss_scale: float,
        over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> bool:
        """Update parameters in place and adapt the groups' damping.

        A step that does not decrease the objective on its own data is undone, the damping in M
        raised by `REJECTION_FACTOR`, and α and μ solved for again, up to `MAX_ATTEMPTS` times.

        Args:
            states: The optimizer's state by parameter.
            groups: The parameter groups; `lr` is the factor s, relative between groups.
            preconditioned: F̂⁻¹g of each parameter.
            terms: The losses of the objective.
            closure: Evaluates the objective where it is more than the losses that were recognised.
            loss_scale: What a `GradScaler` multiplied the objective with.
            over_ranks: Averages numbers over all processes.

        Returns:
            Whether a step was taken.

        Raises:
            RuntimeError: If the model, evaluated again, gives something else.
        """
        factor = {p: group["lr"] for group in groups for p in group["params"]}
        damping = {p: float(group["damping"]) for group in groups for p in group["params"]}
        scale, params = max(factor[p] for p in preconditioned), list(preconditioned)
        if scale == 0:
            return True
        proposal = {p: -(factor[p] / scale) * x for p, x in preconditioned.items()}
        directions = [proposal, *self._last_step(states, params)]
        grads = {p: p.grad for p in params if p.grad is not None}
        model = quadratic_model(terms, grads, directions, damping, loss_scale, over_ranks)
        record, dtype = self.statistics, params[0].dtype
        record.loss, record.change, record.reduction_ratio = model.loss, math.nan, math.nan
        if not all(math.isfinite(x) for x in model.scalars()):
            self.undo_last_step(states, groups)
            return False
        _check_replay(model, dtype)
        if closure is not None and not _same(closure.value, model.loss, dtype):
            record.loss, new_loss = closure.value, closure.evaluate
        else:
            new_loss = partial(evaluate, terms, params, loss_scale, over_ranks)
        before = [p.detach().clone() for p in params]
        for attempt in range(MAX_ATTEMPTS):
            coefficients = [scale * c for c in model.minimiser(REJECTION_FACTOR**attempt)]
            for direction, c in zip(directions, coefficients, strict=True):
                steps = [x.to(p.dtype) for p, x in direction.items()]
                torch._foreach_add_(list(direction), steps, alpha=c)
            record.change = new_loss() - record.loss
            if record.change <= 0 or _same(record.change + record.loss, record.loss, dtype):
                break
            for p, value in zip(params, before, strict=True):
                p.copy_(value)
            self._damp_more(groups)
        else:
            return False
        for p, value in zip(params, before, strict=True):
            states[p] |= {_PREVIOUS: value, _HAS_PREVIOUS: 1}
        self._learn(groups, model, coefficients)
        return True

    def _last_step(
        self, states: MutableMapping[Tensor, Any], params: Sequence[Parameter]
    ) -> list[dict[Parameter, Tensor]]:
        if not self._use_momentum:
            return []
        known = [p for p in params if states[p].get(_HAS_PREVIOUS)]
        return [{p: p.detach() - states[p][_PREVIOUS] for p in known}] if known else []

    def _learn(
        self, groups: Sequence[dict[str, Any]], model: QuadraticModel, coefficients: list[float]
    ) -> None:
        """Take note of a step, and adapt the damping to how well the model predicted it."""
        record = self.statistics
        record.step_size, record.momentum = (*coefficients, 0.0)[:2]
        record.predicted_change = model.predicted_change(coefficients)
        if record.predicted_change < 0:
            record.reduction_ratio = record.change / record.predicted_change
        if (groups[0]["num_steps"] + 1) % DAMPING_INTERVAL == 0:
            for group in groups:
                if group["params"]:
                    floor = damping_floor(group["params"][0].dtype)
                    ratio, value = record.reduction_ratio, float(group["damping"])
                    group["damping"] = reduction_ratio_damping(value, ratio, floor)
        record.damping = groups[0]["damping"]

    def undo_last_step(
        self, states: MutableMapping[Tensor, Any], groups: Sequence[dict[str, Any]]
    ) -> None:
        """Go back to the parameters before the last step, and damp the next one more.

        Args:
            states: The optimizer's state by parameter.
            groups: The parameter groups.
        """
        for p, state in states.items():
            if state.pop(_HAS_PREVIOUS, 0):
                p.copy_(state.pop(_PREVIOUS))
        self._damp_more(groups)

    def _damp_more(self, groups: Sequence[dict[str, Any]]) -> None:
        for group in groups:
            group["damping"] = float(group["damping"]) * REJECTION_FACTOR
        self.statistics.rejected_steps += 1
        self.statistics.damping = groups[0]["damping"]


def _same(one: float, other: float, dtype: torch.dtype) -> bool:
    """Tell whether two losses are equal up to round-off."""
    return abs(one - other) <= 10 * float(torch.finfo(dtype).eps) * abs(other)


def _check_replay(model: QuadraticModel, dtype: torch.dtype) -> None:
    tolerance = 100 * float(torch.finfo(dtype).eps) ** 0.75
    if not model.mismatch <= tolerance:
        raise RuntimeError(
            'lr="auto": the forward pass, evaluated again with the same random numbers, gave '
            f"outputs that differ by {model.mismatch:.2g} of the largest. The model, or what is "
            "done to its outputs before the loss, must depend on its inputs and parameters alone "
            "(no hooks that change outputs, no random generator of its own, no in-place changes "
            "of inputs or outputs); or give lr a number."
        )
