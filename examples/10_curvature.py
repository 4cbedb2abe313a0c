"""The curvature of a trained network
==================================

Train a network on a regression problem, and look at the curvature where each optimizer ended.

.. code-block:: sh

    python examples/10_curvature.py [--quick] [--seconds 4] [--seeds 3] [--output FOLDER]

A tanh network learns Friedman's function of ten variables. The training loss decides. Then
`diagnose` looks at the network that AdamW trained at its best rate and at the one that K-FAC
trained. It solves for the exact step of the damped GGN there, by conjugate gradients, and says how
near to it the gradient is, how near K-FAC is, layer by layer, and what follows.
"""

from __future__ import annotations

import torch
from side_by_side import KFAC, Run, best_adamw, command_line, compare, plot, print_table
from sklearn.datasets import make_friedman1
from torch import nn
from torch.nn import functional as F

from kfacopt import diagnose

BATCH = 128
RATES = (1e-3, 3e-3, 1e-2, 3e-2)

inputs, targets = make_friedman1(2000, n_features=10, noise=0.0, random_state=0)
X = torch.tensor(2 * inputs - 1, dtype=torch.float32)
y = torch.tensor((targets - targets.mean()) / targets.std(), dtype=torch.float32)[:, None]
training, held_out = slice(0, 1500), slice(1500, None)


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(10, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))
    )


trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}


def train(run: Run) -> None:
    torch.manual_seed(run.seed)
    model = network()
    optimizer = run.optimizer(model)
    trained[run.name] = model, optimizer

    @torch.no_grad()
    def measure() -> dict[str, float]:
        parts = {"training loss": training, "held-out loss": held_out}
        return {name: F.mse_loss(model(X[part]), y[part]).item() for name, part in parts.items()}

    for _ in run.steps(optimizer, measure):
        rows = torch.randint(training.stop, (BATCH,))
        optimizer.zero_grad()
        F.mse_loss(model(X[rows]), y[rows]).backward()
        optimizer.step()


def main() -> None:
    arguments = command_line(__doc__, seconds=4, seeds=3)
    runs = compare(train, RATES, arguments.seconds, arguments.seeds)
    print_table(runs)
    plot(runs, arguments.output / "10_curvature.png")

    reports = {}
    for name in (best_adamw(runs), KFAC):
        model, optimizer = trained[name]
        reports[name] = diagnose(
            model,
            nn.MSELoss(),
            [(X[:750], y[:750]), (X[750:1500], y[750:1500])],
            optimizer if name == KFAC else None,
            max_batches=1,  # the other one is held out, to try steps on
            max_seconds=2 if arguments.quick else 15,
        )
    print("\nCosines of steps to the exact one, where each of the two ended:\n")
    for name, report in reports.items():
        cosines = "".join(f"{f'{step.step} {step.cosine:.2f}':>20}" for step in report.steps)
        print(f"{name:20}{cosines}")
    print(f"\nThe whole report on the network that K-FAC trained:\n\n{reports[KFAC]}")
    picture = arguments.output / "10_curvature_report.png"
    reports[KFAC].plot(picture)
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
