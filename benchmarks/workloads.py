"""The three models whose cost per step is measured, each with a batch and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import LanguageModel, autoencoder, resnet

SIZES = ("stated", "large", "quick")
VOCABULARY = 128


@dataclass(frozen=True)
class Workload:
    """A model, one batch, and the loss on it.

    Attributes:
        model: The model, in training mode.
        X: Its input.
        y: The target.
        terms: Over what the loss averages, in SINGD's words.
    """

    model: nn.Module
    X: Tensor
    y: Tensor
    terms: str = "batch"

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of a model of the same kind on the batch."""
        z = model(self.X)
        if self.y.is_floating_point():
            return F.mse_loss(z, self.y)
        return F.cross_entropy(z.flatten(0, -2), self.y.flatten())


def _mlp(size: str, device: str) -> Workload:
    scale, batch = {"stated": (1, 512), "large": (4, 8192), "quick": (1 / 25, 16)}[size]
    inputs = 64 if size == "quick" else 784
    widths = [inputs, *(int(scale * width) for width in (1000, 500, 250)), 30]
    X = torch.rand(batch, inputs, device=device)
    return Workload(autoencoder(widths).to(device), X, X)


def _cnn(size: str, device: str) -> Workload:
    scale, batch = {"stated": (1, 128), "large": (4, 512), "quick": (1 / 4, 4)}[size]
    widths = [int(scale * width) for width in (16, 32, 64)]
    side = 8 if size == "quick" else 32
    model = resnet(3, 10, widths, blocks=1 if size == "quick" else 3)
    X = torch.randn(batch, 3, side, side, device=device)
    return Workload(model.to(device), X, torch.randint(10, (batch,), device=device))


def _transformer(size: str, device: str) -> Workload:
    width, layers, length, batch = {
        "stated": (128, 4, 64, 32),
        "large": (768, 12, 512, 16),
        "quick": (16, 1, 8, 4),
    }[size]
    model = LanguageModel(VOCABULARY, width, layers, length, heads=max(1, width // 32))
    X, y = torch.randint(VOCABULARY, (2, batch, length), device=device)
    return Workload(model.to(device), X, y, "batch+sequence")


WORKLOADS: dict[str, Callable[[str, str], Workload]] = {
    "mlp": _mlp,
    "transformer": _transformer,
    "cnn": _cnn,
}


def make_workload(name: str, size: str, device: str) -> Workload:
    """Return a workload, the same each time.

    Args:
        name: A key of `WORKLOADS`.
        size: One of `SIZES`: as the protocol states it, larger for a GPU, or for a smoke run.
        device: Where to put it.
    """
    torch.manual_seed(0)
    return WORKLOADS[name](size, device)
