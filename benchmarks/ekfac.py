"""Which of cost, bases, second moments and damping sets EKFAC apart from K-FAC.

    python -m benchmarks.ekfac [--quick] [--report] [--page] [--problems NAME ...] [--output FILE]

All have the defaults, but for what their names say, on five of the problems that settings are
chosen on: 300 steps with a cosine over them, and as many as fit into the CPU time (of one thread)
of K-FAC's 300, with a cosine over that. Data are made and losses are evaluated off the clock. The
loss is the mean over the same training batches for all. Contestants in `ASIDE` run at equal steps
alone, on the problems in `THOROUGH`.

A run is written as it ends, and one that is in the file is not repeated: a killed command goes on
where it was, and `--output` with another file begins anew. All takes some 6 minutes of one core.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator
from tqdm import tqdm

from benchmarks import choosing
from benchmarks.environment import HERE, RESULTS, environment
from benchmarks.equal_time import fixed_batches, training_loss
from benchmarks.problems.problem import Problem
from benchmarks.protocol import write_json
from benchmarks.step_tables import update_page
from kfacopt import KFACOptimizer
from kfacopt.linalg.eigenbasis import rayleigh_quotients
from kfacopt.optim.state import inverses
from kfacopt.optim.state.curvature_state import CurvatureState

PROBLEMS = ("signals-mlp", "signals-conv1d", "sixteen-layers", "autoencoder-digits", "photograph")
THOROUGH = PROBLEMS[:3]
STEPS, SEEDS = 300, (0, 1)
KINDS = ("steps", "time")
FILE = RESULTS / "ekfac.json"
PAGE = HERE.parent / "docs" / "ekfac.md"
DAMPING = 1e-3  # the default

REFERENCE = "K-FAC"
EKFAC: dict[str, Any] = {"preconditioner": "ekfac"}
OFTEN = {"inverse_update_interval": 10}
EXACT = {"damping_method": "exact"}
CONTESTANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "K-FAC, damping × 10": {"damping": 10 * DAMPING},
    "K-FAC, damping / 10": {"damping": DAMPING / 10},
    "K-FAC, inverses every 10 steps": OFTEN,
    "K-FAC, exact damping": EXACT,
    "K-FAC, exact damping × 10": EXACT | {"damping": 10 * DAMPING},
    "K-FAC, exact damping, inverses every 10 steps": EXACT | OFTEN,
    "EKFAC, λ_G λ_A": EKFAC,
    "EKFAC, λ_G λ_A, bases every 10 steps": EKFAC | OFTEN,
    "EKFAC": EKFAC,
    "EKFAC, bases every 10 steps": EKFAC | OFTEN,
    "EKFAC, bases every 10 steps, always anew": EKFAC | OFTEN,
    "EKFAC, damping / 10": EKFAC | {"damping": DAMPING / 10},
    "EKFAC, damping / 10, bases every 10 steps": EKFAC | OFTEN | {"damping": DAMPING / 10},
    "EKFAC, damping × 10": EKFAC | {"damping": 10 * DAMPING},
    "EKFAC, damping × 100": EKFAC | {"damping": 100 * DAMPING},
}
ASIDE = (
    "K-FAC, damping / 10",
    "K-FAC, inverses every 10 steps",
    "K-FAC, exact damping, inverses every 10 steps",
    "EKFAC, λ_G λ_A, bases every 10 steps",
    "EKFAC, damping / 10",
    "EKFAC, damping / 10, bases every 10 steps",
)


def _take_kfac_eigenvalues(self: CurvatureState, _: Any, blocks: Iterable[Any], *__: Any) -> None:
    """Stand in for `_fold_second_moments`: λ_G λ_A of the factors as they are now."""
    for block in blocks:
        state, layer_state = self.entries[block.anchor], self.entries[block.layer.anchor]
        product, bases = inverses._factors(layer_state, block), inverses.bases_of(state)
        if bases is not None:
            sides = (product.grad_output_factor, product.input_factor)
            of_g, of_a = (rayleigh_quotients(f, q) for f, q in zip(sides, bases, strict=True))
            state["second_moments"] = of_g.unsqueeze(-1) * of_a.unsqueeze(-2)


@contextmanager
def changed(name: str) -> Iterator[None]:
    """Put in what no setting of the library does. It takes private names, as nobody else may."""
    fold, tolerance = CurvatureState._fold_second_moments, inverses.BASIS_TOLERANCE
    if "λ" in name:
        CurvatureState._fold_second_moments = _take_kfac_eigenvalues  # type: ignore[method-assign]
    if "anew" in name:
        inverses.BASIS_TOLERANCE = 0.0
    try:
        yield
    finally:
        CurvatureState._fold_second_moments = fold  # type: ignore[method-assign]
        inverses.BASIS_TOLERANCE = tolerance


def run(problem: Problem, name: str, seed: int, steps: int, seconds: float | None) -> list[float]:
    """Return loss, CPU seconds and steps of a run of so many steps, or of so many seconds."""
    task = problem.task(seed)
    batches = task.batches(Generator().manual_seed(seed))
    optimizer = KFACOptimizer(task.model.parameters(), **CONTESTANTS[name])
    rates = [group["lr"] for group in optimizer.param_groups]
    clock, step = 0.0, 0
    with changed(name):
        while (step < steps) if seconds is None else (clock < seconds):
            batch = next(batches)
            begin = time.process_time()
            done = step / steps if seconds is None else clock / seconds
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()
            clock += time.process_time() - begin
            step += 1
    return [training_loss(task, fixed_batches(task)), clock, step]


def contestants(problem: str, kind: str) -> list[str]:
    """Return who runs on a problem, in equal steps or in equal time."""
    if kind == "time":
        return [name for name in CONTESTANTS if name not in ASIDE and "λ" not in name]
    return [name for name in CONTESTANTS if problem in THOROUGH or name not in ASIDE]


def measure(
    problem: Problem,
    steps: int,
    seeds: Sequence[int],
    found: dict[str, Any] | None = None,
    keep: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the runs of a problem by contestant and kind; a row for each seed.

    Args:
        problem: The problem.
        steps: How many, of those at equal steps.
        seeds: Of initialisation and batches.
        found: The runs that there are, to be added to.
        keep: Is called after each run.
    """
    found = {} if found is None else found
    run(problem, REFERENCE, 0, min(steps, 20), None)  # warm up
    for kind in KINDS:
        seconds = None
        if kind == "time":
            seconds = statistics.mean(row[1] for row in found[REFERENCE]["steps"])
        todo = list(itertools.product(seeds, contestants(problem.name, kind)))
        for seed, name in tqdm(todo, desc=f"{problem.name}, equal {kind}"):
            rows = found.setdefault(name, {}).setdefault(kind, [])
            if len(rows) <= seeds.index(seed):
                rows.append(run(problem, name, seed, steps, seconds))
                keep()
    return found


