"""Deep tanh autoencoders of Hinton & Salakhutdinov's (2006) shape, scaled down."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import autoencoder
from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, shuffled

CURVES, SIDE, THICKNESS = 4000, 20, 0.06


@cache
def digits() -> Tensor:
    """Return scikit-learn's digits `[1797, 64]` in [0, 1]."""
    return torch.tensor(load_digits().data, dtype=torch.float32) / 16


@cache
def curves() -> Tensor:
    """Return images `[CURVES, SIDE²]` of random cubic Bézier curves, in [0, 1].

    The first coordinates of the four control points are spread evenly over [0.1, 0.9], the second
    are uniform in [0, 1]. A pixel at the distance r from the nearest of 60 points of the curve has
    the intensity exp(−r² / (2 THICKNESS²)).
    """
    generator = Generator().manual_seed(DATA_SEED)
    heights = torch.rand(CURVES, 4, generator=generator)
    places = torch.linspace(0.1, 0.9, 4).expand_as(heights)
    points = torch.stack([places, heights], -1)
    t = torch.linspace(0, 1, 60)
    basis = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    path = torch.einsum("kt,nkc->ntc", basis, points)
    axis = (torch.arange(SIDE) + 0.5) / SIDE
    pixels = torch.cartesian_prod(axis, axis).expand(len(path), -1, -1)
    parts = zip(pixels.split(200), path.split(200), strict=True)
    distance = torch.cat([torch.cdist(a, b).amin(-1) for a, b in parts])
    return torch.exp(-((distance / THICKNESS) ** 2) / 2)


def _digits_task() -> Task:
    X = digits()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[0])

    def evaluate(model: nn.Module) -> float:
        return float(F.mse_loss(model(X), X))

    model = autoencoder((64, 200, 100, 50, 10))
    return Task(model, loss, shuffled((X,), 256), evaluate, (X,))


def _curves_task() -> Task:
    X = curves()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[0])

    def evaluate(model: nn.Module) -> float:
        return float(F.mse_loss(model(X[:2000]).sigmoid(), X[:2000]))

    model = autoencoder((SIDE**2, 200, 100, 50, 25, 6))
    return Task(model, loss, shuffled((X,), 256), evaluate, (X,))


PROBLEMS = (
    Problem(
        "autoencoder-digits",
        "tanh autoencoder 64-200-100-50-10, mirrored; digits; MSE; batch 256",
        "training mean squared error",
        _digits_task,
        budget=10,
    ),
    Problem(
        "autoencoder-curves",
        "tanh autoencoder 400-200-100-50-25-6, mirrored; 4,000 random Bézier curves of 20 x 20 "
        "pixels; BCE with logits; batch 256",
        "mean squared error on 2,000 training images",
        _curves_task,
        budget=10,
    ),
)
