"""Steps that tune themselves by the quadratic model; steps of a given rate are in `clipped_step`.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.factors import factor_dtype
from kfacopt.optim.settings import Groups
from kfacopt.optim.state.initial import HAS_PREVIOUS, PREVIOUS
from kfacopt.optim.state.running_averages import States
from kfacopt.optim.steps.objective import Objective, same
from kfacopt.optim.steps.quadratic_model import QuadraticModel
from kfacopt.optim.steps.update import ByParameter, decay_in_place, decay_of

DAMPING_INTERVAL = 2
DAMPING_DECAY = 0.95**5  # ω
MAX_DAMPING = 1e8
REJECTION_FACTOR = 4.0  # λ grows by it when a step is undone
MAX_ATTEMPTS = 12


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
        rejected_steps: How many steps were undone so far.
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
        return min(damping / DAMPING_DECAY, MAX_DAMPING)
    return damping


def damping_floor(dtype: torch.dtype) -> float:
    """Return the smallest damping that decompositions of factors in a dtype make sense with."""
    return float(torch.finfo(factor_dtype(dtype)).eps)


class SelfTuning:
    """Chooses steps along preconditioned gradients, and keeps what the last one was made of.

    The parameters before a step stay in the optimizer's state: they give the last step d₀.

    Attributes:
        statistics: Of the last step.
        size: |α| of the last step, at most 1, which weight decay follows: it counts per step of
            size 1, and AdamW's parameters decay as those that have a direction.
    """

    trouble = ""  # what goes wrong here raises
    size = 1.0

    def __init__(self) -> None:
        self.statistics = TuningStatistics()

    def step(
        self,
        states: States,
        groups: Groups,
        gradients: ByParameter,
        preconditioned: ByParameter,
        make_objective: Callable[[], Objective] | None,
    ) -> bool:
        """Update parameters in place and adapt the groups' damping.

        A step that does not decrease the objective on its own data is undone, to the bit, the
        damping raised by `REJECTION_FACTOR`, and α and μ solved for again, up to `MAX_ATTEMPTS`
        times.

        Args:
            states: The optimizer's state by parameter.
            groups: The parameter groups; `lr` is the factor s, relative between groups, and
                `momentum` 0 leaves the last step out.
            gradients: Those of all parameters; `.grad` is what counts here.
            preconditioned: F̂⁻¹g of each parameter in a layer.
            make_objective: Returns what is to become smaller.

        Returns:
            Whether a step was taken.

        Raises:
            RuntimeError: If the model, evaluated again, gives something else, or the objective has
                terms that only a closure could evaluate.
        """
        self.size = 1.0
        if not preconditioned or make_objective is None:
            return True
        objective = make_objective()
        settings = {p: group for group in groups for p in group["params"]}
        params = list(preconditioned)
        scale = max(settings[p]["lr"] for p in params)
        if scale == 0:
            return True
        record = self.statistics = TuningStatistics(rejected_steps=self.statistics.rejected_steps)
        proposal = {p: -(settings[p]["lr"] / scale) * x for p, x in preconditioned.items()}
        directions = [proposal, *_last_step(states, settings, params)]
        grads = {p: p.grad for p in params if p.grad is not None}
        damping = {p: float(settings[p]["damping"]) for p in params}
        model = objective.model(grads, directions, damping)
        record.loss, record.damping = model.loss, groups[0]["damping"]
        if not all(math.isfinite(x) for x in model.scalars()):
            return False
        model, new_loss = objective.completed(model, grads, directions, damping)
        record.loss = model.loss
        before = [p.detach().clone() for p in params]
        try:
            coefficients = self._attempt(groups, directions, before, model, new_loss, scale)
        except BaseException:  # Ctrl-C in a closure, too, must not leave an untested step
            _put_back(params, before)
            raise
        if coefficients is None:
            return False
        self._learn(groups, model, coefficients)
        self.size = min(abs(record.step_size) / scale, 1.0)
        for p, value in zip(params, before, strict=True):
            states[p] |= {PREVIOUS: value, HAS_PREVIOUS: 1}
            decay_in_place([p], self.size * decay_of(settings[p]), settings[p]["foreach"])
        return True

    def scalars(self, _: Groups) -> dict[str, float]:
        """Return what is to be logged of the last step; there is no clip."""
        tuned = {name: float(x) for name, x in vars(self.statistics).items()}
        return {"kl_clip_scale": 1.0} | tuned

    def _attempt(
        self,
        groups: Groups,
        directions: Sequence[ByParameter],
        before: Sequence[Tensor],
        model: QuadraticModel,
        new_loss: Callable[[], float],
        scale: float,
    ) -> list[float] | None:
        """Move the parameters to where the loss is less; return the step's coefficients."""
        record, params = self.statistics, list(directions[0])
        for attempt in range(MAX_ATTEMPTS):
            coefficients = [scale * c for c in model.minimiser(REJECTION_FACTOR**attempt)]
            for direction, c in zip(directions, coefficients, strict=True):
                steps = [x.to(p.dtype) for p, x in direction.items()]
                torch._foreach_add_(list(direction), steps, alpha=c)
            record.change = new_loss() - record.loss
            dtype = before[0].dtype
            if record.change <= 0 or same(record.change + record.loss, record.loss, dtype):
                return coefficients
            _put_back(params, before)
            record.rejected_steps += 1
            for group in groups:
                group["damping"] = min(float(group["damping"]) * REJECTION_FACTOR, MAX_DAMPING)
        record.damping = groups[0]["damping"]
        return None

    def _learn(self, groups: Groups, model: QuadraticModel, coefficients: list[float]) -> None:
        """Take note of a step, and adapt the damping to how well the model predicted it."""
        record = self.statistics
        record.step_size, record.momentum = (*coefficients, 0.0)[:2]
        record.predicted_change = model.predicted_change(coefficients)
        dtype = groups[0]["params"][0].dtype
        # A change that is no more than round-off says nothing about the model.
        told = not same(record.loss + record.predicted_change, record.loss, dtype)
        if record.predicted_change < 0:
            record.reduction_ratio = record.change / record.predicted_change
        if told and (groups[0]["num_steps"] + 1) % DAMPING_INTERVAL == 0:
            for group in groups:
                floor, value = damping_floor(dtype), float(group["damping"])
                group["damping"] = reduction_ratio_damping(value, record.reduction_ratio, floor)
        record.damping = groups[0]["damping"]


def _last_step(
    states: States, settings: Mapping[Parameter, dict[str, Any]], params: Sequence[Parameter]
) -> list[dict[Parameter, Tensor]]:
    """Return the last step d₀ of the parameters that move and have momentum, if there was one."""
    moving = [p for p in params if settings[p]["momentum"] and settings[p]["lr"]]
    known = [p for p in moving if states[p].get(HAS_PREVIOUS)]
    return [{p: p.detach() - states[p][PREVIOUS] for p in known}] if known else []


def _put_back(params: Sequence[Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
