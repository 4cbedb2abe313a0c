"""Which Fisher a loss means over data: vectors at its input, and the scale; nothing of layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from kfacopt.argument_checks import check_choice, check_count, check_loss
from kfacopt.data import batch_size, check_terms
from kfacopt.kfac.capture import loss_vectors
from kfacopt.likelihoods import (
    FISHER_TYPES,
    FisherType,
    Likelihood,
    has_likelihood,
    likelihood_of,
    widened,
    with_sum,
)
from kfacopt.likelihoods.loss_parts import exact_part, no_curvature, scalar_loss, uncompiled


@dataclass(frozen=True)
class LossFisher(ABC):
    """The Fisher of a loss over a data set; its arguments are those of `KFACLinearOperator`."""

    loss_func: Any
    fisher_type: FisherType
    mc_samples: int
    loss_average: str | None
    batch_size_fn: Callable[[Any], int] | None

    def __post_init__(self) -> None:
        average = self.loss_average
        check_choice("fisher_type", self.fisher_type, FISHER_TYPES)
        check_count("mc_samples", self.mc_samples)
        if self.fisher_type != "mc" and self.mc_samples != 1:
            raise ValueError(
                f'mc_samples must be 1 unless fisher_type="mc", got {self.mc_samples}.'
            )
        check_choice("loss_average", average, (None, "batch", "batch+sequence"))
        reduction = self._reduction
        if reduction == "none":
            raise ValueError('loss_func: reduction must be "mean" or "sum", got "none".')
        if reduction in ("mean", "sum") and (average is None) != (reduction == "sum"):
            raise ValueError(
                "loss_average must be None exactly if the loss's reduction is 'sum'; got "
                f"{average!r} and {reduction!r}."
            )

    @property
    @abstractmethod
    def _reduction(self) -> str | None:
        """The loss's reduction, if it says which."""

    @property
    def is_mean(self) -> bool:
        """Whether the loss is a mean over the data."""
        return self.loss_average is not None

    @abstractmethod
    def summed_loss(self, output: Tensor, X: Any, y: Any) -> tuple[Tensor, Tensor | float]:
        """Return the sum of a batch's terms, with its graph, and what the mean divides it by."""

    @abstractmethod
    def _curvature_vectors(
        self, z: Tensor, X: Any, y: Any, generator: Generator
    ) -> Iterator[Tensor]:
        """Yield the vectors of the summed loss for `"mc"` or `"type-2"`."""

    @abstractmethod
    def counts(self, z: Tensor, X: Any, y: Any) -> tuple[Tensor | float, Tensor | float]:
        """Return what the mean over a batch divides by, and the data of an empirical Fisher's."""

    def _seen_by_loss(self, z: Tensor) -> Tensor:
        """Return z as the loss of an empirical Fisher sees it."""
        return z.detach()

    def vectors(self, z: Tensor, X: Any, y: Any, generator: Generator) -> Iterator[Tensor]:
        """Yield the vectors of the *summed* loss; `scale` makes them those of the mean."""
        if self.fisher_type != "empirical":
            yield from self._curvature_vectors(z, X, y, generator)
        elif z.numel():
            z = self._seen_by_loss(z).requires_grad_()
            yield torch.autograd.grad(self.summed_loss(z, X, y)[0], z)[0]

    def scale(self, counts: Sequence[tuple[Tensor | float, Tensor | float]]) -> Tensor | float:
        """Return the factor between the Fisher of the summed loss and that of the loss."""
        if not self.is_mean:
            return 1.0
        normalizer, terms = (sum(column, 0.0) for column in zip(*counts, strict=True))
        check_terms(normalizer)
        if self.fisher_type == "empirical":
            return terms / normalizer**2
        return 1.0 / normalizer

    def check_seen(self, vectors: int) -> None:  # noqa: B027
        """Raise unless there were vectors in a pass over the data, where a loss may have none."""


@dataclass(frozen=True)
class LikelihoodFisher(LossFisher):
    """That of a loss with a likelihood."""

    @cached_property
    def likelihood(self) -> Likelihood:
        """What the loss means."""
        return likelihood_of(self.loss_func)

    @property
    def _reduction(self) -> str:
        return self.likelihood.reduction

    def summed_loss(self, output: Tensor, X: Any, y: Any) -> tuple[Tensor, Tensor | float]:
        """See `LossFisher`."""
        self.likelihood.check_target(output, y)
        loss: Tensor = with_sum(self.loss_func)(output, y)
        return loss, self.likelihood.normalizer(output.detach(), y)

    def _seen_by_loss(self, z: Tensor) -> Tensor:
        return widened(z)

    def _curvature_vectors(
        self, z: Tensor, X: Any, y: Any, generator: Generator
    ) -> Iterator[Tensor]:
        z = widened(z)
        weights = self.likelihood.term_weights(z, y)
        options = (self.fisher_type, self.mc_samples, generator)
        return loss_vectors(self.likelihood, z, weights, *options)

    def counts(self, z: Tensor, X: Any, y: Any) -> tuple[Tensor | float, Tensor | float]:
        """See `LossFisher`."""
        z = widened(z)
        normalizer = self.likelihood.normalizer(z, y)
        if self.fisher_type != "empirical" or not z.numel():
            return normalizer, 0.0
        ratio = self.likelihood.num_terms(z, y) / self.likelihood.num_terms(z, None)
        if self.loss_average == "batch+sequence":
            return normalizer, ratio * self.likelihood.num_positions(z)
        return normalizer, ratio * batch_size(X, z, self.batch_size_fn)


@dataclass(frozen=True)
class FoundFisher(LossFisher):
    """That of any other loss, whose curvature is found batch by batch; a mean is one over data."""

    @property
    def _reduction(self) -> str | None:
        return getattr(self.loss_func, "reduction", None)

    def _count(self, z: Tensor, X: Any) -> int:
        return batch_size(X, z, self.batch_size_fn) if self.is_mean else 1

    def summed_loss(self, output: Tensor, X: Any, y: Any) -> tuple[Tensor, Tensor | float]:
        """See `LossFisher`."""
        count = self._count(output, X)
        return scalar_loss(self.loss_func, output, y) * count, float(count)

    def _curvature_vectors(
        self, z: Tensor, X: Any, y: Any, generator: Generator
    ) -> Iterator[Tensor]:
        part = exact_part(self.loss_func, z, y, self._count(z, X))
        if part is not None:
            for (vector,) in part.vectors(self.fisher_type, self.mc_samples, generator):
                yield vector

    def counts(self, z: Tensor, X: Any, y: Any) -> tuple[Tensor | float, Tensor | float]:
        """See `LossFisher`."""
        count = self._count(z, X)
        if self.loss_average == "batch+sequence":
            return float(count), float(z.shape[:-1].numel() if z.ndim > 1 else z.numel())
        return float(count), float(count)

    def check_seen(self, vectors: int) -> None:
        """See `LossFisher`."""
        if not vectors and self.fisher_type != "empirical":
            raise no_curvature(self.loss_func)


def loss_fisher(
    loss_func: Any,
    fisher_type: FisherType,
    mc_samples: int,
    loss_average: str | None,
    batch_size_fn: Callable[[Any], int] | None,
) -> LossFisher:
    """Return the Fisher of a loss; see `LossFisher`."""
    check_loss(loss_func)
    loss_func = uncompiled(loss_func)
    kind = LikelihoodFisher if has_likelihood(loss_func) else FoundFisher
    return kind(loss_func, fisher_type, mc_samples, loss_average, batch_size_fn)
