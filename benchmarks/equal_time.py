"""Train with rivals at their best rates and with K-FAC's defaults, in equal CPU time.

    python -m benchmarks.equal_time choosing [--shard 1/2] [--set damping=0.005] [--report]
    python -m benchmarks.equal_time held-out --final [--shard 1/2] [--page]

A run is a problem, a contestant, a seed and a schedule: `SECONDS` of CPU time of one thread, with a
cosine over them or at a constant rate. Data are made and losses are evaluated off the clock. The
loss is the mean over the same training batches for all runs, evaluated about 20 times.

The settings of K-FAC are chosen on one set of problems. The other one, which is held out, takes no
`--set`, and K-FAC only with `--final`. A problem's runs are lines of one file, and a run that is
there is not repeated: two processes with `--shard 1/2` and `--shard 2/2` share the work, a killed
one goes on where it was. `--again NAME` repeats a contestant's runs that are of another commit; of
two lines for the same run, the later counts. Runs that fail or diverge are results, too.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from tqdm import tqdm

from benchmarks import choosing, held_out, optimizers
from benchmarks.environment import HERE, environment, folder_of
from benchmarks.problems.problem import Batch, Problem, Task
from kfacopt import KFACOptimizer

SETS: dict[str, Mapping[str, Problem]] = {
    "held-out": held_out.PROBLEMS,
    "choosing": choosing.PROBLEMS,
}
PAGES = {"held-out": HERE.parent / "docs" / "results_held_out.md"}
SECONDS = 4.0
SEEDS = 3
EVALUATIONS = 20
BATCHES, BATCHES_SEED = 6, 1_000_003  # those whose mean loss is evaluated
SCHEDULES = ("cosine", "constant")
OURS = ("K-FAC", "EKFAC")

# No weight decay, so that all minimise the same function.
MAKERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda model, lr: optimizers.adamw(model, lr=lr, weight_decay=0.0),
    "SGD": lambda model, lr: optimizers.sgd(model, lr=lr),
    "SOAP": lambda model, lr: optimizers.soap(model, lr=lr, weight_decay=0.0),
    "Muon": lambda model, lr: optimizers.muon(model, lr=lr, weight_decay=0.0),
    "K-FAC": lambda model, **settings: KFACOptimizer(model.parameters(), **settings),
    "EKFAC": lambda model, **settings: KFACOptimizer(
        model.parameters(), preconditioner="ekfac", **settings
    ),
}
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "cosine": {
        "AdamW": (1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2),
        "SGD": (0.01, 0.04, 0.16, 0.64),
        "SOAP": (3e-3, 1e-2, 3e-2),
        "Muon": (5e-3, 1.5e-2, 4.5e-2),
    },
    # Fewer, so that all fits in 45 minutes of two cores.
    "constant": {
        "AdamW": (1e-3, 4e-3, 1.5e-2),
        "SGD": (0.04, 0.16),
        "SOAP": (3e-3, 1e-2),
        "Muon": (5e-3, 1.5e-2),
    },
}
OURS_ALONE = {"cosine": OURS, "constant": OURS[:1]}

Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A contestant with its rate or settings.

    Attributes:
        contestant: A name in `MAKERS`.
        lr: A rival's learning rate; `None` for ours.
        settings: Of ours, that are not defaults.
    """

    contestant: str
    lr: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The contestant with its settings, without the rate."""
        return " ".join((self.contestant, *(f"{k}={v}" for k, v in self.settings)))

    def optimizer(self, model: nn.Module) -> Any:
        """Return the optimizer of a model."""
        arguments = dict(self.settings) if self.lr is None else {"lr": self.lr}
        return MAKERS[self.contestant](model, **arguments)


@dataclass(frozen=True)
class Job:
    """A run that is to be made."""

    problem: str
    entry: Entry
    schedule: str
    seed: int
    seconds: float

    def key(self) -> dict[str, Any]:
        """Return what tells the run from others, as it is in its record."""
        return {
            "problem": self.problem,
            "contestant": self.entry.label,
            "lr": self.entry.lr,
            "schedule": self.schedule,
            "seed": self.seed,
            "seconds": self.seconds,
        }


def entries(schedule: str, settings: Mapping[str, Any] | None = None) -> list[Entry]:
    """Return who runs with a schedule.

    Args:
        schedule: Its name.
        settings: Of K-FAC, which then runs alone.
    """
    if settings:
        return [Entry("K-FAC", None, tuple(sorted(settings.items())))]
    rivals = [Entry(name, lr) for name, rates in RATES[schedule].items() for lr in rates]
    return rivals + [Entry(name) for name in OURS_ALONE[schedule]]


@cache
def has_muon(problem: Problem) -> bool:
    """Tell whether a model has matrices that are Muon's: else it would be AdamW."""
    return bool(optimizers.hidden_linear(problem.task(0).model))


