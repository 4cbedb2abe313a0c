"""K-FAC on what `kfacopt.input_derivatives` returns, beside tuned Adam and L-BFGS, in equal time.

    python -m benchmarks.input_derivatives [Poisson heat Burgers] [--quick] [--seconds 20]
        [--seeds 3] [--output FOLDER]

Poisson's, the heat and Burgers' equation with known solutions, an ordinary `nn.Sequential` of
`nn.Linear` and `nn.Tanh`. All optimizers see the same loss, made of the helper's outputs on all
points in every step, and get the same CPU time of one thread; evaluations do not count. Adam's rate
and L-BFGS's history and line search are the best of five and four on the first seed, which K-FAC's
defaults have not seen chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.environment import environment, folder_of
from benchmarks.problems.pinns import BOUNDARY, BOUNDARY_WEIGHT, INTERIOR, WIDTHS, _border
from benchmarks.problems.problem import DATA_SEED
from kfacopt import KFACOptimizer, KFACWarning, input_derivatives

VISCOSITY = 0.1
U_XX = torch.tensor([1.0, 0.0])  # of points (x, t)
EVALUATIONS = 20
SECONDS, SEEDS = 20.0, 3

Residual = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Equation:
    """A differential equation on the unit square, or on [−1, 1] × [0, 1].

    Attributes:
        text: What it is.
        solution: u at points `[N, 2]`.
        source: What the residual shall be at points.
        residual: The differential operator, of a model and points.
        evolution: Whether the second coordinate is time, without values at its end.
        symmetric: Whether the first coordinate is in [−1, 1].
    """

    text: str
    solution: Callable[[Tensor], Tensor]
    source: Callable[[Tensor], Tensor]
    residual: Residual
    evolution: bool
    symmetric: bool = False

    def points(self, x: Tensor) -> Tensor:
        """Bring points of the unit square to the equation's domain."""
        return torch.stack([2 * x[:, 0] - 1, x[:, 1]], 1) if self.symmetric else x


def _poisson(model: nn.Module, x: Tensor) -> Tensor:
    _, _, laplacian = input_derivatives(model, x)
    return -laplacian[:, 0]


def _heat(model: nn.Module, x: Tensor) -> Tensor:
    _, gradient, u_xx = input_derivatives(model, x, U_XX)
    return gradient[:, 0, 1] - u_xx[:, 0] / 4


def _burgers(model: nn.Module, x: Tensor) -> Tensor:
    u, gradient, u_xx = input_derivatives(model, x, U_XX)
    return gradient[:, 0, 1] + u[:, 0] * gradient[:, 0, 0] - VISCOSITY * u_xx[:, 0]


def burgers_solution(x: Tensor) -> Tensor:
    """Return u at points `[N, 2]` for u(x, 0) = −sin(πx), by Cole and Hopf's transformation.

    u is the mean of −sin(πy) at y = x − √(4νt) η under the density exp(−cos(πy) / 2πν) exp(−η²),
    by Gauss and Hermite's quadrature.
    """
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite.hermgauss(100))
    y = x[:, :1] - (4 * VISCOSITY * x[:, 1:]).sqrt() * nodes
    density = weights * (-(math.pi * y).cos() / (2 * math.pi * VISCOSITY)).exp()
    return -((math.pi * y).sin() * density).sum(1) / density.sum(1)


def _waves(x: Tensor) -> Tensor:
    return (math.pi * x[:, 0]).sin() * (2 * math.pi * x[:, 1]).sin()


def _cooling(x: Tensor) -> Tensor:
    return torch.exp(-(math.pi**2) / 4 * x[:, 1]) * (math.pi * x[:, 0]).sin()


EQUATIONS = {
    "Poisson": Equation(
        "−Δu = 5π² u*, u* = sin(πx) sin(2πy)",
        _waves,
        lambda x: 5 * math.pi**2 * _waves(x),
        _poisson,
        evolution=False,
    ),
    "heat": Equation(
        "u_t = u_xx / 4, u* = exp(−π²t/4) sin(πx)",
        _cooling,
        lambda x: 0 * x[:, 0],
        _heat,
        evolution=True,
    ),
    "Burgers": Equation(
        "u_t + u u_x = u_xx / 10 on [−1, 1] × [0, 1], u*(x, 0) = −sin(πx)",
        burgers_solution,
        lambda x: 0 * x[:, 0],
        _burgers,
        evolution=True,
        symmetric=True,
    ),
}


def _constant(_: float) -> float:
    return 1.0


def _cosine(t: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * t)


Contestant = tuple[Callable[..., torch.optim.Optimizer], Callable[[float], float]]


