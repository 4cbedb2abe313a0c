"""What a step is to make smaller, evaluated again where the parameters have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.linalg.precision import round_off
from kfacopt.optim.messages import missing_statistics
from kfacopt.optim.steps.closures import ClosureLoss, closure_loss
from kfacopt.optim.steps.quadratic_model import (
    QuadraticModel,
    alternating_signs,
    evaluate,
    quadratic_model,
    slope_scales,
)
from kfacopt.optim.steps.replay import coarsest_dtype
from kfacopt.optim.steps.update import ByParameter
from kfacopt.optim.watch.loss_scale import calling_loss_scale
from kfacopt.optim.watch.recorded_calls import Term, in_order


@dataclass(frozen=True)
class Objective:
    """What a step is to make smaller, and what it takes to evaluate it.

    Attributes:
        terms: Its losses.
        closure: Evaluates it where it is more than the losses that were recognised.
        loss_scale: What a `GradScaler` multiplied it with.
        over_ranks: Averages numbers over all processes.
    """

    terms: Sequence[Term]
    closure: ClosureLoss | None
    loss_scale: float
    over_ranks: Callable[[Tensor], Tensor]

    def model(
        self,
        grads: ByParameter,
        directions: Sequence[ByParameter],
        damping: Mapping[Parameter, float],
    ) -> QuadraticModel:
        """Return the quadratic model of the losses; see `quadratic_model` for the arguments."""
        evaluated = (self.loss_scale, self.over_ranks)
        return quadratic_model(self.terms, grads, directions, damping, *evaluated)

    def completed(
        self,
        model: QuadraticModel,
        grads: ByParameter,
        directions: Sequence[ByParameter],
        damping: Mapping[Parameter, float],
    ) -> tuple[QuadraticModel, Callable[[], float]]:
        """Return the model of the whole objective, and what evaluates that.

        The losses are all of it where their slopes along the directions are those of the gradient
        (but for round-off, which is all there is of both once training has converged),
        or in a fixed proportion to them: then the gradient was clipped, and the losses' own slopes
        count. Otherwise the closure evaluates the objective. Where it has the losses' value, but
        other slopes, it may have clipped the gradient in any way, unless parameters are used where
        the losses, evaluated again, do not see them move.
        """
        dtype = coarsest_dtype(self.terms)
        _check_replay(model, dtype)
        eps = float(torch.finfo(dtype).eps)
        replayed = partial(evaluate, self.terms, list(damping), self.loss_scale, self.over_ranks)
        if model.is_complete(eps**0.5):
            return model, replayed
        unclipped = replace(model, slopes=model.loss_slopes)
        if self.closure is not None:
            if same(self.closure.value, model.loss, dtype) and (
                not self._fixes_uses() or self._is_clipped(model, grads, damping, eps**0.5)
            ):
                return unclipped, replayed
            return replace(model, loss=self.closure.value), self.closure.evaluate
        if self._is_clipped(model, grads, damping, eps**0.5):
            return unclipped, replayed
        if self._differs_by_round_off(model, directions, eps):
            return model, replayed
        raise RuntimeError(
            'lr="auto": the objective has terms besides the losses that were recognised (its slope '
            f"along the step is {model.slopes[0]:.4g}, theirs {model.loss_slopes[0]:.4g}), or uses "
            "parameters outside of the forward pass of the module that owns them. Give step a "
            "closure that returns all of the objective (or set weight_decay=, for a penalty on "
            "the weights); or give lr a number."
        )

    def _differs_by_round_off(
        self, model: QuadraticModel, directions: Sequence[ByParameter], eps: float
    ) -> bool:
        """Tell whether round-off explains how far the losses' slopes are from the gradient's.

        Where training has converged they are nothing else, and no tolerance relative to themselves
        holds. In units of eps times what cancels in them they differ by 0.04 at the most, long
        after convergence of the problems that were tried; a term that is missing differs by its
        own slope.
        """
        scales = slope_scales(self.terms, directions, self.loss_scale, self.over_ranks)
        return all(
            abs(g - own) <= eps * scale
            for g, own, scale in zip(model.slopes, model.loss_slopes, scales, strict=True)
        )

    def _fixes_uses(self) -> bool:
        calls = in_order(call for term in self.terms for call in term.calls)
        return any(call.fixes for call in calls)

    def _is_clipped(
        self,
        model: QuadraticModel,
        grads: ByParameter,
        damping: Mapping[Parameter, float],
        tolerance: float,
    ) -> bool:
        """Tell, by one more direction, whether the gradient is a multiple of the losses'."""
        if model.loss_slopes[0] == 0 or model.slopes[0] / model.loss_slopes[0] <= 0:
            return False
        factor = model.slopes[0] / model.loss_slopes[0]
        probe = {p: g * alternating_signs(g) for p, g in grads.items()}
        other = self.model(grads, [probe], damping)
        return model.is_complete(tolerance, factor) and other.is_complete(tolerance, factor)


def objective_of(
    terms: Sequence[Term],
    closure: Callable[[], Any] | None,
    loss: Any,
    params: Sequence[Parameter],
    over_ranks: Callable[[Tensor], Tensor],
) -> Objective:
    """Return the objective of a step.

    Raises:
        RuntimeError: If there are no losses.
    """
    if not terms:
        raise RuntimeError(f"KFACOptimizer: {missing_statistics(True)}")
    again = None
    if closure is not None:
        again = closure_loss(closure, loss, params, terms, over_ranks)
    return Objective(terms, again, calling_loss_scale(), over_ranks)


def same(one: float, other: float, dtype: torch.dtype) -> bool:
    """Tell whether two losses are equal up to round-off."""
    return abs(one - other) <= round_off(dtype) * abs(other)


def replay_tolerance(dtype: torch.dtype) -> float:
    """Return how far outputs may be from what was recorded, relative to the largest, in a dtype."""
    eps: float = torch.finfo(dtype).eps
    return float(min(100 * eps**0.75, 0.5))


def _check_replay(model: QuadraticModel, dtype: torch.dtype) -> None:
    if not model.mismatch <= replay_tolerance(dtype):
        raise RuntimeError(
            'lr="auto": the forward pass, evaluated again with the same random numbers, gave '
            f"outputs that differ by {model.mismatch:.2g} of the largest. The model, or what is "
            "done to its outputs before the loss, must depend on its inputs and parameters alone "
            "(no hooks that change outputs, no random generator of its own, no in-place changes "
            "of inputs or outputs), and the parameters must not change between the forward pass "
            "and step, by another optimizer for instance; or give lr a number."
        )
