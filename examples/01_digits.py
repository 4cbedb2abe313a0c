"""Digits: K-FAC beside SGD and AdamW
==================================

Train a small convolutional network on digits with SGD, AdamW and KFACOptimizer, and check K-FAC.

.. code-block:: sh

    python examples/01_digits.py [--quick] [--output FOLDER]

All run the same plain loop, AdamW at three rates. The table says when each first reached the target
accuracy on the validation set; the picture shows the curves. Then K-FAC is compared, on a subset of
the data and at the parameters after one epoch, with the exact GGN: layer by layer, and by the step
it proposes.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from kfacopt import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    KFACOptimizer,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TARGET, BATCH, CHECKED = 0.97, 64, 128
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW, lr 0.01": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "AdamW, lr 0.03": lambda params: torch.optim.AdamW(params, lr=3e-2),
    "AdamW, lr 0.1": lambda params: torch.optim.AdamW(params, lr=1e-1),
    "KFACOptimizer": lambda params: KFACOptimizer(params),
}


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    X = torch.tensor(digits.data, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    X, y = X[order], y[order]
    return X[:1400], y[:1400], X[1400:], y[1400:]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 10),
    )


def train(name: str, epochs: int) -> dict:
    """Train one network; the clock stands still during validation."""
    X, y, X_val, y_val = load()
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    shuffle = torch.Generator().manual_seed(0)
    early, curve, seconds, step = model, [], 0.0, 0
    batches = len(y) // BATCH
    with tqdm(total=epochs * batches, desc=name) as bar:
        for epoch in range(epochs):
            if epoch == 1:
                early = copy.deepcopy(model)
            for index in torch.randperm(len(y), generator=shuffle).split(BATCH)[:batches]:
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(X[index]), y[index])
                loss.backward()
                optimizer.step()
                seconds += time.perf_counter() - start
                step += 1
                bar.update()
                if step % 5 == 0:
                    with torch.no_grad():
                        accuracy = (model(X_val).argmax(1) == y_val).float().mean().item()
                    curve.append((step, seconds, loss.item(), accuracy))
    with torch.no_grad():
        final = F.cross_entropy(model(X), y).item()
    found = {"name": name, "curve": curve, "final": final, "seconds": seconds, "early": early}
    return found | {"damping": optimizer.param_groups[0].get("damping")}


def print_table(runs: list[dict]) -> None:
    print(f"\n{'':17}{'steps to':>10}{'seconds to':>12}{'best':>10}{'final':>12}{'seconds':>10}")
    print(f"{'':17}{TARGET:>10.0%}{TARGET:>12.0%}{'accuracy':>10}{'train loss':>12}{'in all':>10}")
    for run in runs:
        hit = next(((s, t) for s, t, _, accuracy in run["curve"] if accuracy >= TARGET), None)
        steps, seconds = (str(hit[0]), f"{hit[1]:.2f}") if hit else ("never", "never")
        best = max(accuracy for *_, accuracy in run["curve"])
        print(
            f"{run['name']:17}{steps:>10}{seconds:>12}{best:>10.1%}"
            f"{run['final']:>12.2e}{run['seconds']:>10.1f}"
        )


def plot(runs: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col")
    for run in runs:
        steps, seconds, losses, accuracies = zip(*run["curve"], strict=True)
        for column, x in enumerate((steps, seconds)):
            axes[0, column].semilogy(x, losses, label=run["name"], linewidth=1)
            errors = [max(100 * (1 - a), 0.1) for a in accuracies]
            axes[1, column].semilogy(x, errors, linewidth=1)
    for column, label in enumerate(("steps", "seconds of training")):
        axes[1, column].set_xlabel(label)
        axes[1, column].axhline(100 * (1 - TARGET), color="black", linewidth=0.5)
    axes[0, 0].set_ylabel("loss on the batch")
    axes[1, 0].set_ylabel("validation error [%]")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def check(model: nn.Module, damping: float, data_size: int) -> None:
    """Compare K-FAC with the exact GGN, in float64, with the loss and damping of training."""
    X, y, _, _ = load()
    X, y = X[:data_size].double(), y[:data_size]
    model, loss_func = model.double(), nn.CrossEntropyLoss()
    params, data = list(model.parameters()), [(X, y)]
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    print(f"\nK-FAC (expand, type-2) and the exact GGN, {data_size} data, after one epoch")
    print(f"{'layer':<8}{'parameters':>12}{'‖K-FAC − GGN‖ / ‖GGN‖':>26}")
    kfac = KFACLinearOperator(model, loss_func, params, data, **options)
    loss = loss_func(model(X), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
    blocks, offset = [], 0
    for name in kfac.layer_names:
        own = list(model.get_submodule(name).parameters())
        ggn = GGNLinearOperator(model, loss_func, own, data, check_deterministic=False)
        identity = torch.eye(ggn.shape[0], dtype=torch.float64)
        exact = torch.cat([ggn @ part for part in identity.split(128, dim=1)], dim=1)
        approximate = KFACLinearOperator(model, loss_func, own, data, **options) @ identity
        distance = (approximate - exact).norm() / exact.norm()
        print(f"{name:<8}{ggn.shape[0]:>12}{distance.item():>26.3f}")
        own_gradient = gradient[offset : offset + ggn.shape[0]]
        blocks.append(torch.linalg.solve(exact + damping * identity, own_gradient))
        offset += ggn.shape[0]

    ggn = GGNLinearOperator(model, loss_func, params, data)
    damped = ggn + damping * IdentityLinearOperator(ggn)
    exact = CGInverseLinearOperator(damped) @ gradient  # warns if it does not converge
    # How much of the best decrease of gᵀd + ½ dᵀ(GGN + δI)d a step reaches, at its best length.
    print(f"\nSteps beside the exact one, (GGN + {damping} I)⁻¹ g, by conjugate gradients")
    print(f"{'':<28}{'cosine':>8}{'share of the best decrease':>30}")
    for label, step in (
        ("the gradient", gradient),
        ("the GGN's exact blocks", torch.cat(blocks)),
        ("K-FAC, factored damping", kfac.inverse(damping) @ gradient),
        ("K-FAC, exact damping", kfac.inverse(damping, method="exact") @ gradient),
    ):
        cosine = F.cosine_similarity(step, exact, dim=0).item()
        curvature = step @ (damped @ step)
        share = (gradient @ step) ** 2 / curvature / (gradient @ exact)
        print(f"{label:<28}{cosine:>8.3f}{share.item():>30.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of the picture")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = [train(name, epochs=1 if arguments.quick else 30) for name in OPTIMIZERS]
    print_table(runs)
    path = arguments.output / "01_digits.png"
    plot(runs, path)
    print(f"\nPicture: {path}")
    check(runs[-1]["early"], runs[-1]["damping"], 16 if arguments.quick else CHECKED)


if __name__ == "__main__":
    main()