def jobs(
    problems: Mapping[str, Problem],
    schedules: Iterable[str] = SCHEDULES,
    seconds: float = SECONDS,
    seeds: int = SEEDS,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[tuple[int, Job]]:
    """Yield jobs, each with a number by whose rest it falls to a process.

    Contestants take turns, and a contestant is another process's in the next seed.
    """
    for (name, problem), schedule in itertools.product(problems.items(), schedules):
        own = entries(schedule, settings)
        if not has_muon(problem):
            own = [entry for entry in own if entry.contestant != "Muon"]
        for seed, (place, entry) in itertools.product(range(seeds), enumerate(own)):
            yield place + seed, Job(name, entry, schedule, seed, seconds)


# A run -------------------------------------------------------------------------------------------


def fixed_batches(task: Task) -> list[Batch]:
    """Return the training batches that are evaluated: the same ones in all runs."""
    found: list[Batch] = []
    for batch in task.batches(Generator().manual_seed(BATCHES_SEED)):
        if len(found) == BATCHES or (found and batch is found[0]):  # all data are one batch
            return found
        found.append(batch)
    return found


def training_loss(task: Task, batches: Sequence[Batch]) -> float:
    """Return the mean loss over batches in evaluation mode."""
    task.model.eval()
    with torch.no_grad():
        total = sum(float(task.loss(task.model, batch)) for batch in batches)
    task.model.train()
    return total / len(batches)


def factor(schedule: str, share: float) -> float:
    """Return the factor of the learning rate when a share of the time is over."""
    return 1.0 if schedule == "constant" else 0.5 + 0.5 * math.cos(math.pi * min(share, 1.0))


def train(
    task: Task, job: Job, limit: int | None = None, clock: Callable[[], float] = time.process_time
) -> Iterator[tuple[int, float, float]]:
    """Yield steps, seconds and loss: before the first step, about 20 times, after the last step.

    Args:
        task: The task.
        job: The run.
        limit: The most steps.
        clock: Seconds of the process.
    """
    batches = fixed_batches(task)
    yield 0, 0.0, training_loss(task, batches)
    stream = task.batches(Generator().manual_seed(job.seed))
    start = clock()
    optimizer = job.entry.optimizer(task.model)
    base = [group["lr"] for group in optimizer.param_groups]
    elapsed, evaluated = clock() - start, 0
    for count, batch in enumerate(stream, 1):
        start = clock()
        now = factor(job.schedule, elapsed / job.seconds)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * now
        optimizer.zero_grad()
        task.loss(task.model, batch).backward()
        optimizer.step()
        elapsed += clock() - start
        over = elapsed >= job.seconds or count == limit
        due = int(EVALUATIONS * elapsed / job.seconds)
        if due > evaluated or over:
            evaluated = due
            yield count, elapsed, training_loss(task, batches)
        if over:
            return


def run(problem: Problem, job: Job, limit: int | None = None) -> Record:
    """Train and evaluate.

    Args:
        problem: The problem of the job.
        job: The run.
        limit: The most steps.

    Returns:
        The job, the curve (steps, seconds, loss), the metric at the end, the outcome
        (`"finished"`, `"diverged"` or an error), and distinct warnings.
    """
    gc.collect()
    curve: list[list[float]] = []
    outcome, metric = "finished", math.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            task = problem.task(job.seed)
            for count, elapsed, loss in train(task, job, limit):
                curve.append([count, round(elapsed, 4), float(f"{loss:.6g}")])
                if not math.isfinite(loss):
                    outcome = "diverged"
                    break
            else:
                metric = float(f"{task.metric():.6g}")
        except Exception as error:  # whatever it is, it is what a user would get
            outcome = f"{type(error).__name__}: {str(error)[:300]}"
    said = sorted({str(warning.message)[:200] for warning in caught})
    found = job.key() | {"outcome": outcome, "curve": curve, "metric": metric}
    return found | {"warnings": said}


def warm_up() -> None:
    """Use each optimizer once, as first uses import modules and choose kernels."""
    for name in MAKERS:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = Entry(name, None if name in OURS else 1e-3).optimizer(model)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(torch.ones(2, 4)), torch.ones(2, 1)).backward()
            optimizer.step()


# Results -----------------------------------------------------------------------------------------


