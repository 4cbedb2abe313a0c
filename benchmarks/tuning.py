"""Search spaces, quasi-random points in them, and schedules of the learning rate.

Every contestant gets the same number of trials, from a Halton sequence in its own space; the
schedule is a dimension of every space. The first n points are the same whatever the number of
trials is, so that more trials add to what was run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from scipy.stats import qmc

HALTON_SEED = 0
WARMUP = 0.05  # of the horizon


class Dimension(Protocol):
    """A dimension of a search space."""

    def at(self, position: float) -> Any:
        """Return the value at a position in [0, 1)."""


@dataclass(frozen=True)
class LogUniform:
    """Values whose logarithm is uniform, or values whose distance to 1 is so."""

    low: float
    high: float
    from_one: bool = False

    def at(self, position: float) -> float:
        """Return the value at a position in [0, 1), to four digits."""
        log = math.log(self.low) + position * (math.log(self.high) - math.log(self.low))
        value = float(f"{math.exp(log):.4g}")
        return float(f"{1 - value:.6g}") if self.from_one else value


@dataclass(frozen=True)
class Choice:
    """One of some values, each as likely."""

    values: Sequence[Any]

    def at(self, position: float) -> Any:
        """Return the value at a position in [0, 1)."""
        return self.values[int(position * len(self.values))]


@dataclass(frozen=True)
class Schedule:
    """A factor of the learning rate over a share of the budget, at whose end the run ends.

    Attributes:
        cosine: A linear warm-up and a cosine to 0; else the factor is 1.
        horizon: The share of the budget.
    """

    cosine: bool = False
    horizon: float = 1.0

    def factor(self, step: int, steps: int) -> float:
        """Return the factor at a step.

        Args:
            step: The step, from 0 on.
            steps: How many steps the run has, the horizon's share of the budget.
        """
        if not self.cosine:
            return 1.0
        warmup = max(1, round(WARMUP * steps))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


CONSTANT = Schedule()
SCHEDULES = Choice((CONSTANT, Schedule(True, 1.0), Schedule(True, 0.5), Schedule(True, 0.25)))


@dataclass(frozen=True)
class Trial:
    """Settings of an optimizer and its schedule.

    Attributes:
        name: `"default"`, or the point's number.
        settings: The optimizer's arguments.
        schedule: The schedule.
    """

    name: str
    settings: Mapping[str, Any]
    schedule: Schedule

    def record(self) -> dict[str, Any]:
        """Return what is written to a result file."""
        return {"settings": dict(self.settings), "schedule": asdict(self.schedule)}


DEFAULT = Trial("default", {}, CONSTANT)


def trials(space: Mapping[str, Dimension], count: int, scheduled: bool = True) -> list[Trial]:
    """Return the first trials in a search space.

    Args:
        space: The dimensions by the optimizer's arguments.
        count: How many.
        scheduled: Whether the schedule is tuned; else it is constant.
    """
    points = qmc.Halton(len(space) + 1, scramble=True, seed=HALTON_SEED).random(count)
    found = []
    for number, point in enumerate(points):
        values = {key: dim.at(x) for (key, dim), x in zip(space.items(), point[1:], strict=True)}
        schedule = SCHEDULES.at(point[0]) if scheduled else CONSTANT
        found.append(Trial(str(number), values, schedule))
    return found
