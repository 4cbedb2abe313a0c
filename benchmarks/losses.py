"""Train with many losses: `KFACOptimizer` as it comes beside AdamW at the best of its rates.

    python -m benchmarks.losses [--quick] [--problems ...] [--schedules ...] [--workers N] [--page]

Both get the same CPU seconds of one thread, at a constant rate and with a cosine over the time.
What an iteration costs each is measured first, in turn and over whole periods of K-FAC's factors
and inverses, by `time.thread_time`; it gives the number of iterations. Neighbours on the machine
change what an iteration costs by up to 2, but so both alike, and a run depends on its seed alone.
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
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.calibration import PERIOD
from benchmarks.compare import workers
from benchmarks.environment import HERE, commit, environment, folder_of
from benchmarks.loss_tables import median_at_end, runs_of, tables
from benchmarks.problems import losses_of_batches, losses_of_data
from benchmarks.problems.problem import LossProblem
from benchmarks.protocol import write_json
from benchmarks.running import evaluation_steps
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
CONTESTANTS = ("AdamW", "K-FAC")
EVALUATIONS = 30


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


def _iteration(problem: LossProblem, setting: Setting) -> Iterator[None]:
    """Do an iteration each time."""
    training = problem.training(setting.seed)
    optimizers = [setting.optimizer(model) for model in training.models]
    while True:
        yield training.step(optimizers)


def costs(
    problem: LossProblem, rounds: int = 7, settings: Mapping[str, Setting] | None = None
) -> dict[str, float]:
    """Return the CPU seconds of an iteration of each contestant.

    Args:
        problem: The problem.
        rounds: How often each is timed, in turn; before, each warms up.
        settings: The contestants and their optimizers; `None` for AdamW and K-FAC.

    Returns:
        The first one's median, and the others' as the median of ratios in a round times that;
        without those that fail.
    """
    repeats = max(4, PERIOD // problem.steps)
    if settings is None:
        settings = {name: Setting(name, 1e-4, "constant", 0) for name in CONTESTANTS}
    iterations = {name: _iteration(problem, setting) for name, setting in settings.items()}
    times: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(rounds + 1):
        for name, own in times.items():
            start = time.thread_time()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    for _ in range(repeats):
                        next(iterations[name])
            except Exception:  # `run` will name it; from now on the generator is at its end
                continue
            own.append((time.thread_time() - start) / repeats)
    unit, *others = settings
    found = {unit: statistics.median(times[unit][1:])}
    for name in others:
        if len(times[name]) > rounds:
            ratios = (t / u for t, u in zip(times[name][1:], times[unit][1:], strict=True))
            found[name] = found[unit] * statistics.median(ratios)
    return found


def _train(
    problem: LossProblem, setting: Setting, iterations: int, evaluations: int
) -> Iterator[tuple[int, float, float, float]]:
    """Yield rows of iteration, seconds of this thread, objective and metric."""
    training, schedule = problem.training(setting.seed), SCHEDULES[setting.schedule]
    torch.manual_seed(setting.seed)
    yield 0, 0.0, *training.metrics()
    start = time.thread_time()
    optimizers = [setting.optimizer(model) for model in training.models]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    base = [group["lr"] for group in groups]
    elapsed, when = 0.0, evaluation_steps(iterations, evaluations)
    for count in range(1, iterations + 1):
        factor = schedule.factor(count - 1, iterations)
        for group, lr in zip(groups, base, strict=True):
            group["lr"] = lr * factor
        training.step(optimizers)
        if count in when:
            elapsed += time.thread_time() - start
            yield count, elapsed, *training.metrics()
            start = time.thread_time()


def run(
    problem: LossProblem,
    setting: Setting,
    iterations: int,
    cost: float = 1.0,
    evaluations: int = EVALUATIONS,
) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        problem: What.
        setting: By whom, and how.
        iterations: How many of the loop.
        cost: Seconds of an iteration.
        evaluations: How many, at most.

    Returns:
        The setting, iterations, curve (iteration, seconds by the cost, objective, metric), outcome
        (`"finished"`, `"diverged"` or an error), the distinct warnings, the seconds that the thread
        took, and the commit.
    """
    gc.collect()
    curve: list[list[float]] = []
    outcome, elapsed = "finished", 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            rows = _train(problem, setting, iterations, evaluations)
            for count, elapsed, *values in rows:  # noqa: B007
                row = (count * cost, *values)
                curve.append([count, *(float(f"{value:.6g}") for value in row)])
                if not math.isfinite(values[0]):
                    outcome = "diverged"
                    break
        except Exception as error:  # whatever it is, it is what a user would get
            outcome = f"{type(error).__name__}: {str(error)[:300]}"
    said = sorted({str(warning.message)[:300] for warning in caught})
    found = asdict(setting) | {"iterations": iterations, "outcome": outcome, "curve": curve}
    return found | {"warnings": said, "thread_seconds": round(elapsed, 3), "commit": commit()}


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
        iterations: Of the loop; `None` for as many as the budget has.
    """

    folder: Path
    seeds: int = 3
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    rates: tuple[float, ...] = RATES
    widest: tuple[float, ...] = WIDER
    scale: float = 1.0
    iterations: int | None = None


class Runs:
    """A problem's runs, and their file.

    Args:
        plan: What is run.
        name: The problem's name.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.problem = plan, PROBLEMS[name]
        self.path = plan.folder / f"{name}.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.found: list[dict[str, Any]] = known.get("runs", [])
        self.costs: dict[str, float] = known.get("costs", {})

    def write(self) -> None:
        """Write the file."""
        named = {k: v for k, v in asdict(self.problem).items() if k != "make"}
        content = {"problem": named, "budget": self.plan.scale * self.problem.budget}
        content |= {"costs": self.costs, "runs": self.found}
        write_json(self.path, environment("cpu") | content)

    def forget(self, contestants: Iterable[str]) -> None:
        """Forget cost and runs of contestants, to measure a new version of them."""
        gone = set(contestants)
        self.found = [r for r in self.found if r["contestant"] not in gone]
        self.costs = {name: cost for name, cost in self.costs.items() if name not in gone}

    def calibrate(self) -> None:
        """Measure what an iteration costs; AdamW's cost, once known, is the unit of the other."""
        if self.plan.iterations is None and len(self.costs) < len(CONTESTANTS):
            new = costs(self.problem)
            drift = self.costs.get("AdamW", new["AdamW"]) / new["AdamW"]
            self.costs = {name: drift * cost for name, cost in new.items()}

    def run(self, setting: Setting) -> None:
        """Make a run that does not exist in the same length."""
        cost = self.costs.get(setting.contestant, self.costs.get("AdamW", 1.0))
        budget = self.plan.scale * self.problem.budget
        iterations = self.plan.iterations or max(1, round(budget / cost))
        wanted = asdict(setting) | {"iterations": iterations}
        if not any(all(r[k] == v for k, v in wanted.items()) for r in self.found):
            own = asdict(setting).items()
            self.found = [r for r in self.found if any(r[k] != v for k, v in own)]
            self.found.append(run(self.problem, setting, iterations, cost))
            self.write()

    def edges(self, schedule: str, rates: Sequence[float]) -> list[float]:
        """Return the rates next to the best that were not tried."""
        medians = {lr: median_at_end(runs_of(self.found, "AdamW", schedule, lr)) for lr in rates}
        place = self.plan.widest.index(min(rates, key=lambda lr: medians[lr]))
        return sorted({*self.plan.widest[max(0, place - 1) : place + 2]} - {*rates})

    def complete(self) -> None:
        """Make all runs, contestants interleaved."""
        self.calibrate()
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
    parser.add_argument("--again", nargs="+", choices=CONTESTANTS, default=[])
    parser.add_argument("--report-only", action="store_true", help="make no runs")
    parser.add_argument("--page", action="store_true", help="put the tables into docs/losses.md")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds: two steps")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    quick = arguments.quick
    whole = quick or [*arguments.problems] == [*PROBLEMS] or arguments.report_only
    folder = folder_of("losses_quick" if quick else "losses", whole, arguments.output)
    plan = Plan(folder, schedules=tuple(arguments.schedules), scale=arguments.scale)
    if quick:
        plan = Plan(folder, 1, ("constant",), (1e-3,), (1e-3,), iterations=2)
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
