"""A character-level language model of the standard library's sources."""

from __future__ import annotations

import argparse
import math
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import LanguageModel
from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task

LENGTH, BATCH, FILES, VALIDATION_FILES, VALIDATION_SEQUENCES = 64, 32, 60, 6, 64
UNKNOWN = 0
ALPHABET = {character: 1 + i for i, character in enumerate(string.printable)}


def characters(text: str) -> Tensor:
    """Return the numbers of a text's characters."""
    return torch.tensor([ALPHABET.get(character, UNKNOWN) for character in text])


@cache
def texts() -> tuple[str, str]:
    """Return the training text, and the held-out one.

    The text is that of the first modules of the running Python's standard library, by name.
    """
    folder = Path(argparse.__file__).parent
    paths = sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))[:FILES]
    own = [path.read_text(encoding="utf-8") for path in paths]
    return "".join(own[VALIDATION_FILES:]), "".join(own[:VALIDATION_FILES])


@cache
def corpus() -> tuple[Tensor, Tensor]:
    """Return the training text's characters, and `[VALIDATION_SEQUENCES, LENGTH + 1]` of others."""
    training, held_out = map(characters, texts())
    generator = Generator().manual_seed(DATA_SEED)
    return training, _windows(held_out, VALIDATION_SEQUENCES, generator)


def _windows(text: Tensor, count: int, generator: Generator) -> Tensor:
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)]


def characters_task(batch_size: int = BATCH, tied: bool = False) -> Task:
    """Return the task of predicting characters.

    Args:
        batch_size: Sequences in a batch.
        tied: Whether the head has the embedding's weight.
    """
    training, validation = corpus()

    def batches(generator: Generator) -> Iterator[Batch]:
        while True:
            yield (_windows(training, batch_size, generator),)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def evaluate(model: nn.Module) -> float:
        return float(loss(model, (validation,))) / math.log(2)

    model = LanguageModel(len(ALPHABET) + 1, width=64, layers=2, length=LENGTH, heads=4)
    if tied:
        model.head.weight = model.embedding.weight
    return Task(model, loss, batches, evaluate)


PROBLEMS = (
    Problem(
        "char-lm",
        "causal transformer of 2 layers, d = 64, 4 heads; 60 modules of Python's standard "
        "library, 6 of them for validation; cross entropy; 32 sequences of 64 characters",
        "validation bits per character",
        characters_task,
        budget=15,
    ),
)
