"""Choose the defaults of `KFACOptimizer` by what does best on many problems without tuning.

    python -m benchmarks.defaults [--candidates N] [--readme]

Quasi-random settings, and those that are the defaults now, train each problem of the comparison at
a constant learning rate for half its budget, on the seed that is used for tuning. A problem has two
targets: that of the comparison (the best of a tuned SGD and AdamW), and what AdamW's own defaults
reach in the same time. A candidate's score on a problem is the mean over both of (4 − r)⁺ / 3,
where r is its time over the best candidate's (see `scoring.score`).

A second round adds settings from the part of the space in which those of the first did best, and a
third those settings rounded.

*Left out*: for each problem, the candidate of the first round (the others were drawn with all
problems in view) with the best score on all other problems, and its score there; their mean is what
a choice made this way is worth on a problem that it has not seen.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.calibration import GRADIENT
from benchmarks.compare import workers
from benchmarks.contestants import BASELINES
from benchmarks.environment import RESULTS, environment, folder_of
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import TUNING_SEED, Comparison, Job, Options, write_json
from benchmarks.running import Run
from benchmarks.scoring import relative_to_best, score
from benchmarks.step_tables import markdown, update_readme
from benchmarks.tuning import CONSTANT, DEFAULT, Choice, Dimension, LogUniform, Trial, trials
from kfacopt import KFACOptimizer
from kfacopt.optim.settings import DEFAULTS

NAME = "K-FAC"
SHARE = 0.5  # of a problem's budget
FASTEST = 2.0  # a step costs SHARE times that many gradients at least, which bounds their number
SIZES = (24, 6, 1.0)  # candidates, those of the second round, factor of budgets
CURRENT = "now"

SPACE: Mapping[str, Dimension] = {
    "lr": LogUniform(0.05, 0.5),
    "damping": LogUniform(1e-4, 3e-2),
    "kl_clip": LogUniform(1e-5, 1e-3),
    "momentum": LogUniform(0.05, 0.4, from_one=True),
    "fallback_lr": LogUniform(1e-3, 3e-2),
    "ema_decay": Choice((0.8, 0.9, 0.95)),
    "intervals": Choice(((2, 10), (5, 25), (10, 50))),
}

# The second round's, around the best of the first.
NARROWER: Mapping[str, Dimension] = {
    "lr": LogUniform(0.05, 0.12),
    "damping": LogUniform(3e-4, 3e-3),
    "kl_clip": LogUniform(1e-5, 1.5e-4),
    "momentum": LogUniform(0.08, 0.25, from_one=True),
    "fallback_lr": LogUniform(5e-3, 3e-2),
    "ema_decay": Choice((0.8, 0.9)),
    "intervals": Choice(((5, 25), (10, 50))),
}

# Between the best of the first round, rounded; and last what the defaults were before.
ROUNDED = (
    (0.07, 1e-3, 3e-5, 0.9, 0.01, 0.8, 5, 25),
    (0.07, 5e-4, 5e-5, 0.85, 0.015, 0.9, 10, 50),
    (0.1, 1e-3, 5e-5, 0.85, 0.015, 0.8, 5, 25),
    (0.07, 2e-3, 2e-5, 0.9, 0.01, 0.9, 10, 50),
    (0.12, 8e-3, 1.5e-4, 0.9, 1e-3, 0.95, 5, 25),
)

Scores = Mapping[str, Mapping[str, float]]  # by candidate and problem


def current() -> Trial:
    """Return the settings that are the defaults now, written out."""
    signature = inspect.signature(KFACOptimizer).parameters
    names = ("lr", "kl_clip", "momentum", "fallback_lr")
    settings = {name: signature[name].default for name in names}
    return Trial(CURRENT, asdict(DEFAULTS["fixed"]) | settings, CONSTANT)


def candidates(count: int, narrower: int) -> list[Trial]:
    """Return the current defaults and quasi-random settings.

    Args:
        count: How many from the whole space.
        narrower: How many from its part in which those did best.
    """
    found = [current()]
    for prefix, space, size in (("", SPACE, count), ("b", NARROWER, narrower)):
        for trial in trials(space, size, scheduled=False):
            settings = dict(trial.settings)
            factors, inverses = settings.pop("intervals")
            settings |= {"factor_update_interval": factors, "inverse_update_interval": inverses}
            found.append(Trial(prefix + trial.name, settings, CONSTANT))
    names = ("lr", "damping", "kl_clip", "momentum", "fallback_lr", "ema_decay")
    names += ("factor_update_interval", "inverse_update_interval")
    for number, values in enumerate(ROUNDED if narrower else ()):
        found.append(Trial(f"r{number}", dict(zip(names, values, strict=True)), CONSTANT))
    return found


def job(comparison: Comparison, problem: str, trial: Trial, folder: Path) -> Job:
    """Return the job that trains a problem with a candidate until its time is over."""
    budget = comparison.options.scale * PROBLEMS[problem].budget
    steps = max(
        comparison.options.minimal_steps,
        round(budget / (FASTEST * comparison.costs(problem)[GRADIENT])),
    )
    return Job(problem, NAME, trial, TUNING_SEED, steps, SHARE * budget, folder)


def targets(comparison: Comparison, problem: str) -> tuple[float, float]:
    """Return a problem's frozen target, and what AdamW's defaults reach in the candidates' time."""
    frozen = comparison.target(problem)
    runs = [j.read() for j in comparison.final_jobs(problem, "AdamW", DEFAULT)]
    assert frozen is not None
    reached = [r.best_within(SHARE) for r in runs if r is not None]
    return frozen["value"], statistics.median(reached)


