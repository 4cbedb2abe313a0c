"""Problems in each of which a kind of layers has much of the parameters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import AttentionBlock, LanguageModel
from benchmarks.problems.language import ALPHABET, UNKNOWN, characters, texts
from benchmarks.problems.problem import (
    DATA_SEED,
    Batch,
    LossProblem,
    Training,
    plain_loop,
    shuffled,
)
from benchmarks.problems.vision import TRAIN, digits

BUDGET = 2.5
USERS, ITEMS, DENSE, CLICKS, HELD_OUT = 1000, 500, 8, 400_000, 4000  # less than one pass
LENGTH, SEQUENCES, VOCABULARY = 32, 128, 400
SIGNALS, SAMPLES, NOISE = 2000, 64, 0.5
GRAPHS, NODES, FEATURES = 400, 24, 8

Halves = tuple[Batch, Batch]
Loss = Callable[[nn.Module, Batch], Tensor]


def _training(
    model: nn.Module, loss: Loss, batches: Iterator[Batch], train: Batch, held_out: Batch
) -> Training:
    """Return a loop whose objective and metric are the loss on fixed data, known and held out."""
    return plain_loop(
        model, loss, batches, lambda own: (float(loss(own, train)), float(loss(own, held_out)))
    )


# Clicks ------------------------------------------------------------------------------------------


@cache
def clicks() -> Halves:
    """Return users, items, `[N, DENSE]` and clicks for training, and as much held out.

    Ids follow Zipf's law. The log odds are u · v, an item's own number and a linear function.
    """
    generator = Generator().manual_seed(DATA_SEED)
    normal = partial(torch.randn, generator=generator)
    count = CLICKS + HELD_OUT
    user, item = (
        torch.multinomial(
            1 / (10.0 + torch.arange(n)), count, replacement=True, generator=generator
        )
        for n in (USERS, ITEMS)
    )
    dense = normal(count, DENSE)
    odds = (normal(USERS, 4)[user] * normal(ITEMS, 4)[item]).sum(1)
    odds = odds + normal(ITEMS)[item] + dense @ normal(DENSE) / 2
    clicked = torch.bernoulli(odds.sigmoid(), generator=generator)
    data = (user, item, dense, clicked)
    return tuple(x[:CLICKS] for x in data), tuple(x[CLICKS:] for x in data)


class Recommender(nn.Module):
    """A small DLRM of Naumov et al. (2019): embeddings, a dense part, and products of all pairs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, width), nn.Embedding(ITEMS, width)
        for table in (self.users, self.items):
            bound = table.num_embeddings**-0.5
            nn.init.uniform_(table.weight, -bound, bound)
        self.dense = nn.Sequential(nn.Linear(DENSE, 16), nn.ReLU(), nn.Linear(16, width))
        self.top = nn.Sequential(nn.Linear(width + 3, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, user: Tensor, item: Tensor, dense: Tensor) -> Tensor:
        """Return the log odds `[N]` of a click."""
        x, u, v = self.dense(dense), self.users(user), self.items(item)
        pairs = torch.stack([(a * b).sum(1) for a, b in ((x, u), (x, v), (u, v))], dim=1)
        odds: Tensor = self.top(torch.cat([x, pairs], dim=1))
        return odds.squeeze(1)


def _clicks(generator: Generator) -> Training:
    train, held_out = clicks()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(*batch[:3]), batch[3])

    some = tuple(x[:HELD_OUT] for x in train)
    return _training(Recommender(), loss, shuffled(train, 256)(generator), some, held_out)


# Text --------------------------------------------------------------------------------------------


def _windows(text: Tensor, count: int, generator: Generator) -> Tensor:
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)]


