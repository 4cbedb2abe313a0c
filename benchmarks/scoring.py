"""From runs to figures: time to target, ratios, performance profile, score, sensitivity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.calibration import GRADIENT
from benchmarks.contestants import Contestant
from benchmarks.protocol import Comparison
from benchmarks.running import Run
from benchmarks.tuning import DEFAULT

MAX_RATIO = 4.0
REFERENCE = "AdamW"

Times = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What a contestant reached on a problem, over its seeds.

    Attributes:
        contestant: Its name.
        runs: The runs, one for each seed.
        steps: Steps to the target, for each seed; infinite if it was missed.
        seconds: Seconds of training to the target.
        gradients: Steps to the target times the calibrated cost of a step, in gradient
            evaluations on a batch.
    """

    contestant: str
    runs: list[Run]
    steps: list[float]
    seconds: list[float]
    gradients: list[float]

    @property
    def median_seconds(self) -> float:
        """The median over seeds."""
        return statistics.median(self.seconds)

    @property
    def median_steps(self) -> float:
        """The median over seeds."""
        return statistics.median(self.steps)

    @property
    def median_gradients(self) -> float:
        """The median over seeds."""
        return statistics.median(self.gradients)

    @property
    def median_best(self) -> float:
        """The median over seeds of the best metric."""
        return statistics.median(run.best for run in self.runs)


def outcome(
    comparison: Comparison, problem: str, contestant: Contestant, tuned: bool
) -> Outcome | None:
    """Return what a contestant reached, or `None` if runs are missing.

    Args:
        comparison: Where the runs are.
        problem: The problem's name.
        contestant: The contestant.
        tuned: With its tuned setting, or with its defaults.
    """
    trial = comparison.tuned_trial(problem, contestant) if tuned else DEFAULT
    target = comparison.target(problem)
    if trial is None or target is None:
        return None
    runs = [job.read() for job in comparison.final_jobs(problem, contestant.name, trial)]
    found = [run for run in runs if run is not None]
    if len(found) < len(runs):
        return None
    reached = [run.first_reach(target["value"]) for run in found]
    steps, seconds = [float(n) for n, _ in reached], [s for _, s in reached]
    costs = comparison.costs(problem)
    if contestant.all_data:  # a step's evaluations are as many as the settings say
        gradients = [s / costs[GRADIENT] for s in seconds]
    else:
        gradients = [n * costs[contestant.name] / costs[GRADIENT] for n in steps]
    return Outcome(contestant.name, found, steps, seconds, gradients)


def outcomes(comparison: Comparison, tuned: bool) -> dict[str, dict[str, Outcome]]:
    """Return all outcomes by problem and contestant."""
    found: dict[str, dict[str, Outcome]] = {}
    for problem in comparison.options.problems:
        entries = {
            c.name: outcome(comparison, problem, c, tuned) for c in comparison.entrants(problem)
        }
        found[problem] = {name: o for name, o in entries.items() if o is not None}
    return found


def sensitivity(comparison: Comparison, problem: str, contestant: Contestant) -> float | None:
    """Return the share of points of a contestant's space that reach the target.

    `None` if a run is missing. Its defaults are no point of the space.
    """
    target = comparison.target(problem)
    jobs = [j for j in comparison.trial_jobs(problem, contestant) if j.trial is not DEFAULT]
    runs = [job.read() for job in jobs]
    found = [run for run in runs if run is not None]
    if target is None or not runs or len(found) < len(runs):
        return None
    return sum(run.best <= target["value"] for run in found) / len(found)


def relative_to_best(times: Times) -> dict[str, dict[str, float]]:
    """Return times as ratios to the best on each problem.

    Args:
        times: Seconds by problem and contestant; infinite for a miss.

    Returns:
        Ratios by contestant and problem; infinite for a miss, also where all miss.
    """
    ratios: dict[str, dict[str, float]] = {}
    for problem, row in times.items():
        best = min(row.values(), default=math.inf)
        for name, value in row.items():
            ratio = value / best if math.isfinite(value) else math.inf
            ratios.setdefault(name, {})[problem] = ratio
    return ratios


def profile(ratios: Mapping[str, float], tau: float) -> float:
    """Return ρ(τ), the share of problems on which the ratio is at most τ.

    References:
        Dolan & Moré (2002), https://doi.org/10.1007/s101070100263.
    """
    return statistics.mean(bool(ratio <= tau) for ratio in ratios.values())


def score(ratios: Mapping[str, float]) -> float:
    """Return the mean of ρ(τ) over τ in [1, 4], exactly: each problem adds (4 − r)⁺ / 3."""
    return statistics.mean(max(0.0, MAX_RATIO - r) / (MAX_RATIO - 1) for r in ratios.values())
