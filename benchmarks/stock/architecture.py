"""What a stock architecture is, and the synthetic data that tiny ones learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

BATCHES, SIZE = 4, 16  # a task's data: 64, which are seen again and again
VOCABULARY, LENGTH, CLASSES = 64, 12, 4
PAD, MASK, FIRST_WORD = 0, 1, 2
IGNORED = -100  # the label of positions that do not count


@dataclass(frozen=True)
class Training:
    """A model and what it learns.

    Attributes:
        model: Made anew, at random.
        batches: The data.
        loss: Of one batch, as the training loop has it.
    """

    model: nn.Module
    batches: Sequence[Any]
    loss: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        name: What it is called.
        package: Whose code it is: `"torch"`, or what has to be installed.
        make: Makes model and data; random numbers are seeded before.
        warns: Parts of the warnings of kfacopt that it may cause.
        why: For parameters without curvature that `reasons.py` does not know: part of the name,
            and why.
    """

    name: str
    package: str
    make: Callable[[], Training]
    warns: tuple[str, ...] = ()
    why: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Return what tells it from all others."""
        return f"{self.package}/{self.name}"


def batches(draw: Callable[[Generator], Any]) -> list[Any]:
    """Return a task's data.

    Args:
        draw: Makes a batch of `SIZE` from random numbers.
    """
    generator = Generator().manual_seed(1)
    return [draw(generator) for _ in range(BATCHES)]


def images(
    generator: Generator,
    side: int = 32,
    channels: int = 3,
    classes: int = CLASSES,
    shifts: float = 6.3,
) -> tuple[Tensor, Tensor]:
    """Return gratings `[SIZE, channels, side, side]`, one direction a class, in noise, and labels.

    Args:
        generator: Of random numbers.
        side: Of the images, in pixels.
        channels: Of the images.
        classes: How many directions.
        shifts: Up to where a grating may begin.
    """
    labels = torch.randint(classes, (SIZE,), generator=generator)
    angle = (labels * torch.pi / classes)[:, None, None, None]
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    phase = shifts * torch.rand(SIZE, channels, 1, 1, generator=generator)
    waves = torch.sin(0.8 * (x * angle.cos() + y * angle.sin()) + phase)
    return waves + 0.3 * torch.randn(waves.shape, generator=generator), labels


def waves(generator: Generator, length: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Return sounds `[SIZE, length]`, one frequency a class, in noise, and labels."""
    labels = torch.randint(classes, (SIZE,), generator=generator)
    phase = 6.3 * torch.rand(SIZE, 1, generator=generator)
    sound = torch.sin(0.2 * (1 + labels[:, None]) * torch.arange(length) + phase)
    return sound + 0.1 * torch.randn(sound.shape, generator=generator), labels


def sentences(generator: Generator, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Return tokens `[SIZE, length]` and which of them are no padding.

    Each word follows from the one before; sentences have different lengths.
    """
    words = VOCABULARY - FIRST_WORD
    start = torch.randint(words, (SIZE, 1), generator=generator)
    tokens = FIRST_WORD + (start + 5 * torch.arange(length)) % words
    ends = torch.randint(length // 2, length + 1, (SIZE, 1), generator=generator)
    mask = torch.arange(length) < ends
    return torch.where(mask, tokens, PAD), mask
