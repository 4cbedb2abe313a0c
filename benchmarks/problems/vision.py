"""Digits, classified by a ResNet with BatchNorm and by a vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import VisionTransformer, resnet
from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, shuffled

TRAIN = 1000


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's images `[1797, 1, 8, 8]` and labels, in random order."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(images), generator=Generator().manual_seed(DATA_SEED))
    return ((images - images.mean()) / images.std())[order], torch.tensor(data.target)[order]


def _task(make_model: Callable[[], nn.Module]) -> Task:
    X, y = digits()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(model: nn.Module) -> float:
        return float((model(X[TRAIN:]).argmax(1) != y[TRAIN:]).float().mean())

    data = (X[:TRAIN], y[:TRAIN])
    return Task(make_model(), loss, shuffled(data, 100), evaluate, data)


_DATA = "digits, 1,000 for training, 797 for validation; cross entropy; batch 100"

PROBLEMS = (
    Problem(
        "convnet",
        f"ResNet of 6 convolutions, 16 and 32 channels, BatchNorm; {_DATA}",
        "validation error",
        partial(_task, partial(resnet, 1, 10, (16, 32), blocks=1)),
        budget=10,
    ),
    Problem(
        "vit",
        f"vision transformer, patches of 2 x 2, 2 layers, d = 48, 4 heads; {_DATA}",
        "validation error",
        partial(_task, partial(VisionTransformer, 8, 2, 1, 10, width=48, layers=2, heads=4)),
        budget=10,
    ),
)
