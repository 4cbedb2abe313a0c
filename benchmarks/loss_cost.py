"""What a due step costs with a loss that is found, relative to one that is known.

    OMP_NUM_THREADS=1 python -m benchmarks.loss_cost [--quick]

An MLP 784-1000-500-250 with 10 or 32 outputs and 512 data, as of `benchmarks.step_cost`; every step
has due factors, none has due inverses. Contestants take turns; CPU seconds of one thread, medians
over rounds, relative to the known loss of the same kind. Wider z, and z whose rows see each other,
take Lanczos' method: dozens of passes through the piece between z and the loss.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def focal(z: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of −(1 − p)² log p of the labels."""
    log_p = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


# name: the loss of z, targets and labels, and the known loss that it is compared with
LOSSES: dict[str, tuple[Loss, str]] = {
    "mse_loss": (lambda z, y, _: F.mse_loss(z, y), "mse_loss"),
    "mean square by hand": (lambda z, y, _: ((z - y) ** 2).mean(), "mse_loss"),
    "huber_loss": (lambda z, y, _: F.huber_loss(z, y), "mse_loss"),
    "l1_loss": (lambda z, y, _: F.l1_loss(z, y), "mse_loss"),
    "cross_entropy": (lambda z, _, c: F.cross_entropy(z, c), "cross_entropy"),
    "cross entropy by hand": (
        lambda z, _, c: -z.log_softmax(-1)[torch.arange(len(c)), c].mean(),
        "cross_entropy",
    ),
    "focal by hand": (lambda z, _, c: focal(z, c), "cross_entropy"),
    "cosine": (lambda z, y, _: (1 - F.cosine_similarity(z, y)).mean(), "cross_entropy"),
}


def due_step(loss: Loss, outputs: int, batch: int, widths: list[int]) -> Callable[[], None]:
    """Return a function that trains a network of its own for a step."""
    torch.manual_seed(0)
    sizes = [*widths, outputs]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers[:-1])
    X, y = torch.rand(batch, widths[0]), torch.randn(batch, outputs)
    optimizer = KFACOptimizer(
        model.parameters(), factor_update_interval=1, inverse_update_interval=10**6
    )

    def step() -> None:
        optimizer.zero_grad()
        loss(model(X), y, y.argmax(1)).backward()
        optimizer.step()

    return step


def measure(outputs: int, batch: int, widths: list[int], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of a due step for each loss."""
    steps = {n: due_step(loss, outputs, batch, widths) for n, (loss, _) in LOSSES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            if i >= 2:  # the first ones make state and inverses
                seconds[name].append(time.thread_time() - start)
    return {name: median(own) for name, own in seconds.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of a second")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    batch, widths, rounds = (16, [8, 8], 1) if quick else (512, [784, 1000, 500, 250], 15)
    print("| loss | known | 10 outputs | 32 outputs |\n| --- | --- | --- | --- |")
    tables = [measure(outputs, batch, widths, rounds) for outputs in (10, 32)]
    for name, (_, known) in LOSSES.items():
        ratios = [table[name] / table[known] for table in tables]
        print(f"| {name} | `{known}` | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
