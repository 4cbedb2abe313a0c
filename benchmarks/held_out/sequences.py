"""Sequences: bytes of English, characters with their tags, sounds with three labels."""

from __future__ import annotations

import io
import keyword
import math
import tokenize
from collections.abc import Callable, Iterator
from email import message
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, shuffled

BYTES, LENGTH, SEQUENCES, TEST = 128, 64, 16, 64
TAGS = ("space", "name", "keyword", "number", "string", "comment", "operator")
TAG_LENGTH, TAG_SEQUENCES, TAG_FILES = 40, 32, 10
SOUNDS, SAMPLES, TIMBRES, PARTIALS = 4000, 256, 5, 6
TEST_SOUNDS = 500


def _generator() -> Generator:
    return Generator().manual_seed(DATA_SEED)


def windows(data: Batch, length: int, count: int, generator: Generator) -> Batch:
    """Return `[count, length]` of each of the sequences, from the same random places."""
    starts = torch.randint(len(data[0]) - length, (count, 1), generator=generator)
    return tuple(t[starts + torch.arange(length)] for t in data)


def stream(data: Batch, length: int, count: int) -> Callable[[Generator], Iterator[Batch]]:
    """Return endless batches of such windows."""

    def batches(generator: Generator) -> Iterator[Batch]:
        while True:
            yield windows(data, length, count, generator)

    return batches


# Bytes -------------------------------------------------------------------------------------------


