"""What the examples from 05 on share: AdamW at several rates and K-FAC, the same time for each.

Each run has the same seconds, of CPU time of one thread: what else the machine does is not counted.
Over these seconds the learning rate falls to zero along half a cosine, for everyone. AdamW runs at
each rate of a list, and the best is the one with the lowest mean over the seeds. K-FAC has its
defaults, chosen on other problems than these. Measuring is not timed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from kfacopt import KFACOptimizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KFAC, POINTS = "KFACOptimizer()", 20
Measures = dict[str, float]  # by name, lower is better; the first decides


class Run:
    """One training run: whose it is, its clock, and what was measured on the way."""

    def __init__(
        self, name: str, make: Callable[..., Optimizer], seed: int, seconds: float
    ) -> None:
        self.name, self.make, self.seed, self.seconds = name, make, seed, seconds
        self.curve: list[tuple[float, int, Measures]] = []  # seconds, steps, measures

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return this run's optimizer of the parameters that are trained."""
        return self.make([p for p in model.parameters() if p.requires_grad])

    def steps(self, optimizer: Optimizer, measure: Callable[[], Measures]) -> Iterator[int]:
        """Yield until the time is over; the clock runs while the caller does a step."""
        rates = [group["lr"] for group in optimizer.param_groups]
        spent, step = 0.0, 0
        while spent < self.seconds:
            if spent >= len(self.curve) * self.seconds / POINTS:
                self.curve.append((spent, step, measure()))
            start = time.process_time()
            share = 0.5 + 0.5 * math.cos(math.pi * spent / self.seconds)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            yield step
            step += 1
            spent += time.process_time() - start
        self.curve.append((spent, step, measure()))

    def last(self, name: str) -> float:
        """Return what was measured at the end; infinity where the run diverged."""
        value = self.curve[-1][2][name]
        return value if math.isfinite(value) else math.inf


def command_line(page: str, seconds: float, seeds: int) -> argparse.Namespace:
    """Read the command line; the arguments are what a run takes if nothing is said."""
    parser = argparse.ArgumentParser(description=page.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--seconds", type=float, default=seconds, help="of training, for each run")
    parser.add_argument("--seeds", type=int, default=seeds, help="how many runs of each")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of the picture")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.seeds = 0.1, 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def compare(
    train: Callable[[Run], None],
    rates: Sequence[float],
    seconds: float,
    seeds: int,
    others: Mapping[str, Callable[..., Optimizer]] | None = None,
) -> list[Run]:
    """Train with AdamW at each rate and with K-FAC, one after the other, for each seed.

    Others run as well, and do not count for who wins.
    """
    contestants: dict[str, Callable[..., Optimizer]] = {
        f"AdamW(lr={lr:g})": partial(AdamW, lr=lr, weight_decay=0.0) for lr in rates
    }
    contestants |= {KFAC: KFACOptimizer} | dict(others or {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # What PyTorch prepares at its first steps is nobody's time.
    train(Run("nobody", AdamW, 0, min(seconds, 0.1)))
    runs = [Run(*own, s, seconds) for s in range(seeds) for own in contestants.items()]
    for run in tqdm(runs):
        train(run)
    torch.set_num_threads(threads)
    return runs


def best_adamw(runs: list[Run]) -> str:
    """Return the name of AdamW at its best rate."""
    groups, first = _by_name(runs), next(iter(runs[0].curve[-1][2]))
    names = [name for name in groups if name.startswith("AdamW")]
    return min(names, key=lambda name: _mean(groups[name], first))


def print_table(runs: list[Run]) -> None:
    """Print means and ranges over the seeds, and who won."""
    groups, measures = _by_name(runs), list(runs[0].curve[-1][2])
    width, column = max(map(len, groups)), 36
    print(f"\nAfter {runs[0].seconds:g} s of training, mean and range over the seeds:\n")
    print(" " * width + "".join(f"{name:>{column}}" for name in measures) + f"{'steps':>8}")
    for name, own in groups.items():
        cells = ""
        for measure in measures:
            low, high = (pick(run.last(measure) for run in own) for pick in (min, max))
            cells += f"{f'{_mean(own, measure):.4g} ({low:.4g} to {high:.4g})':>{column}}"
        print(f"{name:{width}}{cells}{sum(run.curve[-1][1] for run in own) // len(own):>8}")

    first, rates = measures[0], [name for name in groups if name.startswith("AdamW")]
    best = best_adamw(runs)
    ours, theirs = ([run.last(first) for run in groups[name]] for name in (KFAC, best))
    verdict = "a draw, their ranges overlap"
    if max(ours) < min(theirs):
        verdict = "K-FAC wins"
    elif max(theirs) < min(ours):
        verdict = "AdamW wins"
    print(f"\nBy {first}, {KFAC} beside {best}, {len(ours)} seed(s): {verdict}.")
    if best in (rates[0], rates[-1]):
        print("AdamW's best rate is at an end of the list: another may be better yet.")


def plot(runs: list[Run], path: Path, log: bool = True) -> None:
    """Draw what decides over the time: AdamW's best rate in colour, its others in grey."""
    groups, first = _by_name(runs), next(iter(runs[0].curve[-1][2]))
    best = best_adamw(runs)
    figure, axis = plt.subplots(figsize=(8, 4.5))
    others = [name for name in groups if not name.startswith("AdamW") and name != KFAC]
    colors = {KFAC: "C3", best: "C1"} | {name: f"C{4 + i}" for i, name in enumerate(others)}
    for name, own in groups.items():
        grey = name not in colors
        color = colors.get(name, "0.85")
        for i, run in enumerate(own):
            times, values = zip(*((t, m[first]) for t, _, m in run.curve), strict=True)
            label = None if grey or i else name
            axis.plot(times, values, color=color, label=label, zorder=1 if grey else 2)
    if log:
        axis.set_yscale("log")
    axis.set_xlabel("seconds of training")
    axis.set_ylabel(first)
    axis.legend(title="grey: AdamW's other rates")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"\nPicture: {path}")


def _by_name(runs: list[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def _mean(runs: list[Run], measure: str) -> float:
    return sum(run.last(measure) for run in runs) / len(runs)
