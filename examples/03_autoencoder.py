"""A deep autoencoder with lr="auto"
=================================

Train a deep autoencoder with lr="auto" and nothing else set, beside a grid of AdamW.

.. code-block:: sh

    python examples/03_autoencoder.py [--quick] [--seconds 2] [--output FOLDER]

The network has the shape of Hinton & Salakhutdinov's (2006), scaled to the 8 x 8 digits, and is
trained on all of them: what is compared is optimization, the loss on the training data. AdamW has
12 settings (learning rate, batch size, constant or cosine), each of which gets the same wall time
as K-FAC, on the same machine, one run after the other; the best is the one with the lowest median
over the seeds. K-FAC with its defaults, which has the smaller batch and cosine, is there as well.
Evaluations are not timed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from kfacopt import KFACOptimizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = (64, 128, 64, 32, 8, 32, 64, 128, 64)
LEARNING_RATES, BATCHES, SCHEDULES = (1e-3, 3e-3, 1e-2), (128, 512), ("constant", "cosine")
AUTO, DEFAULTS = "KFACOptimizer(lr='auto')", "KFACOptimizer(), batch 128, cosine"
Curve = list[tuple[float, int, float]]  # seconds, steps, loss


def autoencoder(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(a, b), nn.Tanh()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def batches(X: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(X), generator=generator)
        for index in order.split(size) if size < len(X) else (slice(None),):
            yield X[index]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Tensor],
    X: Tensor,
    seconds: float,
    schedule: Callable[[float], float] = lambda _: 1.0,
) -> Curve:
    """Train for some seconds; the schedule is a function of the share of them that is over."""
    rates = [group["lr"] for group in optimizer.param_groups]
    curve: Curve = []
    spent, steps = 0.0, 0
    while spent < seconds:
        start = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(spent / seconds)
        x = next(stream)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), x).backward()
        optimizer.step()
        steps, spent = steps + 1, spent + time.perf_counter() - start
        if spent > (len(curve) + 1) * seconds / 30:
            with torch.no_grad():
                loss = F.binary_cross_entropy_with_logits(model(X), X)
            curve.append((spent, steps, loss.item()))
    return curve


def cosine(share: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--seconds", type=float, default=2.0, help="of training, for each run")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of the picture")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    seconds, seeds = (0.5, (0,)) if arguments.quick else (arguments.seconds, (0, 1, 2))
    X = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    # What no autoencoder can be better than: the pixels are not 0 or 1.
    entropy = F.binary_cross_entropy(X, X).item()

    runs: dict[str, list[Curve]] = {AUTO: []}
    grid = list(itertools.product(LEARNING_RATES, BATCHES, SCHEDULES))
    for seed in tqdm(seeds, desc="seeds"):
        model = autoencoder(seed)
        optimizer = KFACOptimizer(model.parameters(), lr="auto")
        curve = train(model, optimizer, batches(X, len(X), seed), X, seconds)
        runs[AUTO].append(curve)
        model = autoencoder(seed)
        stream = batches(X, BATCHES[0], seed)
        curve = train(model, KFACOptimizer(model.parameters()), stream, X, seconds, cosine)
        runs.setdefault(DEFAULTS, []).append(curve)
        for lr, size, schedule in tqdm(grid[:2] if arguments.quick else grid, desc="AdamW"):
            model = autoencoder(seed)
            adamw = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
            factor = cosine if schedule == "cosine" else (lambda _: 1.0)
            curve = train(model, adamw, batches(X, size, seed), X, seconds, factor)
            runs.setdefault(f"AdamW(lr={lr:g}), batch {size}, {schedule}", []).append(curve)

    final = {name: [curve[-1][2] - entropy for curve in own] for name, own in runs.items()}
    order = sorted(final, key=lambda name: median(final[name]))
    print(f"\nLoss above the entropy of the data ({entropy:.4f}) after {seconds:g} s of training:")
    print(f"{'':44}{'median':>10}{'least':>10}{'most':>10}{'steps':>8}")
    for name in order:
        steps = median(curve[-1][1] for curve in runs[name])
        low, high = min(final[name]), max(final[name])
        print(f"{name:44}{median(final[name]):10.5f}{low:10.5f}{high:10.5f}{steps:8.0f}")

    best_adamw = next(name for name in order if name.startswith("AdamW"))
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for color, name in zip(("C6", "C3", "C1"), (AUTO, DEFAULTS, best_adamw), strict=True):
        for i, curve in enumerate(runs[name]):
            times, values = [c[0] for c in curve], [c[2] - entropy for c in curve]
            axis.semilogy(times, values, color=color, label=name if i == 0 else None)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("training loss above its lower bound")
    axis.legend()
    figure.tight_layout()
    path = arguments.output / "03_autoencoder.png"
    figure.savefig(path, dpi=120)
    print(f"\nPicture: {path}")


if __name__ == "__main__":
    main()
