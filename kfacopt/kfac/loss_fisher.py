"""Which Fisher a loss means over data: vectors at its input, and the scale; nothing of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn

from kfacopt.argument_checks import check_choice, check_count, check_loss
from kfacopt.data import batch_size, check_terms
from kfacopt.kfac.capture import loss_vectors
from kfacopt.likelihoods import FISHER_TYPES, FisherType, Likelihood, likelihood_of, with_sum


@dataclass(frozen=True)
class LossFisher:
    """The Fisher of a loss over a data set; its arguments are those of `KFACLinearOperator`."""

    loss_func: nn.Module
    fisher_type: FisherType
    mc_samples: int
    loss_average: str | None
    batch_size_fn: Callable[[Any], int] | None

    def __post_init__(self) -> None:
        check_loss(self.loss_func)
        reduction, average = self.likelihood.reduction, self.loss_average
        check_choice("fisher_type", self.fisher_type, FISHER_TYPES)
        check_count("mc_samples", self.mc_samples)
        if self.fisher_type != "mc" and self.mc_samples != 1:
            raise ValueError(
                f'mc_samples must be 1 unless fisher_type="mc", got {self.mc_samples}.'
            )
        check_choice("loss_average", average, (None, "batch", "batch+sequence"))
        if reduction == "none":
            raise ValueError('loss_func: reduction must be "mean" or "sum", got "none".')
        if (average is None) != (reduction == "sum"):
            raise ValueError(
                "loss_average must be None exactly if the loss's reduction is 'sum'; got "
                f"{average!r} and {reduction!r}."
            )

    @cached_property
    def likelihood(self) -> Likelihood:
        """What the loss means."""
        return likelihood_of(self.loss_func)

    def summed_loss(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of a batch's terms, with its graph, and what the mean divides it by."""
        self.likelihood.check_target(output, y)
        loss: Tensor = with_sum(self.loss_func)(output, y)
        return loss, self.likelihood.normalizer(output.detach(), y)

    def vectors(self, z: Tensor, y: Tensor, generator: Generator) -> Iterator[Tensor]:
        """Yield the vectors of the *summed* loss; `scale` makes them those of the mean."""
        if self.fisher_type != "empirical":
            weights = self.likelihood.term_weights(z, y)
            options = (self.fisher_type, self.mc_samples, generator)
            yield from loss_vectors(self.likelihood, z, weights, *options)
            return
        z = z.requires_grad_()
        yield torch.autograd.grad(with_sum(self.loss_func)(z, y), z)[0]

    def counts(self, z: Tensor, X: Any, y: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return what the mean over a batch divides by, and the data of an empirical Fisher's."""
        normalizer = self.likelihood.normalizer(z, y)
        if self.fisher_type != "empirical" or not z.numel():  # the latter: a batch without data
            return normalizer, 0.0
        ratio = self.likelihood.num_terms(z, y) / self.likelihood.num_terms(z, None)
        if self.loss_average == "batch+sequence":
            return normalizer, ratio * self.likelihood.num_positions(z)
        return normalizer, ratio * batch_size(X, z, self.batch_size_fn)

    def scale(self, counts: Sequence[tuple[Tensor, Tensor | float]]) -> Tensor | float:
        """Return the factor between the Fisher of the summed loss and that of the loss."""
        if self.likelihood.reduction == "sum":
            return 1.0
        normalizer, terms = (sum(column, 0.0) for column in zip(*counts, strict=True))
        check_terms(normalizer)
        if self.fisher_type == "empirical":
            return terms / normalizer**2
        return 1.0 / normalizer
