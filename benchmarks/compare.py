"""Compare optimizers by the time that they take to a target.

    python -m benchmarks.compare [--quick] [--problems ...] [--trials N] [--scale X] [--workers N]

Stages, targets and clock are described in `README.md` and `protocol.py`. Every run is a file under
the folder of results and is not repeated; an interrupted comparison goes on where it was. Each
worker keeps to one core and one thread. Some of the problems, or other sizes, go to
`results/part/compare`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import all_contestants
from benchmarks.environment import RESULTS, environment, folder_of
from benchmarks.optimizers import missing_packages
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import Comparison, Options, write_json
from benchmarks.report import write_report
from benchmarks.running import run
from benchmarks.step_tables import update_readme
from benchmarks.tuning import DEFAULT

WARM_UP = "diabetes-full"
QUICK = {"trials": 1, "seeds": 1, "scale": 0.0, "calibration_rounds": 0, "minimal_steps": 4}


def _start_worker(counter: Any) -> None:
    """Keep a worker to one core and one thread."""
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    for contestant in all_contestants().values():  # first steps import a part of torch
        run(PROBLEMS[WARM_UP], contestant, DEFAULT, 0, steps=2, limit=1.0)
    gc.freeze()  # a collection before each run then looks at what runs left alone


def _after_collection(function: Callable[[Any], Any], item: Any) -> Any:
    """Call a function when the garbage of earlier calls is gone, so that none is in its time."""
    gc.collect()
    return function(item)


@contextmanager
def workers(count: int) -> Iterator[Callable[[Any, Iterable], Iterable]]:
    """Start processes and give a map that uses them.

    Args:
        count: How many runs go on at a time.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(count, _start_worker, (context.Value("i", 0),)) as pool:
        yield lambda function, items: pool.imap_unordered(
            partial(_after_collection, function), list(items)
        )


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    defaults = Options(RESULTS, (), ())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    contestants = tuple(all_contestants())
    parser.add_argument("--contestants", nargs="+", choices=contestants, default=list(contestants))
    parser.add_argument("--trials", type=int, default=defaults.trials)
    parser.add_argument("--baseline-trials", type=int, help="of SGD and AdamW, if not as many")
    parser.add_argument("--seeds", type=int, default=defaults.seeds)
    parser.add_argument("--scale", type=float, default=defaults.scale, help="factor of all budgets")
    parser.add_argument("--workers", type=int, default=max(1, min(2, os.cpu_count() or 1)))
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--again", nargs="+", choices=contestants, default=[], help="forget these")
    parser.add_argument("--report-only", action="store_true", help="make no runs")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute: few steps")
    return parser.parse_args(arguments)


def options_of(arguments: argparse.Namespace) -> Options:
    """Return what is compared, and in which folder."""
    chosen = {"trials": arguments.trials, "baseline_trials": arguments.baseline_trials}
    chosen |= {"seeds": arguments.seeds, "scale": arguments.scale}
    names = (tuple(arguments.problems), tuple(arguments.contestants))
    own = Options(RESULTS / "compare", *names, **(QUICK if arguments.quick else chosen))
    published = Options(own.folder, tuple(PROBLEMS), tuple(all_contestants()))
    name = "compare_quick" if arguments.quick else "compare"
    whole = arguments.quick or own == published
    return replace(own, folder=folder_of(name, whole, arguments.output))


def main() -> None:
    arguments = parsed()
    options = options_of(arguments)
    with workers(arguments.workers) as map_jobs:
        comparison = Comparison(options, map_jobs)
        if arguments.again:
            comparison.forget(arguments.again)
        if not arguments.report_only:
            _record_session(options, arguments.workers)
            comparison.complete()
    text = write_report(comparison)
    print(text)
    if arguments.readme:
        update_readme("compare", text)


def _record_session(options: Options, worker_count: int) -> None:
    """Write on what machine and with what options runs were made, beside earlier sessions."""
    path = options.folder / "sessions.json"
    sessions = json.loads(path.read_text()) if path.exists() else []
    session = environment("cpu") | {"threads": 1, "workers": worker_count}
    session |= {"missing_packages": missing_packages()}
    named = {k: v for k, v in asdict(options).items() if k != "folder"}
    session["options"] = json.loads(json.dumps(named))
    if not sessions or sessions[-1] != session:
        write_json(path, [*sessions, session])


if __name__ == "__main__":
    main()