def contestants() -> dict[str, dict[str, Contestant]]:
    """Return for each kind of optimizer its settings by name."""

    def lbfgs(history: int, inner: int) -> Callable[..., torch.optim.Optimizer]:
        options = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0, "tolerance_change": 0}
        return partial(torch.optim.LBFGS, history_size=history, max_iter=inner, **options)

    return {
        "KFACOptimizer()": {"defaults": (KFACOptimizer, _constant)},
        "KFACOptimizer(), cosine": {"defaults": (KFACOptimizer, _cosine)},
        'KFACOptimizer(lr="auto")': {"defaults": (partial(KFACOptimizer, lr="auto"), _constant)},
        "Adam, cosine": {
            f"lr={lr:g}": (partial(torch.optim.Adam, lr=lr), _cosine)
            for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
        },
        "L-BFGS": {
            f"history_size={h}, max_iter={i}": (lbfgs(h, i), _constant)
            for h, i in ((10, 20), (50, 20), (200, 20), (200, 100))
        },
    }


def run(equation: Equation, contestant: Contestant, seed: int, seconds: float) -> dict[str, Any]:
    """Train once.

    Args:
        equation: What is solved.
        contestant: An optimizer and its schedule.
        seed: Of the initialisation; the points are the same for all.
        seconds: The CPU time of the training.

    Returns:
        The number of steps, and (seconds, relative L2 error) in the course of the training.
    """
    generator = Generator().manual_seed(DATA_SEED)
    inside = torch.rand(INTERIOR, 2, generator=generator, dtype=torch.float64)
    border = equation.points(_border(BOUNDARY, generator, equation.evolution))
    inside = equation.points(inside)
    source, values = equation.source(inside), equation.solution(border)
    axis = torch.linspace(0, 1, 40, dtype=torch.float64)
    grid = equation.points(torch.cartesian_prod(axis, axis))
    truth = equation.solution(grid)

    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(a, b, dtype=torch.float64), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    make, schedule = contestant
    optimizer = make(model.parameters())
    rates = [group["lr"] for group in optimizer.param_groups]

    def closure() -> Tensor:
        optimizer.zero_grad()
        equations = F.mse_loss(equation.residual(model, inside), source)
        loss = equations + BOUNDARY_WEIGHT * F.mse_loss(model(border)[:, 0], values)
        loss.backward()
        return loss

    curve: list[tuple[float, float]] = []
    spent, steps = 0.0, 0
    while spent < seconds:
        start = time.thread_time()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(spent / seconds)
        optimizer.step(closure)
        spent, steps = spent + time.thread_time() - start, steps + 1
        if spent >= (len(curve) + 1) * seconds / EVALUATIONS:
            with torch.no_grad():
                error = model(grid)[:, 0] - truth
            curve.append((spent, float(error.norm() / truth.norm())))
    return {"seed": seed, "steps": steps, "curve": curve, "error": curve[-1][1]}


def compare(equation: Equation, seconds: float, seeds: int) -> dict[str, Any]:
    """Return for each kind of optimizer the setting that was best on seed 0, and its runs."""
    found: dict[str, Any] = {}
    for kind, settings in contestants().items():
        first = {name: run(equation, c, 0, seconds) for name, c in settings.items()}
        # Not a number counts as the worst.
        best = min(first, key=lambda name: (math.isnan(e := first[name]["error"]), e))
        others = [run(equation, settings[best], seed, seconds) for seed in range(1, seeds)]
        tried = {name: result["error"] for name, result in first.items()}
        found[kind] = {"setting": best, "tried": tried, "runs": [first[best], *others]}
        print(f"  {kind}, {best}: {[r['error'] for r in found[kind]['runs']]}", flush=True)
    return found


def table(results: dict[str, Any]) -> str:
    """Return the errors as a table in Markdown: median (least, greatest), steps, setting."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for kind in next(iter(results.values())):
        cells = []
        for found in (results[name][kind] for name in results):
            errors = [r["error"] for r in found["runs"]]
            low, high = min(errors), max(errors)
            steps = round(statistics.median(r["steps"] for r in found["runs"]))
            setting = "" if len(found["tried"]) == 1 else f"; {found['setting']}"
            middle = f"{statistics.median(errors):.1e} ({low:.1e}…{high:.1e})"
            cells.append(f"{middle}; {steps} steps{setting}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison, and print the table of what the folder then has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("equations", nargs="*", help="some of Poisson, heat, Burgers; all if none")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of CPU time, for each run")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    seconds, seeds = (0.05, 1) if arguments.quick else (arguments.seconds, arguments.seeds)
    torch.set_num_threads(1)
    warnings.simplefilter("error", KFACWarning)
    whole = (seconds, seeds) == (SECONDS, SEEDS)
    folder = folder_of("input_derivatives", whole, arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.equations or EQUATIONS:
        print(f"{name}: {EQUATIONS[name].text}", flush=True)
        results = compare(EQUATIONS[name], seconds, seeds)
        about = {"environment": environment("cpu"), "problem": EQUATIONS[name].text}
        written = {**about, "seconds": seconds, "results": results}
        (folder / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
    files = {name: folder / f"{name}.json" for name in EQUATIONS}
    print(table({k: json.loads(f.read_text())["results"] for k, f in files.items() if f.exists()}))


if __name__ == "__main__":
    main()