def _language(model: nn.Module, train: Tensor, held_out: Tensor, generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def batches() -> Iterator[Batch]:
        while True:
            yield (_windows(train, 16, generator),)

    fixed = Generator().manual_seed(DATA_SEED)
    known, unknown = (_windows(text, SEQUENCES, fixed) for text in (train, held_out))
    return _training(model, loss, batches(), (known,), (unknown,))


class CharacterLSTM(nn.Module):
    """An LSTM over characters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET) + 1, 16)
        self.lstm = nn.LSTM(16, width, batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET) + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, S]` to logits `[N, S, characters]`."""
        logits: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return logits


def _characters(generator: Generator) -> Training:
    return _language(CharacterLSTM(), *map(characters, texts()), generator)


@cache
def words() -> tuple[Tensor, Tensor]:
    """Return a text, and others: names, runs of spaces, and single other characters.

    The most common of the first text are known.
    """
    split = [re.findall(r"[A-Za-z_]+| +|[^A-Za-z_ ]", text) for text in texts()]
    common = Counter(split[0]).most_common(VOCABULARY - 1)
    number = {word: 1 + i for i, (word, _) in enumerate(common)}
    train, held_out = (torch.tensor([number.get(w, UNKNOWN) for w in own]) for own in split)
    return train, held_out


def _words(generator: Generator) -> Training:
    model = LanguageModel(VOCABULARY, width=32, layers=1, length=LENGTH, heads=4)
    return _language(model, *words(), generator)


class TiedTransformer(nn.Module):
    """GPT-2 in small: a causal transformer whose head's weight is the embedding's."""

    def __init__(self, width: int = 32, layers: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads, True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, S]` to logits `[N, S, VOCABULARY]`."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def _tied_words(generator: Generator) -> Training:
    return _language(TiedTransformer(), *words(), generator)


# Signals -----------------------------------------------------------------------------------------


@cache
def signals() -> Halves:
    """Return sums of three waves `[N, 1, SAMPLES]`; and others with noise, and without."""
    generator = Generator().manual_seed(DATA_SEED)
    draw = partial(torch.rand, SIGNALS + 500, 3, 1, generator=generator)
    frequency, phase, amplitude = 12 * draw(), draw(), draw()
    turns = frequency * torch.linspace(0, 1, SAMPLES) + phase
    clean = (amplitude * (2 * torch.pi * turns).sin()).sum(1, keepdim=True)
    noisy = clean + NOISE * torch.randn(clean.shape, generator=generator)
    return (noisy[:SIGNALS], clean[:SIGNALS]), (noisy[SIGNALS:], clean[SIGNALS:])


def _signals(generator: Generator) -> Training:
    train, held_out = signals()
    layers: list[nn.Module] = []
    for before, after in pairwise((1, 16, 32, 16)):
        layers += [nn.Conv1d(before, after, 9, padding=4), nn.BatchNorm1d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv1d(16, 1, 9, padding=4))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def batches() -> Iterator[Batch]:
        for (clean,) in shuffled((train[1],), 32)(generator):
            yield clean + NOISE * torch.randn(clean.shape, generator=generator), clean

    some = tuple(x[:500] for x in train)
    return _training(model, loss, batches(), some, held_out)


# Images ------------------------------------------------------------------------------------------


class PackedTransformer(nn.Module):
    """A vision transformer of torch's own layers, whose attention has packed projections."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(2))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map `[N, 1, 8, 8]` to logits `[N, 10]`."""
        x = self.patches(images).flatten(2).mT + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def _images(generator: Generator) -> Training:
    X, y = digits()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def batches() -> Iterator[Batch]:
        for images, labels in shuffled((X[:TRAIN], y[:TRAIN]), 50)(generator):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            yield images.roll(shift, (2, 3)), labels

    train, held_out = (X[:TRAIN], y[:TRAIN]), (X[TRAIN:], y[TRAIN:])
    return _training(PackedTransformer(), loss, batches(), train, held_out)


# Graphs ------------------------------------------------------------------------------------------


class GraphNetwork(nn.Module):
    """Two layers of Kipf & Welling's (2017) graph convolution, tanh(A (x W)), and a linear one."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.graph_first = nn.Parameter(torch.randn(FEATURES, width) / FEATURES**0.5)
        self.graph_second = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.head = nn.Linear(width, 1)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        """Map `[N, NODES, NODES]` and `[N, NODES, FEATURES]` to a number for each node."""
        for weight in (self.graph_first, self.graph_second):
            x = torch.tanh(adjacency @ (x @ weight))
        numbers: Tensor = self.head(x)
        return numbers.squeeze(2)


@cache
def graphs() -> Halves:
    """Return normalised adjacency, features and targets of training, and as many held out.

    Nodes are points in the unit square, neighbours if nearer than 0.3. The targets are what a
    network of this kind, with random weights, gives, to mean 0 and variance 1.
    """
    generator = Generator().manual_seed(DATA_SEED)
    points = torch.rand(2 * GRAPHS, NODES, 2, generator=generator)
    near = (torch.cdist(points, points) < 0.3).float()
    scale = near.sum(2, keepdim=True).rsqrt()
    adjacency = scale * near * scale.mT
    x = torch.randn(2 * GRAPHS, NODES, FEATURES, generator=generator)
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(DATA_SEED)
        teacher = GraphNetwork(16)
        y = teacher(adjacency, 2 * x)
    data = (adjacency, x, (y - y.mean()) / y.std())
    return tuple(t[:GRAPHS] for t in data), tuple(t[GRAPHS:] for t in data)


def _graphs(generator: Generator) -> Training:
    train, held_out = graphs()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(*batch[:2]), batch[2])

    return _training(GraphNetwork(), loss, shuffled(train, 32)(generator), train, held_out)


def _problem(
    name: str, loss: str, description: str, make: Callable[[Generator], Training]
) -> LossProblem:
    return LossProblem(name, loss, description, "training", "held out", make, BUDGET)


PROBLEMS = (
    _problem(
        "clicks",
        "binary cross entropy",
        f"DLRM, embeddings of {USERS:,} users and {ITEMS:,} items, d = 8; {CLICKS:,} synthetic "
        "clicks, batch 256",
        _clicks,
    ),
    _problem(
        "words",
        "cross entropy",
        f"causal transformer of one layer, d = 32, {VOCABULARY} words and signs; sources of "
        f"Python's standard library, batch 16 × {LENGTH}",
        _words,
    ),
    _problem(
        "tied words",
        "cross entropy",
        "the same with one weight as embedding and head, as GPT-2 has it",
        _tied_words,
    ),
    _problem(
        "digits",
        "cross entropy",
        "two `nn.TransformerEncoderLayer`, d = 32, patches of 2 × 2; digits, moved by at most a "
        f"pixel, {TRAIN:,} of 1,797, batch 50",
        _images,
    ),
    _problem(
        "signals",
        "squared error",
        f"four `nn.Conv1d` of width 9, BatchNorm; {SIGNALS:,} noisy sums of waves of {SAMPLES} "
        "samples, batch 32",
        _signals,
    ),
    _problem(
        "characters",
        "cross entropy",
        f"`nn.LSTM` of 64, the same sources by characters, batch 16 × {LENGTH}",
        _characters,
    ),
    _problem(
        "graphs",
        "squared error",
        f"two graph convolutions of 48 by hand, `A @ (x @ W)`; {GRAPHS} graphs of {NODES} nodes, "
        "batch 32",
        _graphs,
    ),
)
