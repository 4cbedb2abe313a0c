"""Spectra of Hessian, GGN and K-FAC
=================================

Plot the spectral densities of Hessian, GGN and K-FAC of one model in one picture.

.. code-block:: sh

    python examples/02_spectral_density.py [--quick] [--output FOLDER]

A small network is trained on digits for a few epochs. The density of log(abs(A) + ε) comes from
Lanczos quadrature, which needs products with A only. The Hessian has negative eigenvalues as well,
which the absolute value folds over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from kfacopt import (
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    KFACOptimizer,
    lanczos_approximate_log_spectrum,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EPSILON = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of the picture")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the Lanczos start vectors come from NumPy's global generator

    digits = load_digits()
    X = torch.tensor(digits.data) / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    ).double()
    optimizer = KFACOptimizer(model.parameters())
    for _ in tqdm(range(1 if arguments.quick else 5), desc="training"):
        for index in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(X[index]), y[index]).backward()
            optimizer.step()

    size, vectors = (200, 16) if arguments.quick else (1797, 128)
    data, params, loss = [(X[:size], y[:size])], list(model.parameters()), nn.CrossEntropyLoss()
    operators = {
        "Hessian": HessianLinearOperator(model, loss, params, data),
        "GGN": GGNLinearOperator(model, loss, params, data),
        "K-FAC": KFACLinearOperator(
            model, loss, params, data, fisher_type="type-2", separate_weight_and_bias=False
        ),
    }
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name, operator in tqdm(operators.items(), desc="spectra"):
        grid, density = lanczos_approximate_log_spectrum(
            operator, vectors, num_repeats=1 if arguments.quick else 5, epsilon=EPSILON
        )
        # per decade: p(log10 λ) = λ ln(10) p(λ)
        axis.semilogx(grid, density * grid * np.log(10), label=name)
    axis.set_xlabel("|eigenvalue| + ε")
    axis.set_ylabel("density per decade")
    axis.legend()
    figure.tight_layout()
    path = arguments.output / "02_spectral_density.png"
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
