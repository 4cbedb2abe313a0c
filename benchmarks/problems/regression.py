"""Regression by small tanh networks, on mini-batches and on all data at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from sklearn.datasets import load_diabetes, make_friedman1
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import mlp
from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, repeated, shuffled

TRAIN, TEST, JOINTS = 3000, 1000, 5

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def _standardised(x: Tensor) -> Tensor:
    return ((x - x.mean(0)) / x.std(0)).float()


@cache
def diabetes() -> Split:
    """Return scikit-learn's 442 patients, standardised; what is tested is the training error."""
    data = load_diabetes()
    X, y = _standardised(torch.tensor(data.data)), _standardised(torch.tensor(data.target))
    return X, y[:, None], X, y[:, None]


@cache
def friedman() -> Split:
    """Return Friedman's first function of ten inputs, five of which count, without noise."""
    X, y = make_friedman1(TRAIN + TEST, noise=0.0, random_state=DATA_SEED)
    inputs, targets = _standardised(torch.tensor(X)), _standardised(torch.tensor(y))[:, None]
    return inputs[:TRAIN], targets[:TRAIN], inputs[TRAIN:], targets[TRAIN:]


@cache
def robot_arm() -> Split:
    """Return the angles of a planar arm with five joints, and where its hand is.

    Link i of length 1/2ⁱ, i = 0, 1, ..., points along the sum of the first i + 1 angles, which are
    uniform in [−π/2, π/2].
    """
    generator = Generator().manual_seed(DATA_SEED)
    angles = torch.pi * (torch.rand(TRAIN + TEST, JOINTS, generator=generator) - 0.5)
    lengths, directions = 0.5 ** torch.arange(JOINTS), angles.cumsum(1)
    hand = torch.stack([(lengths * f(directions)).sum(1) for f in (torch.cos, torch.sin)], 1)
    X, y = _standardised(angles), _standardised(hand)
    return X[:TRAIN], y[:TRAIN], X[TRAIN:], y[TRAIN:]


def _task(split: Callable[[], Split], hidden: tuple[int, ...], batch_size: int | None) -> Task:
    X, y, X_test, y_test = split()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def evaluate(model: nn.Module) -> float:
        return math.sqrt(F.mse_loss(model(X_test), y_test))

    data = (X, y)
    batches = repeated(data) if batch_size is None else shuffled(data, batch_size)
    return Task(mlp((X.shape[1], *hidden, y.shape[1])), loss, batches, evaluate, data)


_RMSE = "RMSE on 1,000 test data, in standard deviations"
_ARM = "tanh MLP 5-64-64-2; position of a planar arm of 5 joints, 3,000 data; MSE"

PROBLEMS = (
    Problem(
        "diabetes-full",
        "tanh MLP 10-50-50-1; scikit-learn's diabetes, 442 data; MSE; full batch",
        "training RMSE, in standard deviations",
        partial(_task, diabetes, (50, 50), None),
        budget=10,
        resolution=1e-4,  # the network interpolates; what is left is the rounding of float32
    ),
    Problem(
        "friedman-small",
        "tanh MLP 10-64-64-1; Friedman #1 without noise, 3,000 data; MSE; batch 64",
        _RMSE,
        partial(_task, friedman, (64, 64), 64),
        budget=10,
    ),
    Problem(
        "robot-small",
        f"{_ARM}; batch 64",
        _RMSE,
        partial(_task, robot_arm, (64, 64), 64),
        budget=10,
    ),
    Problem(
        "robot-full",
        f"{_ARM}; full batch",
        _RMSE,
        partial(_task, robot_arm, (64, 64), None),
        budget=10,
    ),
)
