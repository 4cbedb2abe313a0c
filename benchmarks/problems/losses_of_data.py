"""Losses that are means over data, as people write them, on small networks.

Elementwise ones first, then those that join the outputs of a datum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from sklearn.datasets import load_diabetes, load_digits, make_friedman1
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import average_precision_score
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import autoencoder, mlp
from benchmarks.problems.problem import (
    DATA_SEED,
    Batch,
    LossProblem,
    Training,
    plain_loop,
    shuffled,
)

TRAIN_DIGITS = 1297
TRAIN, TEST = 3000, 1000
NOISE = 0.25
Loss = Callable[[nn.Module, Batch], Tensor]


def _generator() -> Generator:
    return Generator().manual_seed(DATA_SEED)


def _split(data: Batch, count: int) -> tuple[Batch, Batch]:
    return tuple(t[:count] for t in data), tuple(t[count:] for t in data)


def _standardised(x: Tensor) -> Tensor:
    return ((x - x.mean(0)) / x.std(0)).float()


@cache
def digits() -> tuple[Batch, Batch]:
    """Return scikit-learn's digits in [0, 1] with their classes: 1,297 to train on, 500 others."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=_generator())
    X, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target).long()
    return _split((X[order], y[order]), TRAIN_DIGITS)


def _noisy(data: Batch, generator: Generator) -> Batch:
    return data[0] + NOISE * torch.randn(data[0].shape, generator=generator), *data[1:]


def _supervised(
    model: nn.Module,
    loss: Loss,
    data: tuple[Batch, Batch],
    metric: Loss,
    generator: Generator,
    noise: bool = False,
) -> Training:
    """Return the loop on batches of 64; the objective is the loss on all training data.

    Args:
        model: The model.
        loss: The loss on a batch of inputs and targets.
        data: Those to train on and others.
        metric: On the others.
        generator: Of batches and noise.
        noise: Whether inputs get noise, new in each batch; evaluated on one draw of it.
    """
    batches = shuffled(data[0], 64)(generator)
    train, test = data
    if noise:
        batches = (_noisy(batch, generator) for batch in batches)
        train, test = (_noisy(part, _generator()) for part in data)

    def evaluate(model: nn.Module) -> tuple[float, float]:
        return float(loss(model, train)), float(metric(model, test))

    return plain_loop(model, loss, batches, evaluate)


# Elementwise losses ------------------------------------------------------------------------------


@cache
def diabetes() -> tuple[Batch, Batch]:
    """Return scikit-learn's patients, standardised; a tenth of 342 has wild targets, 100 do not."""
    data, generator = load_diabetes(), _generator()
    order = torch.randperm(len(data.target), generator=generator)
    X = _standardised(torch.tensor(data.data))[order]
    y = _standardised(torch.tensor(data.target))[order, None]
    y[:34] += 10 * torch.randn(34, 1, generator=generator)
    return _split((X, y), 342)


