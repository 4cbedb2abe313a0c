"""Which of cost, bases, second moments and damping sets EKFAC apart from K-FAC.

    python -m benchmarks.ekfac [--quick] [--report] [--problems NAME ...]

All have the defaults, but for what their names say, on five of the problems that settings are
chosen on: 300 steps with a cosine over them, and as many as fit into the CPU time (of one thread)
of K-FAC's 300, with a cosine over that. Data are made and losses are evaluated off the clock. The
loss is the mean over the same training batches for all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator

from benchmarks import choosing
from benchmarks.environment import RESULTS, environment
from benchmarks.equal_time import fixed_batches, training_loss
from benchmarks.problems.problem import Problem
from kfacopt import KFACOptimizer
from kfacopt.linalg.eigenbasis import rayleigh_quotients
from kfacopt.optim.state import inverses
from kfacopt.optim.state.curvature_state import CurvatureState

PROBLEMS = ("signals-mlp", "signals-conv1d", "sixteen-layers", "autoencoder-digits", "photograph")
STEPS, SEEDS = 300, (0, 1)
FILE = RESULTS / "ekfac.json"
LR = 0.07

REFERENCE = "K-FAC"
EKFAC: dict[str, Any] = {"preconditioner": "ekfac"}
OFTEN = {"inverse_update_interval": 10}
EXACT = {"damping_method": "exact"}
CONTESTANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "K-FAC, damping × 10": {"damping": 5e-3},
    "K-FAC, damping / 10": {"damping": 5e-5},
    "K-FAC, inverses every 10 steps": OFTEN,
    "K-FAC, exact damping": EXACT,
    "K-FAC, exact damping × 10": EXACT | {"damping": 5e-3},
    "K-FAC, exact damping, inverses every 10 steps": EXACT | OFTEN,
    "EKFAC, λ_G λ_A": EKFAC,
    "EKFAC, λ_G λ_A, bases every 10 steps": EKFAC | OFTEN,
    "EKFAC": EKFAC,
    "EKFAC, bases every 10 steps": EKFAC | OFTEN,
    "EKFAC, bases every 10 steps, always anew": EKFAC | OFTEN,
    "EKFAC, damping / 10": EKFAC | {"damping": 5e-5},
    "EKFAC, damping / 10, bases every 10 steps": EKFAC | OFTEN | {"damping": 5e-5},
    "EKFAC, damping × 10": EKFAC | {"damping": 5e-3},
    "EKFAC, damping × 100": EKFAC | {"damping": 5e-2},
}


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
    clock, step = 0.0, 0
    with changed(name):
        while (step < steps) if seconds is None else (clock < seconds):
            batch = next(batches)
            begin = time.process_time()
            done = step / steps if seconds is None else clock / seconds
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()
            clock += time.process_time() - begin
            step += 1
    return [training_loss(task, fixed_batches(task)), clock, step]


def measure(problem: Problem, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the runs of a problem by contestant and kind; a row for each seed."""
    found: dict[str, Any] = {name: {"steps": [], "time": []} for name in CONTESTANTS}
    run(problem, REFERENCE, 0, min(steps, 20), None)  # warm up
    for seed, name in itertools.product(seeds, CONTESTANTS):
        found[name]["steps"].append(run(problem, name, seed, steps, None))
    seconds = statistics.mean(row[1] for row in found[REFERENCE]["steps"])
    for seed, name in itertools.product(seeds, CONTESTANTS):
        if "λ" not in name:
            found[name]["time"].append(run(problem, name, seed, steps, seconds))
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


def report(found: dict[str, Any]) -> str:
    """Return all tables."""
    parts = [f"{kind}\n\n{table(found, kind)}" for kind in ("steps", "time")]
    return "\n\n".join([*parts, f"cost\n\n{costs(found)}"])


def main() -> None:
    """Run all, problem by problem, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="the tables of what was run")
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=choosing.PROBLEMS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if args.report:
        found = json.loads(FILE.read_text())["runs"]
    else:
        names, steps, seeds = (
            (PROBLEMS[:1], 3, (0,)) if args.quick else (args.problems, STEPS, SEEDS)
        )
        for name in names:
            found[name] = measure(choosing.PROBLEMS[name], steps, seeds)
            if not args.quick:
                FILE.write_text(
                    json.dumps({"environment": environment("cpu"), "runs": found}) + "\n"
                )
    print(report(found))


if __name__ == "__main__":
    main()