def scores(runs: Mapping[str, Mapping[str, Run]], goals: Mapping[str, Sequence[float]]) -> Scores:
    """Return each candidate's score on each problem.

    Args:
        runs: By problem and candidate.
        goals: The targets by problem.
    """
    found: dict[str, dict[str, float]] = {}
    for problem, row in runs.items():
        times = [
            {problem: {c: r.first_reach(goal)[1] for c, r in row.items()}}
            for goal in goals[problem]
        ]
        ratios = [relative_to_best(own) for own in times]
        for name in row:
            found.setdefault(name, {})[problem] = statistics.mean(score(r[name]) for r in ratios)
    return found


def best(found: Scores, problems: Iterable[str]) -> str:
    """Return the candidate with the best mean score on problems."""
    chosen = list(problems)
    return max(found, key=lambda name: statistics.mean(found[name][p] for p in chosen))


def first_round(found: Scores) -> Scores:
    """Return the scores of candidates that were drawn before any problem was tried."""
    return {name: row for name, row in found.items() if name.isdigit()}


def left_out(found: Scores, problems: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return, for each problem, whom the others choose, and its score there."""
    chosen = {p: best(found, (q for q in problems if q != p)) for p in problems}
    return {p: {"candidate": name, "score": found[name][p]} for p, name in chosen.items()}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.3g}"


def report(trained: Sequence[Trial], found: Scores, problems: Sequence[str]) -> str:
    """Return the tables: candidates by their score, and what each problem's others choose."""
    means = {t.name: statistics.mean(found[t.name].values()) for t in trained}
    order = sorted(trained, key=lambda t: -means[t.name])
    keys = list(order[0].settings)
    rows = [
        [
            t.name,
            *(_cell(t.settings[key]) for key in keys),
            f"{means[t.name]:.2f}",
            f"{min(found[t.name].values()):.2f}",
        ]
        for t in order
    ]
    outside = left_out(first_round(found), problems)
    honest = statistics.mean(entry["score"] for entry in outside.values())
    parts = [
        markdown(["", *keys, "score", "worst problem"], rows),
        markdown(
            ["left out", "the others' choice", "its score", "defaults now", "best candidate"],
            [
                [
                    p,
                    outside[p]["candidate"],
                    f"{outside[p]['score']:.2f}",
                    f"{found[CURRENT][p]:.2f}",
                    f"{max(own[p] for own in found.values()):.2f}",
                ]
                for p in problems
            ],
        ),
        f"Mean score of the choice on the problem left out: {honest:.2f}; of the defaults at the "
        f"time of the run: {means[CURRENT]:.2f}.",
    ]
    return "\n\n".join(parts)


def choose(comparison: Comparison, trained: Sequence[Trial], folder: Path) -> str:
    """Make the runs that are missing, write the result, and return the tables.

    Args:
        comparison: With frozen targets.
        trained: The candidates.
        folder: Where runs and results go.
    """
    problems = comparison.options.problems
    comparison.perform(
        [j for p in problems for j in comparison.final_jobs(p, "AdamW", DEFAULT)], "AdamW's own"
    )
    jobs = {(p, t.name): job(comparison, p, t, folder) for p in problems for t in trained}
    comparison.perform(jobs.values(), "candidates")
    runs: dict[str, dict[str, Run]] = {}
    for (problem, name), one in jobs.items():
        run = one.read()
        assert run is not None
        runs.setdefault(problem, {})[name] = run
    found = scores(runs, {p: targets(comparison, p) for p in problems})
    content = environment("cpu") | {
        "candidates": {t.name: dict(t.settings) for t in trained},
        "scores": found,
        "left_out": left_out(first_round(found), problems),
    }
    write_json(folder / "defaults.json", content)
    return report(trained, found, problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--candidates", type=int, default=SIZES[0])
    parser.add_argument(
        "--narrower", type=int, default=SIZES[1], help="candidates of the second round"
    )
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--scale", type=float, default=SIZES[2], help="factor of all budgets")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compared", type=Path, default=RESULTS / "compare", help="the targets")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md")
    arguments = parser.parse_args()
    if len(arguments.problems) < 2 or arguments.candidates < 1:
        parser.error("--problems: at least 2, one is left out at a time; --candidates: at least 1.")
    baselines = tuple(c.name for c in BASELINES)
    options = Options(
        arguments.compared, tuple(arguments.problems), baselines, scale=arguments.scale
    )
    with workers(arguments.workers) as map_jobs:
        comparison = Comparison(options, map_jobs)
        comparison.calibrate()
        comparison.freeze_targets()
        trained = candidates(arguments.candidates, arguments.narrower)
        sizes = (arguments.candidates, arguments.narrower, arguments.scale)
        whole = sizes == SIZES and [*arguments.problems] == [*PROBLEMS]
        text = choose(comparison, trained, folder_of("defaults", whole, arguments.output))
    print(text)
    if arguments.readme:
        update_readme("defaults", text)


if __name__ == "__main__":
    main()