def _huber(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.huber_loss(model(batch[0]), batch[1])

    def metric(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).abs().mean()

    return _supervised(mlp((10, 8, 1)), loss, diabetes(), metric, generator)


@cache
def noisy_friedman() -> tuple[Batch, Batch]:
    """Return Friedman's first function with noise of deviation exp(x₁ − x₂), all standardised."""
    X, y = make_friedman1(TRAIN + TEST, noise=0.0, random_state=DATA_SEED)
    inputs, exact = torch.tensor(X).float(), _standardised(torch.tensor(y))
    noise = torch.randn(len(exact), generator=_generator())
    targets = exact + 0.3 * (inputs[:, 5] - inputs[:, 6]).mul(2).exp() * noise
    return _split((_standardised(inputs), targets[:, None]), TRAIN)


def _pinball(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        error = batch[1] - model(batch[0])
        return torch.maximum(0.9 * error, -0.1 * error).mean()

    return _supervised(mlp((10, 32, 32, 1), nn.ReLU), loss, noisy_friedman(), loss, generator)


def _mean_square(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return ((model(batch[0]) - batch[0]) ** 2).mean()

    return _supervised(autoencoder((64, 128, 64, 32, 8)), loss, digits(), loss, generator)


def _denoising(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.binary_cross_entropy(model(batch[0]), batch[1])

    train, test = ((x, x) for x, _ in digits())
    model = nn.Sequential(autoencoder((64, 128, 64, 32)), nn.Sigmoid())
    return _supervised(model, loss, (train, test), loss, generator, noise=True)


@cache
def halves() -> tuple[Batch, Batch]:
    """Return the upper halves of the digits, and the lower ones as what they are: counts to 16."""
    train, test = ((x[:, :32], 16 * x[:, 32:]) for x, _ in digits())
    return train, test


def _poisson(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.poisson_nll_loss(model(batch[0]), batch[1], log_input=True)

    return _supervised(mlp((32, 64, 64, 32)), loss, halves(), loss, generator)


@cache
def eights() -> tuple[Batch, Batch]:
    """Return the digits and whether they are an eight; three in four eights are not trained on."""
    (X, y), (X_test, y_test) = digits()
    kept = (y != 8) | ((y == 8).cumsum(0) % 4 == 0)
    train = X[kept], (y[kept] == 8).float()[:, None]
    return train, (X_test, (y_test == 8).float()[:, None])


def _focal(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        X, y = batch
        p = torch.sigmoid(model(X))
        right = p * y + (1 - p) * (1 - y)
        weight = 0.75 * y + 0.25 * (1 - y)
        return -(weight * (1 - right) ** 2 * right.clamp_min(1e-6).log()).mean()

    def metric(model: nn.Module, batch: Batch) -> Tensor:
        X, y = batch
        return torch.tensor(1 - average_precision_score(y[:, 0].numpy(), model(X)[:, 0].numpy()))

    model = mlp((64, 64, 64, 1), nn.ReLU)
    return _supervised(model, loss, eights(), metric, generator, noise=True)


# Losses that join the outputs of a datum ---------------------------------------------------------


def _error(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]).argmax(1) != batch[1]).float().mean()


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def _cross_entropy(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        X, y = batch
        return -model(X).log_softmax(1)[torch.arange(len(y)), y].mean()

    return _supervised(_convnet(), loss, digits(), _error, generator, noise=True)


@cache
def taught_digits() -> tuple[Batch, Batch]:
    """Return the digits with the class probabilities of a random forest, and digits' classes."""
    (X, y), test = digits()
    forest = RandomForestClassifier(60, min_samples_leaf=3, random_state=DATA_SEED).fit(X, y)
    return (X, torch.tensor(forest.predict_proba(X)).float()), test


def _distillation(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.kl_div(model(batch[0]).log_softmax(1), batch[1], reduction="batchmean")

    model = mlp((64, 64, 64, 10), nn.ReLU)
    return _supervised(model, loss, taught_digits(), _error, generator)


def _gaussian(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        mean, log_variance = model(batch[0]).chunk(2, dim=1)
        square = (batch[1] - mean) ** 2
        return 0.5 * (log_variance + square / log_variance.exp()).mean()

    return _supervised(mlp((10, 32, 32, 2)), loss, noisy_friedman(), loss, generator)


@cache
def arm() -> tuple[Batch, Batch]:
    """Return the five angles of an arm in space, and where its hand is.

    Link i of length 1/2ⁱ has the azimuth and the height of the sums of the first i angles of
    (a₁, a₂, a₃, ...) and of (a₂, a₃, ...), which are uniform in [−π/2, π/2].
    """
    angles = torch.pi * (torch.rand(TRAIN + TEST, 5, generator=_generator()) - 0.5)
    azimuth = angles[:, :4].cumsum(1)
    height = angles[:, 1:].cumsum(1)
    links = torch.stack(
        [azimuth.cos() * height.cos(), azimuth.sin() * height.cos(), height.sin()], 2
    )
    hand = (0.5 ** torch.arange(4)[:, None] * links).sum(1)
    return _split((angles, hand), TRAIN)


def _cosine(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return (1 - F.cosine_similarity(model(batch[0]), batch[1])).mean()

    def metric(model: nn.Module, batch: Batch) -> Tensor:
        cosine = F.cosine_similarity(model(batch[0]), batch[1])
        return cosine.clamp(-1, 1).acos().mean() * 180 / math.pi

    return _supervised(mlp((5, 64, 64, 3)), loss, arm(), metric, generator)


def _mixture(generator: Generator) -> Training:
    """Bishop's (1994) mixture density network for the arm's inverse: angles from the hand."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        hand, angles = batch[1], batch[0][:, :2]
        out = model(hand).view(len(hand), 8, 5)
        weight = out[..., 0].log_softmax(1)
        normal = torch.distributions.Normal(out[..., 1:3], out[..., 3:].exp())
        density = normal.log_prob(angles[:, None]).sum(2)
        return -torch.logsumexp(weight + density, 1).mean()

    return _supervised(mlp((3, 64, 64, 40)), loss, arm(), loss, generator)


_FRIEDMAN = "MLP 10-32-32-{}; Friedman #1 whose noise depends on the input, 3,000 data; batch 64"
_TEST_LOSS = "the same on {} others"

PROBLEMS = (
    LossProblem(
        "huber",
        "`F.huber_loss`",
        "tanh MLP 10-8-1; diabetes, 342 data, a tenth with wild targets; batch 64",
        "Huber loss",
        "absolute error on 100 others, no outliers",
        _huber,
    ),
    LossProblem(
        "pinball",
        "quantile 0.9: `torch.maximum(0.9 * e, -0.1 * e).mean()`",
        "ReLU " + _FRIEDMAN.format(1),
        "pinball loss",
        _TEST_LOSS.format("1,000"),
        _pinball,
    ),
    LossProblem(
        "mean-square",
        "`((model(x) - x) ** 2).mean()`",
        "tanh autoencoder 64-128-64-32-8, mirrored; digits; batch 64",
        "mean square",
        _TEST_LOSS.format(500),
        _mean_square,
    ),
    LossProblem(
        "sigmoid-bce",
        "`F.binary_cross_entropy` behind `nn.Sigmoid`",
        "tanh autoencoder 64-128-64-32, mirrored; digits with noise, to be removed; batch 64",
        "cross entropy",
        _TEST_LOSS.format(500),
        _denoising,
    ),
    LossProblem(
        "poisson",
        "`F.poisson_nll_loss`",
        "tanh MLP 32-64-64-32; counts of the lower half of a digit from the upper; batch 64",
        "Poisson loss",
        _TEST_LOSS.format(500),
        _poisson,
    ),
    LossProblem(
        "focal",
        "focal loss by hand, γ = 2",
        "ReLU MLP 64-64-64-1; 30 eights among 1,175 other digits, with noise; batch 64",
        "focal loss",
        "1 − average precision on 500 others",
        _focal,
    ),
    LossProblem(
        "cross-entropy",
        "`-z.log_softmax(1)[torch.arange(n), y].mean()`",
        "ReLU net of 3 convolutions; digits with noise; batch 64",
        "cross entropy",
        "error on 500 others",
        _cross_entropy,
    ),
    LossProblem(
        "distillation",
        "`F.kl_div` from a teacher",
        "ReLU MLP 64-64-64-10; digits, a random forest teaches; batch 64",
        "KL divergence",
        "error on 500 others",
        _distillation,
    ),
    LossProblem(
        "gaussian",
        "Gaussian with learned variance, by hand",
        "tanh " + _FRIEDMAN.format(2),
        "negative log-likelihood",
        _TEST_LOSS.format("1,000"),
        _gaussian,
    ),
    LossProblem(
        "cosine",
        "`(1 - F.cosine_similarity(z, y)).mean()`",
        "tanh MLP 5-64-64-3; direction of a robot arm's hand, 3,000 data; batch 64",
        "1 − cosine",
        "angle in degrees on 1,000 others",
        _cosine,
    ),
    LossProblem(
        "mixture",
        "mixture density: `-torch.logsumexp(log_pi + normal.log_prob(y), 1).mean()`",
        "tanh MLP 3-64-64-40, 8 Gaussians; an arm's angles from its hand, 3,000 data; batch 64",
        "negative log-likelihood",
        _TEST_LOSS.format("1,000"),
        _mixture,
    ),
)
