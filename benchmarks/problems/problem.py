"""What a problem of the comparisons is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, ...]
DATA_SEED = 0


@dataclass(frozen=True)
class Task:
    """One run's model, data and loss, in memory.

    Attributes:
        model: The model, freshly initialised.
        loss: The loss of the model on a batch.
        batches: An endless stream of batches from a seeded generator.
        evaluate: The metric of the model, lower is better.
        all_data: All training data as one batch, for optimizers that need a fixed loss.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    batches: Callable[[Generator], Iterator[Batch]]
    evaluate: Callable[[nn.Module], float]
    all_data: Batch | None = None

    @torch.no_grad()
    def metric(self) -> float:
        """Return the metric of the model as it is now."""
        self.model.eval()
        value = self.evaluate(self.model)
        self.model.train()
        return value


@dataclass(frozen=True)
class Problem:
    """A fixed problem: everything but the seed.

    Attributes:
        name: Its name.
        description: Model, data, batch size and loss, for the protocol.
        metric: What is measured.
        make: Makes the task; torch's global generator, seeded before, gives the initialisation.
        budget: Seconds of training on one core.
        resolution: What the metric resolves; no target is below it.
    """

    name: str
    description: str
    metric: str
    make: Callable[[], Task]
    budget: float
    resolution: float = 0.0

    def task(self, seed: int) -> Task:
        """Return the task whose model is initialised with a seed."""
        torch.manual_seed(seed)
        return self.make()


def shuffled(data: Batch, batch_size: int) -> Callable[[Generator], Iterator[Batch]]:
    """Return a stream of batches: each epoch a new order, the incomplete batch left out.

    Args:
        data: Tensors of the same length.
        batch_size: How many data a batch has.
    """

    def batches(generator: Generator) -> Iterator[Batch]:
        count = len(data[0])
        while True:
            order = torch.randperm(count, generator=generator)
            for index in order[: count - count % batch_size].split(batch_size):
                yield tuple(tensor[index] for tensor in data)

    return batches


def classification(model: nn.Module, data: tuple[Batch, Batch], batch_size: int) -> Task:
    """Return the task of learning labels from `(X, y)`, with the share of wrong ones as the metric.

    Args:
        model: Gives logits `[N, C]`.
        data: For training, and for the metric.
        batch_size: How many data a batch has.
    """
    train, (X, y) = data

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def error(model: nn.Module) -> float:
        return float((model(X).argmax(1) != y).float().mean())

    return Task(model, loss, shuffled(train, batch_size), error)


def repeated(data: Batch) -> Callable[[Generator], Iterator[Batch]]:
    """Return a stream of all data as one batch, again and again."""

    def batches(_: Generator) -> Iterator[Batch]:
        while True:
            yield data

    return batches


@dataclass(frozen=True)
class Training:
    """Models, and the loop that trains them as a user writes it.

    Attributes:
        models: Each is given an optimizer of its own.
        step: One iteration of the loop, with the models' optimizers.
        evaluate: The objective, and a metric on other data; of both, lower is better.
    """

    models: Sequence[nn.Module]
    step: Callable[[Sequence[Any]], None]
    evaluate: Callable[[], tuple[float, float]]

    @torch.no_grad()
    def metrics(self) -> tuple[float, float]:
        """Return objective and metric of the models as they are now."""
        for model in self.models:
            model.eval()
        values = self.evaluate()
        for model in self.models:
            model.train()
        return values


@dataclass(frozen=True)
class LossProblem:
    """A problem of the comparison of losses: everything but the seed.

    Attributes:
        name: Its name.
        loss: The loss, in words.
        description: Model, data and batch size.
        objective: What is minimised, as it is evaluated on a fixed set.
        metric: What is measured on other data.
        make: Makes the training from a generator of batches and noise; torch's global generator,
            seeded before, gives the initialisation.
        budget: Seconds of training on one core.
        steps: Of an optimizer, in one iteration of the loop.
    """

    name: str
    loss: str
    description: str
    objective: str
    metric: str
    make: Callable[[Generator], Training]
    budget: float = 8.0
    steps: int = 1

    def training(self, seed: int) -> Training:
        """Return the training whose initialisation, batches and noise have a seed."""
        torch.manual_seed(seed)
        return self.make(Generator().manual_seed(seed))


def plain_loop(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: Iterator[Batch],
    evaluate: Callable[[nn.Module], tuple[float, float]],
) -> Training:
    """Return the usual loop of one model.

    Args:
        model: The model.
        loss: The loss of the model on a batch.
        batches: Endless.
        evaluate: Gives the model's objective and metric.
    """

    def step(optimizers: Sequence[Any]) -> None:
        (optimizer,) = optimizers
        batch = next(batches)
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    return Training((model,), step, lambda: evaluate(model))
