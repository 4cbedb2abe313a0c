"""What a step of each contestant costs on a problem, which says how many fit into its budget."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contestants import all_contestants
from benchmarks.problems import PROBLEMS
from benchmarks.running import stepper
from benchmarks.tuning import DEFAULT

PERIOD = 50  # steps: a multiple of the contestants' default intervals
GRADIENT = "gradient"


def calibrated(
    arguments: tuple[str, tuple[str, ...], int],
) -> tuple[str, dict[str, float]]:
    """Call `calibrate` and return the problem's name with the costs."""
    return arguments[0], calibrate(*arguments)


def calibrate(problem: str, names: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Return the seconds of a step of each contestant, and of a gradient.

    Args:
        problem: The problem's name.
        names: The contestants.
        rounds: How many times a period of steps is timed, interleaved; a first one warms up.
            0 is for smoke runs: two steps, not warmed up.
    """
    period = PERIOD if rounds else 2
    functions: dict[str, tuple[Callable[[], Any], int]] = {}
    gradient_task = PROBLEMS[problem].task(0)
    batch = next(gradient_task.batches(torch.Generator().manual_seed(0)))

    def gradient() -> None:
        gradient_task.model.zero_grad()
        gradient_task.loss(gradient_task.model, batch).backward()

    functions[GRADIENT] = (gradient, period)
    for name in names:
        contestant = all_contestants()[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, step = stepper(PROBLEMS[problem].task(0), contestant, DEFAULT, 0)
        functions[name] = (step, max(1, period // 5) if contestant.all_data else period)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for count in range(rounds + 1):
        for name, (function, repeats) in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            if count or not rounds:
                times[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(found) for name, found in times.items()}
