"""One training run, with a clock that stands still during evaluation."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Generator

from benchmarks.contestants import Contestant
from benchmarks.problems.problem import Problem, Task
from benchmarks.tuning import Trial

EVALUATIONS = 60
OVERTIME = 1.3  # a run that takes that many times its budget is broken off


@dataclass(frozen=True)
class Run:
    """What a run is and what it gave; one result file.

    Attributes:
        problem: The problem's name.
        contestant: The contestant's name.
        trial: The trial's name.
        seed: Of initialisation and batches.
        steps: How many steps were to be made.
        configuration: The trial's settings and schedule.
        curve: Rows of step, seconds of training, and metric.
        outcome: `"finished"`, `"diverged"`, `"overtime"`, or the message of an error.
        commit: Of kfacopt, when the run was made.
    """

    problem: str
    contestant: str
    trial: str
    seed: int
    steps: int
    configuration: dict[str, Any]
    curve: list[tuple[int, float, float]]
    outcome: str
    commit: str | None = None

    @property
    def best(self) -> float:
        """The best metric that training reached, infinite if none was finite."""
        return min((m for n, _, m in self.curve if n and math.isfinite(m)), default=math.inf)

    def best_within(self, share: float) -> float:
        """Return the best metric in the first share of the steps."""
        rows = [m for n, _, m in self.curve if 0 < n <= share * self.steps and math.isfinite(m)]
        return min(rows, default=math.inf)

    def first_reach(self, target: float) -> tuple[float, float]:
        """Return the step and the seconds at which the target was first met, else infinity."""
        met = ((step, seconds) for step, seconds, metric in self.curve[1:] if metric <= target)
        return next(met, (math.inf, math.inf))

    def record(self) -> dict[str, Any]:
        """Return what is written to the result file."""
        return asdict(self)


def evaluation_steps(steps: int, evaluations: int = EVALUATIONS) -> set[int]:
    """Return after which steps to evaluate: after the first, ever more seldom, after the last.

    Args:
        steps: How many steps there are.
        evaluations: How many evaluations at most.
    """
    shares = ((i / (evaluations - 1)) ** 2 for i in range(1, evaluations))
    return {1, *(max(1, math.ceil(steps * share)) for share in shares)}


def stepper(task: Task, contestant: Contestant, trial: Trial, seed: int) -> tuple[Any, Callable]:
    """Return the optimizer of a task's model, and a function that performs one step of it.

    Args:
        task: The task.
        contestant: Who trains it.
        trial: With what settings.
        seed: Of the batches.
    """
    optimizer = contestant.make(task.model, **trial.settings)
    if contestant.all_data:
        assert task.all_data is not None
        data = task.all_data

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = task.loss(task.model, data)
            loss.backward()
            return loss

        return optimizer, lambda: optimizer.step(closure)
    stream = task.batches(Generator().manual_seed(seed))

    def step() -> None:
        batch = next(stream)
        optimizer.zero_grad()
        task.loss(task.model, batch).backward()
        optimizer.step()

    return optimizer, step


def _train(
    task: Task, contestant: Contestant, trial: Trial, seed: int, steps: int, limit: float
) -> Iterator[tuple[int, float, float]]:
    """Yield rows of the curve."""
    start = time.perf_counter()
    optimizer, step = stepper(task, contestant, trial, seed)
    base = [group["lr"] for group in optimizer.param_groups]
    elapsed = time.perf_counter() - start
    when = evaluation_steps(steps)
    yield 0, 0.0, task.metric()
    start = time.perf_counter()
    for count in range(1, steps + 1):
        factor = trial.schedule.factor(count - 1, steps)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        step()
        if count in when:
            elapsed += time.perf_counter() - start
            yield count, elapsed, task.metric()
            if elapsed > limit:
                return
            start = time.perf_counter()


def run(
    problem: Problem, contestant: Contestant, trial: Trial, seed: int, steps: int, limit: float
) -> Run:
    """Train and evaluate.

    Args:
        problem: What.
        contestant: By whom.
        trial: With what settings.
        seed: Of initialisation and batches.
        steps: How many steps fit into the whole budget; the schedule's horizon is a share of it.
        limit: Seconds after which the run is broken off.

    Returns:
        The run. It ends early when the metric or the optimizer fails.
    """
    steps = max(2, round(trial.schedule.horizon * steps))
    task = problem.task(seed)
    torch.manual_seed(seed)
    curve: list[tuple[int, float, float]] = []
    outcome = "finished"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for count, elapsed, metric in _train(task, contestant, trial, seed, steps, limit):
                curve.append((count, round(elapsed, 4), metric))
                if not math.isfinite(metric):
                    outcome = "diverged"
                    break
        except (RuntimeError, ValueError) as error:  # numerical failures of an optimizer
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
    if outcome == "finished" and curve[-1][0] < steps:
        outcome = "overtime"
    names = (problem.name, contestant.name, trial.name)
    return Run(*names, seed, steps, trial.record(), curve, outcome)
