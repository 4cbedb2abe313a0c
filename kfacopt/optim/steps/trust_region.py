r"""The KL clip as the radius of a trust region that follows the data; `clipped_step` takes steps.

Every `MEASUREMENT_INTERVAL` steps, on a step whose statistics are collected anyway, the loss of the
same batch is evaluated again, with the same random numbers, at both ends of the step d that was
taken, scaled to the initial learning rate. From

    s = (L(θ + d) − L(θ − d)) / 2,    ρ = (L(θ + d) − L(θ)) / s

follows κ: κ ← 2 κ where ρ > ¾; κ ← κ / 2 where ρ < ¼, s ≥ 0 (s ≤ 0 where the objective is
maximised), or L(θ + d) is not finite.
s is the slope along d, but for third derivatives, so that ρ = 1 where the loss is linear along the
step, ½ at the minimum of a quadratic, and 0 where the step goes twice as far. Neither the gradient
nor the curvature is in it: a gradient that was clipped changes nothing.

κ is that of the initial rate. What a schedule makes of the rate is undone before d is tried, so
that κ does not grow against a schedule that shortens the steps.

References:
    - Conn, Gould & Toint (2000), Trust-Region Methods, section 6.1, for the rule and its ¼ and ¾.
    - Martens & Grosse (2015), https://arxiv.org/abs/1503.05671, section 6.5, for such a ratio as a
      guide of K-FAC's damping.

Deviations: the ratio guides the clip κ, and the damping stays as it is. With steps that a clip
keeps short the ratio is near 1 whatever the damping is, which then runs to its floor (see
docs/trust_region.md for what was tried). The denominator has no model of the curvature, whose error
along d is part of what is measured. A step is never undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.linalg.precision import round_off
from kfacopt.optim.messages import unmeasured
from kfacopt.optim.settings import Groups
from kfacopt.optim.steps.objective import Objective, replay_tolerance
from kfacopt.optim.steps.quadratic_model import losses_and_mismatch
from kfacopt.optim.steps.replay import coarsest_dtype
from kfacopt.optim.watch.compilation import run_eagerly

FIRST_KL_CLIP = 5e-5
MOST_KL_CLIP = 1e-3
LEAST_KL_CLIP = 1e-8
GROWTH = 2.0
POOR, GOOD = 0.25, 0.75

# Where a schedule has made steps shorter than that share, differences of losses say too little.
_LEAST_SHARE = 0.02


@dataclass
class TrustStatistics:
    """What the last measurement gave; `nan` before one.

    Attributes:
        gain_ratio: ρ.
        slope: s, the change of the loss that the slope along the step promises.
        change: L(θ + d) − L(θ).
    """

    gain_ratio: float = math.nan
    slope: float = math.nan
    change: float = math.nan


class TrustRegion:
    """Follows the data with κ, which is kept in the groups as `"trust_region"`.

    Attributes:
        statistics: Of the last measurement.
        trouble: Why the last measurement said nothing about the step, if that is not its size.
    """

    def __init__(self) -> None:
        self.statistics = TrustStatistics()
        self.trouble = ""

    def clip(self, groups: Groups) -> float:
        """Return κ as it is now."""
        return float(groups[0].get("trust_region", FIRST_KL_CLIP))

    def follow(
        self,
        groups: Groups,
        before: Mapping[Parameter, Tensor],
        make_objective: Callable[[], Objective],
    ) -> None:
        """Measure the step that has just been taken, and adapt κ.

        All ranks take part, and come to the same κ.

        Args:
            groups: The parameter groups.
            before: The parameters that were moved, as they were.
            make_objective: Returns what is evaluated.
        """
        step = _at_initial_rate(groups, before)
        if not step:
            return
        signs = {
            -1 if g["maximize"] else 1 for g in groups if not step.keys().isdisjoint(g["params"])
        }
        if len(signs) == 2:
            self.trouble = unmeasured("some groups maximise what others minimise")
            return
        clip = self.clip(groups)
        change = self._measured(before, step, make_objective(), signs.pop())
        if change:
            clip = min(max(clip * change, LEAST_KL_CLIP), MOST_KL_CLIP)
        for group in groups:
            group["trust_region"] = clip

    def _measured(
        self,
        before: Mapping[Parameter, Tensor],
        step: Mapping[Parameter, Tensor],
        objective: Objective,
        sign: int,
    ) -> float:
        """Return the factor that κ is to change by; 0 if nothing was found out.

        Args:
            before: The parameters that were moved, as they were.
            step: d.
            objective: What is evaluated.
            sign: −1 where it is maximised, else 1.
        """
        first = next(iter(before.values()))
        numbers = torch.zeros(5, dtype=torch.float64, device=first.device)
        trouble = ""
        try:
            if not objective.terms:
                raise RuntimeError("no loss was seen that can be evaluated again")
            with run_eagerly():
                numbers[:4] = _losses(before, step, objective)
        except Exception as error:  # training goes on without
            trouble = str(error).removeprefix('lr="auto": ').split(". ")[0]
            numbers[4] = 1.0
        here, there, back, mismatch, failed = objective.over_ranks(numbers).tolist()
        self.trouble = ""
        if failed:
            self.trouble = unmeasured(trouble or "it failed on another rank")
            return 0.0
        if not mismatch <= replay_tolerance(coarsest_dtype(objective.terms)):
            self.trouble = unmeasured(
                f"the same batch gave outputs that differ by {mismatch:.2g} of the largest"
            )
            return 0.0
        return self._judged(here, there, back, sign, first.dtype)

    def _judged(
        self, here: float, there: float, back: float, sign: int, dtype: torch.dtype
    ) -> float:
        if not math.isfinite(here):
            return 0.0
        slope, change = (there - back) / 2, there - here
        ratio = change / slope if slope else math.nan
        self.statistics = TrustStatistics(ratio, slope, change)
        if not math.isfinite(there):
            return 1 / GROWTH
        told = max(abs(change), abs(back - here)) > 10 * round_off(dtype) * abs(here)
        if not told:
            return 0.0
        if sign * slope >= 0 or ratio < POOR:
            return 1 / GROWTH
        return GROWTH if ratio > GOOD else 1.0


def _at_initial_rate(groups: Groups, before: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
    """Return the step d as the initial rates would have made it; nothing if it is too short."""
    steps: dict[Parameter, Tensor] = {}
    for group in groups:
        base, lr = group["base_lr"] or group["lr"], group["lr"]
        own = [p for p in group["params"] if p in before]
        if own and lr < _LEAST_SHARE * base:
            return {}
        steps |= {p: (p.detach() - before[p]).mul_(base / lr if lr else 0.0) for p in own}
    return steps


def _losses(
    before: Mapping[Parameter, Tensor], step: Mapping[Parameter, Tensor], objective: Objective
) -> Tensor:
    """Return L(θ), L(θ + d), L(θ − d), and how far what was recorded is missed at θ."""
    found = []
    for sign in (0, 1, -1):
        values = {id(p): torch.add(x, step[p], alpha=sign) for p, x in before.items()}
        loss, mismatch = losses_and_mismatch(objective.terms, values)
        found.append(loss / objective.loss_scale)
        if sign == 0:
            missed = mismatch
    return torch.stack([*found, missed])
