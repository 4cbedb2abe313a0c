"""Train with many losses: `KFACOptimizer` as it comes beside AdamW at the best of its rates.

    python -m benchmarks.losses [--quick] [--problems ...] [--schedules ...] [--workers N] [--page]

Both get the same CPU seconds of one thread (`time.thread_time`; evaluation excluded, the making of
the optimizer and all extra passes included), at a constant rate and with a cosine over the time.
AdamW has five learning rates, and further ones as long as the best is at the edge. The best is that
whose median over the seeds is lowest, on the very seeds that are shown and for each column anew,
which favours AdamW. An error of a contestant, and NaN, is its result.

A problem's runs are in one file, written after each run; a run that exists is not repeated.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.compare import workers
from benchmarks.environment import HERE, RESULTS, commit, environment
from benchmarks.loss_tables import median_at_end, runs_of, tables
from benchmarks.problems import losses_of_batches, losses_of_data
from benchmarks.problems.problem import LossProblem
from benchmarks.protocol import write_json
from benchmarks.step_tables import update_page
from benchmarks.tuning import Schedule
from kfacopt import KFACOptimizer

PROBLEMS: dict[str, LossProblem] = {
    p.name: p for p in (*losses_of_data.PROBLEMS, *losses_of_batches.PROBLEMS)
}
PAGE = HERE.parent / "docs" / "losses.md"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WIDER = (1e-6, 3e-6, 1e-5, 3e-5, *RATES, 3e-2, 1e-1, 3e-1, 1.0)
SCHEDULES = {"constant": Schedule(), "cosine": Schedule(cosine=True)}
EVALUATIONS = 30
FINE = 10_000  # parts of the budget in which the schedule sees it


@dataclass(frozen=True)
class Setting:
    """Whose run it is, and how.

    Attributes:
        contestant: `"AdamW"` or `"K-FAC"`.
        lr: AdamW's learning rate; `None` for an optimizer's own.
        schedule: A name.
        seed: Of initialisation, batches and noise.
    """

    contestant: str
    lr: float | None
    schedule: str
    seed: int

    def optimizer(self, model: torch.nn.Module) -> Any:
        """Return the optimizer of a model."""
        if self.contestant == "K-FAC":
            return KFACOptimizer(model.parameters())
        return torch.optim.AdamW(model.parameters(), lr=self.lr)


@dataclass(frozen=True)
class Limits:
    """How long to train.

    Attributes:
        seconds: CPU seconds of the thread.
        steps: Iterations of the loop at most.
    """

    seconds: float
    steps: float = math.inf


def _train(
    problem: LossProblem, setting: Setting, limits: Limits
) -> Iterator[tuple[int, float, float, float]]:
    """Yield rows of the curve: iteration, seconds, objective, metric; the last is at the end."""
    training, schedule = problem.training(setting.seed), SCHEDULES[setting.schedule]
    torch.manual_seed(setting.seed)
    yield 0, 0.0, *training.metrics()
    start = time.thread_time()
    optimizers = [setting.optimizer(model) for model in training.models]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    base = [group["lr"] for group in groups]
    elapsed = time.thread_time() - start
    count, evaluations = 0, 1
    while elapsed < limits.seconds and count < limits.steps:
        start = time.thread_time()
        factor = schedule.factor(int(FINE * elapsed / limits.seconds), FINE)
        for group, lr in zip(groups, base, strict=True):
            group["lr"] = lr * factor
        training.step(optimizers)
        elapsed += time.thread_time() - start
        count += 1
        over = elapsed >= limits.seconds or count >= limits.steps
        if over or elapsed >= limits.seconds * (evaluations / EVALUATIONS) ** 2:
            evaluations = 1 + int(EVALUATIONS * math.sqrt(elapsed / limits.seconds))
            yield count, elapsed, *training.metrics()


def run(problem: LossProblem, setting: Setting, limits: Limits) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        problem: What.
        setting: By whom, and how.
        limits: How long.

    Returns:
        The setting, seconds, curve, `outcome` (`"finished"`, `"diverged"` or an error), the
        distinct warnings, and the commit.
    """
    gc.collect()
    curve: list[list[float]] = []
    outcome = "finished"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            for count, *values in _train(problem, setting, limits):
                curve.append([count, *(float(f"{value:.6g}") for value in values)])
                if not math.isfinite(values[1]):
                    outcome = "diverged"
                    break
        except Exception as error:  # whatever it is, it is what a user would get
            outcome = f"{type(error).__name__}: {str(error)[:300]}"
    said = sorted({str(warning.message)[:300] for warning in caught})
    found = asdict(setting) | {"seconds": limits.seconds, "outcome": outcome, "curve": curve}
    return found | {"warnings": said, "commit": commit()}


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        folder: Of the results.
        seeds: How many.
        schedules: Names.
        rates: AdamW's.
        widest: All of AdamW's rates, in order, that are tried where the best is at the edge.
        scale: Factor of the budgets.
        steps: Iterations of the loop at most.
    """

    folder: Path
    seeds: int = 3
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    rates: tuple[float, ...] = RATES
    widest: tuple[float, ...] = WIDER
    scale: float = 1.0
    steps: float = math.inf


class Runs:
    """A problem's runs, and their file.

    Args:
        plan: What is run.
        name: The problem's name.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.problem = plan, PROBLEMS[name]
        self.path = plan.folder / f"{name}.json"
        self.limits = Limits(plan.scale * self.problem.budget, plan.steps)
        self.found = json.loads(self.path.read_text())["runs"] if self.path.exists() else []

    def write(self) -> None:
        """Write the file."""
        named = {k: v for k, v in asdict(self.problem).items() if k != "make"}
        content = environment("cpu") | {"problem": named, "runs": self.found}
        write_json(self.path, content)

    def forget(self, contestants: Iterable[str]) -> None:
        """Forget the runs of contestants, to measure a new version of them."""
        self.found = [r for r in self.found if r["contestant"] not in set(contestants)]

    def run(self, setting: Setting) -> None:
        """Make a run that does not exist in the same length."""
        wanted = asdict(setting) | {"seconds": self.limits.seconds}
        if not any(all(r[k] == v for k, v in wanted.items()) for r in self.found):
            self.found.append(run(self.problem, setting, self.limits))
            self.write()

    def edges(self, schedule: str, rates: Sequence[float]) -> list[float]:
        """Return the rates next to the best that were not tried."""
        medians = {lr: median_at_end(runs_of(self.found, "AdamW", schedule, lr)) for lr in rates}
        place = self.plan.widest.index(min(rates, key=lambda lr: medians[lr]))
        return sorted({*self.plan.widest[max(0, place - 1) : place + 2]} - {*rates})

    def complete(self) -> None:
        """Make all runs, contestants interleaved."""
        for schedule in self.plan.schedules:
            rates: list[float] = []
            new = list(self.plan.rates)
            while new:
                for seed in range(self.plan.seeds):
                    for lr in new:
                        self.run(Setting("AdamW", lr, schedule, seed))
                    if not rates:
                        self.run(Setting("K-FAC", None, schedule, seed))
                rates += new
                new = self.edges(schedule, rates)