@cache
def manual() -> tuple[Tensor, Tensor]:
    """Return the bytes of Python's help topics, and `[TEST, LENGTH + 1]` of the last tenth."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    data = torch.tensor(list(text))
    cut = 9 * len(data) // 10
    test = windows((data[cut:],), LENGTH + 1, TEST, _generator())
    return data[:cut], test[0]


class GatedBlock(nn.Module):
    """Touvron et al.'s (2023) block: RMS norms, rotary positions, a gated MLP, no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Map `[N, S, d]` to the same shape; `turn` `[S, d / heads / 2]` are the angles."""
        own = self.norms[0](x)
        q, k, v = (
            layer(own).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q, k = rotated(q, turn), rotated(k, turn)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        own = self.norms[1](x)
        change: Tensor = self.down(F.silu(self.gate(own)) * self.up(own))
        return x + change


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Return pairs of entries `[..., S, 2 m]`, turned by angles `[S, m]`, Su et al. (2021)."""
    first, second = x.chunk(2, -1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class ByteModel(nn.Module):
    """A causal transformer over bytes."""

    turn: Tensor

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(GatedBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, BYTES, bias=False)
        half = width // heads // 2
        speeds = 1000.0 ** (-torch.arange(half) / half)
        self.register_buffer("turn", torch.arange(LENGTH)[:, None] * speeds)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, S]` to logits `[N, S, BYTES]`."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.turn[: tokens.shape[1]])
        logits: Tensor = self.head(self.norm(x))
        return logits


def _bytes() -> Task:
    train, test = manual()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def evaluate(model: nn.Module) -> float:
        return float(loss(model, (test,))) / math.log(2)

    return Task(ByteModel(64, 2, 4), loss, stream((train,), LENGTH + 1, SEQUENCES), evaluate)


# Tags --------------------------------------------------------------------------------------------


def _tags(text: str) -> list[int]:
    """Return the tag of each character; positions in lines are those of the tokens."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = {
        tokenize.NUMBER: "number",
        tokenize.STRING: "string",
        tokenize.COMMENT: "comment",
        tokenize.OP: "operator",
    }
    found = [0] * len(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = kinds.get(token.type)
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        if kind is not None:
            first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
            found[first:last] = [TAGS.index(kind)] * (last - first)
    return found


@cache
def tagged() -> tuple[Batch, Batch]:
    """Return characters of the first modules of Python's `email` and their tags; and other ones."""
    paths = sorted(Path(message.__file__).parent.glob("*.py"))[:TAG_FILES]
    parts = []
    for own in (paths[2:], paths[:2]):
        texts = [path.read_text(encoding="utf-8") for path in own]
        tags = [tag for text in texts for tag in _tags(text)]
        characters = [min(ord(c), BYTES - 1) for text in texts for c in text]
        parts.append((torch.tensor(characters), torch.tensor(tags)))
    test = windows(parts[1], TAG_LENGTH, 4 * TEST, _generator())
    return parts[0], test


class Tagger(nn.Module):
    """A GRU in both directions over characters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, len(TAGS))

    def forward(self, characters: Tensor) -> Tensor:
        """Map `[N, S]` to logits `[N, S, tags]`."""
        logits: Tensor = self.head(self.gru(self.embedding(characters))[0])
        return logits


def _tagger() -> Task:
    train, (X, y) = tagged()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def error(model: nn.Module) -> float:
        return float((model(X).argmax(-1) != y).float().mean())

    return Task(Tagger(32), loss, stream(train, TAG_LENGTH, TAG_SEQUENCES), error)


# Sounds ------------------------------------------------------------------------------------------


@cache
def sounds() -> tuple[Batch, Batch]:
    """Return sounds `[N, 1, SAMPLES]`, timbres, standardised pitches, and whether they vibrate.

    A timbre is the strength of six partials; the pitch is 3 to 12 periods of the window, uniform in
    its logarithm; a vibrato moves it by 6 % three times. A third of the amplitude is noise.
    """
    generator = _generator()
    count = SOUNDS + TEST_SOUNDS
    timbres = torch.rand(TIMBRES, PARTIALS, generator=generator) ** 2
    timbre = torch.randint(TIMBRES, (count,), generator=generator)
    position = torch.rand(count, generator=generator)
    vibrates = torch.randint(2, (count,), generator=generator).float()
    phases = 2 * torch.pi * torch.rand(count, PARTIALS + 1, generator=generator)
    pitch = 3 * 4**position
    time = torch.arange(SAMPLES) / SAMPLES
    sway = (6 * torch.pi * time + phases[:, -1:]).cos() * 0.06 / (6 * torch.pi)
    angle = 2 * torch.pi * pitch[:, None] * (time + vibrates[:, None] * sway)
    numbers = torch.arange(1, PARTIALS + 1)
    waves = (numbers[:, None] * angle[:, None, :] + phases[:, :-1, None]).sin()
    signal = (timbres[timbre][:, :, None] * waves).sum(1)
    signal = signal / signal.std(1, keepdim=True)
    signal = signal + 0.33 * torch.randn(signal.shape, generator=generator)
    data = (signal[:, None], timbre, math.sqrt(12) * (position - 0.5), vibrates)
    return tuple(t[TEST_SOUNDS:] for t in data), tuple(t[:TEST_SOUNDS] for t in data)


class Listener(nn.Module):
    """Strided convolutions with group norm, and a head for each label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for size in (9, 5, 5, 5):
            layers += [
                nn.Conv1d(before, width, size, 2, size // 2),
                nn.GroupNorm(4, width),
                nn.ReLU(),
            ]
            before = width
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(4 * width, n) for n in (TIMBRES, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return timbres' logits `[N, TIMBRES]`, pitches `[N]` and vibratos' log odds `[N]`."""
        code = self.trunk(x)
        timbre, pitch, vibrato = (head(code) for head in self.heads)
        return timbre, pitch[:, 0], vibrato[:, 0]


def _sounds() -> Task:
    train, test = sounds()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        timbre, pitch, vibrato = model(batch[0])
        return (
            F.cross_entropy(timbre, batch[1])
            + F.mse_loss(pitch, batch[2])
            + 0.5 * F.binary_cross_entropy_with_logits(vibrato, batch[3])
        )

    return Task(Listener(24), loss, shuffled(train, 64), lambda m: float(loss(m, test)))


PROBLEMS = (
    Problem(
        "bytes-lm",
        "causal transformer of 2 layers, d = 64, 4 heads, RMSNorm, rotary positions, SwiGLU, no "
        "biases; Python's help topics; cross entropy; 16 sequences of 64 bytes",
        "bits a byte on the last tenth",
        _bytes,
        budget=4,
    ),
    Problem(
        "gru-tagger",
        "bidirectional GRU of width 32; the kind of token of each character of Python's sources; "
        "cross entropy; 32 sequences of 40 characters",
        "error a character on two other files",
        _tagger,
        budget=4,
    ),
    Problem(
        "sounds-tasks",
        "4 convolutions of width 24, GroupNorm, three heads; 4,000 synthetic sounds; cross entropy "
        "of the timbre + MSE of the pitch + half of the BCE of vibrato; batch 64",
        "the loss on 500 others",
        _sounds,
        budget=4,
    ),
)