def _identity(record: Mapping[str, Any], key: Iterable[str]) -> tuple[Any, ...]:
    return tuple(record[name] for name in key)


def read(paths: Iterable[Path]) -> list[Record]:
    """Return the records of files; of those of the same run, the last one."""
    key = ("problem", "contestant", "lr", "schedule", "seed", "seconds")
    found: dict[tuple[Any, ...], Record] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            found[_identity(record, key)] = record
    return list(found.values())


def append(path: Path, record: Record) -> None:
    """Add a line to a file by one write, so that two processes can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def missing(job: Job, records: Sequence[Record], again: Sequence[str], commit: str | None) -> bool:
    """Tell whether a run has to be made.

    Args:
        job: The run.
        records: What is there.
        again: Contestants whose runs count only if they are of the commit.
        commit: The commit of the code.
    """
    key = job.key()
    own = [r for r in records if all(r[name] == value for name, value in key.items())]
    if job.entry.contestant in again or job.entry.label in again:
        own = [r for r in own if r["environment"]["commit"] == commit]
    return not own


def perform(
    folder: Path,
    problems: Mapping[str, Problem],
    todo: Sequence[Job],
    again: Sequence[str] = (),
    limit: int | None = None,
) -> None:
    """Make the runs that are missing, and write each as it ends."""
    where = environment("cpu")
    for job in tqdm(todo, mininterval=5):
        path = folder / f"{job.problem}.jsonl"
        if missing(job, read([path]), again, where["commit"]):
            append(path, run(problems[job.problem], job, limit) | {"environment": where})


# The command -------------------------------------------------------------------------------------


def setting(text: str) -> tuple[str, Any]:
    """Return name and value of `NAME=VALUE`, whose value is JSON or a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def share(text: str) -> tuple[int, int]:
    """Return i and n of `i/n`, i from 1 to n."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError("i/n with i from 1 to n")
    return i, n


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("set", choices=tuple(SETS))
    parser.add_argument("--problems", nargs="+", help="names; else all")
    parser.add_argument("--contestants", nargs="+", choices=tuple(MAKERS), default=list(MAKERS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="CPU time of a run")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--set", dest="settings", nargs="+", type=setting, help="of K-FAC")
    parser.add_argument("--shard", type=share, default=(1, 1), help="i/n: the i-th of n processes")
    parser.add_argument("--again", nargs="+", default=[], help="contestants, at a new commit")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--final", action="store_true", help="all choices are made: K-FAC may run")
    parser.add_argument("--dry", action="store_true", help="tell what it costs and make no run")
    parser.add_argument("--report", action="store_true", help="make no run, print the tables")
    parser.add_argument("--page", action="store_true", help="with --report: put them into the page")
    found = parser.parse_args(arguments)
    if found.page and found.set not in PAGES:
        parser.error(f"{found.set} has no page")
    unknown = set(found.problems or ()) - set(SETS[found.set])
    if unknown:
        parser.error(f"not in the set: {', '.join(sorted(unknown))}")
    if found.set == "held-out" and found.settings:
        parser.error("no setting is chosen on the held-out problems")
    allowed = found.final or found.report or found.dry or not {*found.contestants} & {*OURS}
    if found.set == "held-out" and not allowed:
        parser.error("K-FAC is run on the held-out problems once, with --final")
    return found


def planned(arguments: argparse.Namespace) -> list[Job]:
    """Return the jobs of this process."""
    everything = SETS[arguments.set]
    problems = {name: everything[name] for name in arguments.problems or everything}
    i, n = arguments.shard
    settings = dict(arguments.settings or ())
    found = jobs(problems, arguments.schedules, arguments.seconds, arguments.seeds, settings)
    wanted = {*arguments.contestants}
    return [job for number, job in found if number % n == i - 1 and job.entry.contestant in wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    own = parsed(arguments)
    torch.set_num_threads(1)
    whole = (own.seconds, own.seeds) == (SECONDS, SEEDS)
    folder = folder_of(own.set.replace("-", "_"), whole, own.output)
    todo = planned(own)
    if own.dry:
        seconds = sum(job.seconds for job in todo)
        print(f"{len(todo)} runs, {seconds:.0f} CPU seconds of training")
    elif not own.report:
        warm_up()
        perform(folder, SETS[own.set], todo, own.again)
    else:
        from benchmarks.equal_time_tables import report

        page = PAGES[own.set] if own.page else None
        report(read(sorted(folder.glob("*.jsonl"))), SETS[own.set], folder, page, own.set)


if __name__ == "__main__":
    main()