def complete(plan: Plan, again: Sequence[str], name: str) -> str:
    """Make the runs of a problem that are missing, and return its name."""
    runs = Runs(plan, name)
    runs.forget(again)
    for contestant in ("AdamW", "K-FAC"):  # first steps import a part of torch
        run(runs.problem, Setting(contestant, 1e-3, "constant", 0), Limits(1.0, steps=1))
    runs.complete()
    return name


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    schedules = tuple(SCHEDULES)
    parser.add_argument("--schedules", nargs="+", choices=schedules, default=list(schedules))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all budgets")
    parser.add_argument("--workers", type=int, default=2, help="0: in this process")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--again", nargs="+", choices=("AdamW", "K-FAC"), default=[])
    parser.add_argument("--report-only", action="store_true", help="make no runs")
    parser.add_argument("--page", action="store_true", help="put the tables into docs/losses.md")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds: two steps")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    quick = arguments.quick
    folder = arguments.output or RESULTS / ("losses_quick" if quick else "losses")
    plan = Plan(folder, schedules=tuple(arguments.schedules), scale=arguments.scale)
    if quick:
        plan = Plan(folder, 1, ("constant",), (1e-3,), (1e-3,), steps=2)
    count = 0 if quick else arguments.workers
    if not count:
        torch.set_num_threads(1)
    if not arguments.report_only:
        here: Callable[..., Any] = map
        with workers(count) if count else nullcontext(here) as map_problems:
            done = map_problems(partial(complete, plan, arguments.again), arguments.problems)
            for _ in tqdm(done, total=len(arguments.problems), mininterval=5):
                pass
    paths = [plan.folder / f"{name}.json" for name in PROBLEMS]
    text = tables([json.loads(path.read_text()) for path in paths if path.exists()])
    (plan.folder / "tables.md").write_text(text + "\n")
    print(text)
    if arguments.page:
        update_page(PAGE, "losses", text)


if __name__ == "__main__":
    main()