def _cell(rows: list[list[float]]) -> str:
    return ", ".join(f"{row[0]:.2g}" for row in rows) or "–"


def table(found: dict[str, Any], kind: str) -> str:
    """Return the losses of all seeds as Markdown."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for contestant in CONTESTANTS:
        own = [runs.get(contestant, {}).get(kind, []) for runs in found.values()]
        if any(own):
            lines.append(f"| {contestant} | " + " | ".join(map(_cell, own)) + " |")
    return "\n".join(lines)


def costs(found: dict[str, Any]) -> str:
    """Return the CPU time of 300 steps beside K-FAC's as Markdown."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for contestant in CONTESTANTS:
        if "λ" in contestant:
            continue
        cells = []
        for runs in found.values():
            own, reference = (runs.get(x, {}).get("steps") for x in (contestant, REFERENCE))
            seconds = [statistics.mean(r[1] for r in rows) for rows in (own, reference) if rows]
            cells.append(f"{seconds[0] / seconds[1]:.2f}" if own else "–")
        lines.append(f"| {contestant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(content: dict[str, Any]) -> str:
    """Return where the runs were made, and all tables."""
    found, where = content["runs"], content["environment"]
    runs = [
        r for p in found.values() for kinds in p.values() for rows in kinds.values() for r in rows
    ]
    settings = ", ".join(f"{name}={value}" for name, value in content["settings"].items())
    parts = [
        f"{where['device']}, {where['threads']} thread, torch {where['torch']}, kfacopt "
        f"{where['version']} at {(where['commit'] or '?')[:9]}, {where['date']}; the defaults are "
        f"{settings}; {len(runs)} runs, {sum(r[1] for r in runs):.0f} CPU seconds of training.",
        f"## At equal steps: {STEPS}, with a cosine",
        table(found, "steps"),
        f"## At equal CPU time: that of K-FAC's {STEPS} steps, with a cosine over it",
        table(found, "time"),
        f"## CPU time of {STEPS} steps, K-FAC's is 1",
        costs(found),
    ]
    return "\n\n".join(parts)


def defaults() -> dict[str, Any]:
    """Return the settings that the page's reader has to know of."""
    given = inspect.signature(KFACOptimizer).parameters
    model = torch.nn.Linear(1, 1)
    damping = KFACOptimizer(model.parameters()).param_groups[0]["damping"]
    return {"lr": given["lr"].default, "kl_clip": given["kl_clip"].default, "damping": damping}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three steps, nothing is written")
    parser.add_argument("--report", action="store_true", help="no run, the tables of what there is")
    parser.add_argument("--page", action="store_true", help="put the tables into the docs")
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=choosing.PROBLEMS)
    parser.add_argument("--output", type=Path, default=FILE, help="file of the results")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is missing, problem by problem, and print the tables."""
    own = parsed()
    torch.set_num_threads(1)
    content: dict[str, Any] = {"environment": environment("cpu"), "settings": defaults()}
    content["runs"] = {}
    if own.output.exists() and not own.quick:
        content = json.loads(own.output.read_text())
    names, steps, seeds = (PROBLEMS[:1], 3, (0,)) if own.quick else (own.problems, STEPS, SEEDS)
    for name in () if own.report else names:
        measure(
            choosing.PROBLEMS[name],
            steps,
            seeds,
            content["runs"].setdefault(name, {}),
            lambda: None if own.quick else write_json(own.output, content),
        )
    text = report(content)
    print(text)
    if own.page:
        update_page(PAGE, "ekfac", text)


if __name__ == "__main__":
    main()
