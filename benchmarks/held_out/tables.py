"""Rows of a table: option prices, classes by numbers and categories, times until an event."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, shuffled

TEST = 1000
PRICES, ROWS, PATIENTS = 10_000, 9000, 20_000
NUMBERS, LEVELS, CLASSES, CODE = 12, (40, 20, 8, 5), 6, 8
COVARIATES = 16


def _generator() -> Generator:
    return Generator().manual_seed(DATA_SEED)


def _halves(data: Batch) -> tuple[Batch, Batch]:
    return tuple(t[TEST:] for t in data), tuple(t[:TEST] for t in data)


# Option prices -----------------------------------------------------------------------------------


@cache
def options() -> tuple[Batch, Batch]:
    """Return parameters of European calls, scaled, and standardised prices by Black & Scholes.

    The parameters, uniform: spot over strike, years, interest, volatility and dividends.
    """
    low = torch.tensor([0.6, 0.05, 0.0, 0.05, 0.0])
    high = torch.tensor([1.4, 2.0, 0.1, 0.6, 0.05])
    share = torch.rand(PRICES + TEST, 5, generator=_generator())
    spot, years, interest, volatility, dividends = (low + (high - low) * share).double().unbind(1)
    width = volatility * years.sqrt()
    first = (spot.log() + (interest - dividends + volatility**2 / 2) * years) / width
    normal = torch.special.ndtr
    price = spot * (-dividends * years).exp() * normal(first)
    price -= (-interest * years).exp() * normal(first - width)
    price = (price - price.mean()) / price.std()
    return _halves((math.sqrt(12) * (share - 0.5), price.float()[:, None]))


class ResidualBlock(nn.Module):
    """A pre-norm block of two linear layers with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, width]` to `[N, width]`."""
        change: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + change


def _options() -> Task:
    train, test = options()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    width = 32
    blocks = [ResidualBlock(width) for _ in range(10)]
    model = nn.Sequential(nn.Linear(5, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 1))
    return Task(model, loss, shuffled(train, 128), lambda m: math.sqrt(loss(m, test)))


# Numbers and categories --------------------------------------------------------------------------


@cache
def rows() -> tuple[Batch, Batch]:
    """Return numbers `[N, NUMBERS]`, categories and classes, drawn with a random teacher's odds.

    The teacher: three times a tanh network of the numbers, half of which do not count, and a normal
    number for each level of a category and class.
    """
    generator = _generator()
    count = ROWS + TEST
    numbers = torch.randn(count, NUMBERS, generator=generator)
    levels = [torch.randint(n, (count,), generator=generator) for n in LEVELS]
    inner = torch.randn(NUMBERS // 2, 32, generator=generator)
    outer = torch.randn(32, CLASSES, generator=generator) / math.sqrt(32)
    odds = 4 * (numbers[:, : NUMBERS // 2] @ inner).tanh() @ outer
    for level, n in zip(levels, LEVELS, strict=True):
        odds = odds + torch.randn(n, CLASSES, generator=generator)[level]
    classes = torch.multinomial((2 * odds).softmax(1), 1, generator=generator)[:, 0]
    return _halves((numbers, torch.stack(levels, 1), classes))


class TableNetwork(nn.Module):
    """Embeddings of the categories beside the numbers, and an MLP with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, CODE) for n in LEVELS)
        layers: list[nn.Module] = []
        width = NUMBERS + CODE * len(LEVELS)
        for _ in range(2):
            layers += [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1)]
            width = 128
        self.layers = nn.Sequential(*layers, nn.Linear(width, CLASSES))

    def forward(self, numbers: Tensor, levels: Tensor) -> Tensor:
        """Return logits `[N, CLASSES]`."""
        codes = [e(levels[:, i]) for i, e in enumerate(self.embeddings)]
        logits: Tensor = self.layers(torch.cat([numbers, *codes], 1))
        return logits


def _rows() -> Task:
    train, test = rows()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(*batch[:2]), batch[2], label_smoothing=0.1)

    def error(model: nn.Module) -> float:
        return float((model(*test[:2]).argmax(1) != test[2]).float().mean())

    return Task(TableNetwork(), loss, shuffled(train, 256), error)


# Times until an event ----------------------------------------------------------------------------


@cache
def patients() -> tuple[Batch, Batch]:
    """Return covariates, times, and whether they end in an event or are censored.

    The log of the hazard is x₁ x₂ + sin 2x₃ + x₄² − x₅ + max(x₆, x₇); the times follow Weibull's
    law of shape 1.5, and an exponential law censors a third or so.
    """
    generator = _generator()
    count = PATIENTS + TEST
    x = torch.randn(count, COVARIATES, generator=generator)
    risk = x[:, 0] * x[:, 1] + (2 * x[:, 2]).sin() + x[:, 3] ** 2 - x[:, 4]
    risk = risk + torch.maximum(x[:, 5], x[:, 6])
    event, censored = -torch.rand(2, count, generator=generator).log()
    event, censored = (event / risk.exp()) ** (1 / 1.5), 1.5 * censored
    return _halves((x, torch.minimum(event, censored), (event <= censored).float()))


def cox(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Return Cox's (1972) negative log partial likelihood for each event."""
    order = time.argsort(descending=True)
    risk, event = risk[order], event[order]
    return -((risk - risk.logcumsumexp(0)) * event).sum() / event.sum()


def discordance(risk: Tensor, time: Tensor, event: Tensor) -> float:
    """Return the share of comparable pairs whose first event had the lower risk (Harrell)."""
    comparable = (time[:, None] < time) & event.bool()[:, None]
    return float((risk[:, None] <= risk)[comparable].float().mean())


def _patients() -> Task:
    train, test = patients()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return cox(model(batch[0])[:, 0], *batch[1:])

    widths = (COVARIATES, 128, 128, 64)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 1, bias=False))

    def metric(model: nn.Module) -> float:
        return discordance(model(test[0])[:, 0], *test[1:])

    return Task(model, loss, shuffled(train, 256), metric)


PROBLEMS = (
    Problem(
        "options-resmlp",
        "pre-norm residual MLP of 10 blocks, width 32, GELU; 10,000 prices of European calls by "
        "Black & Scholes; MSE; batch 128",
        "RMSE on 1,000 other options, in standard deviations",
        _options,
        budget=4,
    ),
    Problem(
        "table-classes",
        "4 embeddings beside 12 numbers, two layers of 128 with BatchNorm, ReLU and dropout, 6 "
        "classes; 9,000 rows of a random teacher; cross entropy with label smoothing 0.1; "
        "batch 256",
        "error on 1,000 other rows",
        _rows,
        budget=4,
    ),
    Problem(
        "survival-cox",
        "MLP 16-128-128-64-1, SiLU; 20,000 synthetic patients; Cox's partial likelihood within a "
        "batch of 256",
        "1 − concordance on 1,000 others",
        _patients,
        budget=4,
    ),
)
