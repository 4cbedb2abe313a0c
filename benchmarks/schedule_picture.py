"""Draw what a schedule does to a step: lr, the step's length and ν over a run.

    python -m benchmarks.schedule_picture

A small network learns the digits with each of four schedules of torch; with the defaults, but
without momentum, so that a step's length is that of its own time, and with a fixed κ, so that ν is
that of the gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from benchmarks.environment import HERE
from kfacopt import KFACOptimizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS, BATCH, DPI = 300, 64, 100
LR, KL_CLIP = 0.2, 5e-5
PICTURE = HERE.parent / "docs" / "pictures" / "schedules.png"

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.02, total_iters=STEPS // 10),
            lr_scheduler.CosineAnnealingLR(o, STEPS - STEPS // 10),
        ],
        [STEPS // 10],
    ),
    # It would set momentum, too.
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(
        o, 2 * LR, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "cosine with restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, STEPS // 3),
}


def digits() -> tuple[Tensor, Tensor]:
    """Return images and labels."""
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y)


def run(schedule: Callable[[Any], Any], steps: int = STEPS) -> dict[str, list[float]]:
    """Train, and return lr, the step's length ‖θ_{t+1} − θ_t‖ and ν of every step.

    Args:
        schedule: Makes a scheduler of an optimizer.
        steps: How many.
    """
    torch.manual_seed(0)
    X, y = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = KFACOptimizer(model.parameters(), lr=LR, momentum=0.0, kl_clip=KL_CLIP)
    scheduler = schedule(optimizer)
    rows: dict[str, list[float]] = {"lr": [], "length": [], "ν": []}
    for _ in range(steps):
        index = torch.randint(len(X), (BATCH,))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        F.cross_entropy(model(X[index]), y[index]).backward()
        optimizer.step()
        moved = [p.detach() - x for p, x in zip(model.parameters(), before, strict=True)]
        rows["lr"].append(optimizer.param_groups[0]["lr"])
        rows["length"].append(float(torch.cat([d.flatten() for d in moved]).norm()))
        rows["ν"].append(optimizer.statistics()["kl_clip_scale"])
        scheduler.step()
    return rows


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw a column for each schedule."""
    labels = {"lr": "lr", "length": "length of the step", "ν": "ν, the clip"}
    figure, axes = plt.subplots(
        len(labels), len(found), figsize=(3 * len(found), 5.4), sharex=True, sharey="row"
    )
    for column, (name, rows) in zip(axes.T, found.items(), strict=True):
        for axis, (key, label) in zip(column, labels.items(), strict=True):
            axis.plot(rows[key], linewidth=1)
            axis.set_yscale("log" if key != "lr" else "linear")
            if column is axes.T[0]:
                axis.set_ylabel(label)
        column[0].set_title(name, fontsize="medium")
        column[-1].set_xlabel("step")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def main() -> None:
    draw({name: run(schedule) for name, schedule in SCHEDULES.items()}, PICTURE)


if __name__ == "__main__":
    main()
