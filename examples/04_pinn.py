"""A physics-informed network with lr="auto"
=========================================

Solve a Poisson equation with a physics-informed network: lr="auto" beside Adam and L-BFGS.

.. code-block:: sh

    python examples/04_pinn.py [--quick] [--seconds 6] [--output FOLDER]

-Δu = f on the unit square with u = sin(πx) sin(2πy) known, a tanh network in float64, its values on
the border and the residual in the interior under MSE. `input_derivatives` takes the value, the two
first derivatives and the Laplacian forward through the layers (Taylor mode), as four positions of
ordinary linear layers: the exact curvature of the residual is seen, and K-FAC-expand applies as it
is. All optimizers get the same wall time (one run after the other, evaluations not timed) and all
points in every step. Adam has 8 settings, L-BFGS 6; K-FAC tunes itself, or has its defaults.

Reference: Dangel, Müller & Zeinhofer (2024), https://arxiv.org/abs/2405.15603.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from kfacopt import KFACOptimizer, input_derivatives

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = (2, 48, 48, 48, 1)
BORDER_WEIGHT = 10.0
Curve = list[tuple[float, float]]  # seconds, relative L2 error


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(a, b), nn.Tanh()]
        nn.init.xavier_uniform_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])


def solution(points: Tensor) -> Tensor:
    return (math.pi * points[:, 0]).sin() * (2 * math.pi * points[:, 1]).sin()


def sample(inside: int, on_border: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    interior = torch.rand(inside, 2, generator=generator, dtype=torch.float64)
    border = torch.rand(on_border, 2, generator=generator, dtype=torch.float64)
    sides = torch.arange(on_border)
    border[sides, sides % 2] = (sides % 4 >= 2).to(border)
    return interior, border


def train(
    make: Callable[..., torch.optim.Optimizer],
    seconds: float,
    schedule: Callable[[float], float],
    seed: int,
) -> Curve:
    torch.manual_seed(seed)
    model = network().double()
    optimizer = make(model.parameters())
    interior, border = sample(400, 80)
    source, values = 5 * math.pi**2 * solution(interior), solution(border)
    axis = torch.linspace(0, 1, 50, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)

    def closure() -> Tensor:
        optimizer.zero_grad()
        _, _, laplacian = input_derivatives(model, interior)
        residual = F.mse_loss(-laplacian[:, 0], source)
        loss = residual + BORDER_WEIGHT * F.mse_loss(model(border)[:, 0], values)
        loss.backward()
        return loss

    rate = optimizer.param_groups[0]["lr"]
    curve: Curve = []
    spent = 0.0
    while spent < seconds:
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate * schedule(spent / seconds)
        optimizer.step(closure)
        spent += time.perf_counter() - start
        if spent > (len(curve) + 1) * seconds / 30:
            with torch.no_grad():
                error = model(grid)[:, 0] - solution(grid)
            curve.append((spent, (error.norm() / solution(grid).norm()).item()))
    return curve


def constant(_: float) -> float:
    return 1.0


def cosine(t: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * t)


def contestants() -> dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable]]:
    found = {
        "KFACOptimizer(lr='auto')": (partial(KFACOptimizer, lr="auto"), constant),
        "KFACOptimizer(), cosine": (KFACOptimizer, cosine),
    }
    for lr, schedule in itertools.product((1e-3, 3e-3, 1e-2, 3e-2), (constant, cosine)):
        name = f"Adam(lr={lr:g}), {schedule.__name__}"
        found[name] = (partial(torch.optim.Adam, lr=lr), schedule)
    for history, inner in itertools.product((10, 50, 200), (20, 100)):
        lbfgs = partial(
            torch.optim.LBFGS,
            history_size=history,
            max_iter=inner,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )
        found[f"LBFGS(history_size={history}, max_iter={inner})"] = (lbfgs, constant)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--seconds", type=float, default=6.0, help="of training, for each run")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of the picture")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    seconds = 0.5 if arguments.quick else arguments.seconds
    entries = contestants()
    names = [*entries][::7] if arguments.quick else [*entries]
    runs = {name: train(*entries[name][:1], seconds, entries[name][1], 0) for name in tqdm(names)}

    print(f"\nRelative L2 error after {seconds:g} s of training, and its least value:")
    order = sorted(names, key=lambda name: runs[name][-1][1])
    for name in order:
        print(f"{name:40}{runs[name][-1][1]:12.2e}{min(e for _, e in runs[name]):12.2e}")

    figure, axis = plt.subplots(figsize=(8, 4.5))
    ours = [name for name in names if name.startswith("KFAC")]
    for best in (*ours, *(next(n for n in order if n.startswith(k)) for k in ("Adam", "LBFGS"))):
        axis.semilogy(*zip(*runs[best], strict=True), label=f"{best}")
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("relative L2 error")
    axis.legend()
    figure.tight_layout()
    path = arguments.output / "04_pinn.png"
    figure.savefig(path, dpi=120)
    print(f"\nPicture: {path}")


if __name__ == "__main__":
    main()
