"""The interface of all likelihoods, and all scaling; what one loss means is in its family's file.

A likelihood sees the tensor z that the loss was given, `[N, ...]`, and the targets. Its terms are
the summands ℓ_t(z_t, y_t) that the loss reduces. The loss is L = Σ_t ω_t ℓ_t, where the weight ω_t
holds every constant factor: 1/normalizer for `reduction="mean"`, class weights, ignored targets,
and what the user multiplied the loss with before `backward()`. It is applied here and nowhere else:
the vectors v that `hessian_root` and `sample_gradient` give satisfy, for each datum,

    Σ_v v vᵀ = ω_t ∇²_z ℓ_t    and    E[v vᵀ] = ω_t ∇²_z ℓ_t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

FisherType = Literal["mc", "type-2", "empirical"]
FISHER_TYPES: tuple[FisherType, ...] = ("mc", "type-2", "empirical")


class UnsupportedLossError(NotImplementedError):
    """The loss, or an option of it, has no likelihood here."""


def _sampling_dtype(output: Tensor) -> torch.dtype:
    return torch.promote_types(output.dtype, torch.float32)


def widened(output: Tensor) -> Tensor:
    """Return z without a graph and in at least float32: counts overflow float16 beyond 65,504."""
    return output.detach().to(_sampling_dtype(output))


@dataclass(frozen=True, eq=False)
class Likelihood(ABC):
    """A loss as a negative log-likelihood at its input z `[N, ...]`.

    What a loss of one's own says for `register_likelihood`. Where terms are single entries of z,
    `Elementwise` says all but one of them. Abstract are: what the terms count (`term_weights`,
    `normalizer`, `num_terms`, `num_positions`), and the curvature of one term without weights
    (`root_columns`, `multiply_hessian`, `draw_gradient`); `spread`, `has_data_axis` where terms are
    not entries of z.

    Attributes:
        reduction: `"mean"`, `"sum"` or `"none"`.

    Example:
        The mean over rows of ½ ‖z_n − y_n‖², whose terms are rows; their Hessian is I.

        >>> import torch
        >>> from torch import nn
        >>> import kfacopt
        >>> class RowSquares(kfacopt.Likelihood):
        ...     def term_weights(self, z, y):
        ...         return torch.ones(len(z))
        ...     def normalizer(self, z, y):
        ...         return torch.tensor(float(len(z)))
        ...     num_terms = normalizer
        ...     def num_positions(self, z):
        ...         return len(z)
        ...     def root_columns(self, z):
        ...         for one in torch.eye(z.shape[1]):
        ...             yield one.expand_as(z)
        ...     def multiply_hessian(self, z, v):
        ...         return v
        ...     def draw_gradient(self, z, generator):
        ...         return torch.randn(z.shape, generator=generator)
        ...     def spread(self, weights, z):
        ...         return weights[:, None]
        >>> @kfacopt.register_likelihood(lambda z, y: RowSquares("mean"))
        ... def row_squares(z, y):
        ...     return (z - y).square().sum(1).mean() / 2
        >>> model, data = nn.Linear(3, 2), [(torch.rand(8, 3), torch.rand(8, 2))]
        >>> args = model, row_squares, list(model.parameters()), data
        >>> options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
        >>> K = kfacopt.KFACLinearOperator(*args, **options) @ torch.eye(8)
        >>> torch.allclose(K, kfacopt.GGNLinearOperator(*args) @ torch.eye(8))
        True
    """

    reduction: str

    def check_target(self, output: Tensor, target: Tensor | None) -> None:  # noqa: B027
        """Raise a `ValueError` for a target that torch's loss accepts, but that is no target of z.

        Args:
            output: z, `[N, ...]`.
            target: The loss's target, or `None` where it is unknown.
        """

    @abstractmethod
    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the weight of each term in the *summed* loss: class weights, 0 if ignored.

        Args:
            output: z, `[N, ...]`.
            target: The loss's target, or `None` where it is unknown.
        """

    @abstractmethod
    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return, as a scalar, what `reduction="mean"` divides the summed loss by."""

    @abstractmethod
    def num_terms(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return, as a scalar, how many data the loss counts: all that are not ignored.

        A weight is part of a datum's loss, and does not make it more than one datum.
        """

    @abstractmethod
    def num_positions(self, output: Tensor) -> int:
        """Return the number of data, each of their positions counted as one of its own."""

    @abstractmethod
    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield v `[*z.shape]` with Σ_v v vᵀ = ∇²ℓ_t for every term, one for each output of it."""

    @abstractmethod
    def multiply_hessian(self, output: Tensor, vector: Tensor) -> Tensor:
        """Return ∇²ℓ_t v for every term, `[*z.shape]`."""

    @abstractmethod
    def draw_gradient(self, output: Tensor, generator: Generator) -> Tensor:
        """Draw labels y ~ q(·|z) and return ∇_z ℓ(z, y) `[*z.shape]`."""

    def spread(self, weights: Tensor, output: Tensor) -> Tensor:
        """Broadcast a tensor of one entry per term against z."""
        return weights

    def curvature_weights(
        self, output: Tensor, target: Tensor | None, upstream: Tensor | float = 1.0
    ) -> Tensor:
        """Return ω_t, the non-negative factor of each term's curvature in the user's objective.

        Args:
            output: z, `[N, ...]`.
            target: The loss's target, or `None` where it is unknown.
            upstream: Derivative of the user's objective by the loss value: a scalar, or for
                `reduction="none"` one for each term. Its sign is dropped: a Fisher has none.
        """
        weights = self.term_weights(output, target)
        factor = torch.as_tensor(upstream, dtype=weights.dtype, device=weights.device).abs()
        if self.reduction == "mean":
            factor = factor / self.normalizer(output, target)
        return weights * factor

    def hessian_root(
        self, output: Tensor, weights: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Yield the columns v `[*z.shape]` of a root of the loss Hessian, for all data at once.

        There is one column for each entry of a datum z_n (classes × positions). Rows of z are
        independent data; where a model mixes them (batch norm, sequences that were flattened into
        rows), a deterministic root would add their cross terms, so every row gets a random sign,
        which keeps the estimate unbiased and does not change it where nothing is mixed.

        Args:
            output: z, `[N, ...]`, without a graph.
            weights: ω_t, from `curvature_weights`.
            generator: Draws the signs.
        """
        scale = self.spread(weights.sqrt(), output)
        rows = output.shape[:1] if self.has_data_axis(output) else ()
        shape = rows + (1,) * (output.ndim - len(rows))
        draw = torch.randint(2, shape, generator=generator, device=generator.device)
        scale = scale * (draw.to(output) * 2 - 1)
        for column in self.root_columns(output):
            for position in self._position_masks(output):
                yield (column * scale * position).to(output.dtype)

    def hessian_product(self, output: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
        """Return ω_t ∇²ℓ_t v `[*z.shape]`.

        Args:
            output: z, `[N, ...]`, without a graph.
            weights: ω_t, from `curvature_weights`.
            vector: v, `[*z.shape]`.
        """
        return self.multiply_hessian(output, vector) * self.spread(weights, output)

    def undecided(self, output: Tensor) -> Tensor:
        """Return a z of the same shape that speaks for no target."""
        return torch.zeros_like(output)

    def has_data_axis(self, output: Tensor) -> bool:
        """Tell whether z is a batch, and not a single datum without an axis N."""
        return output.ndim > 0

    def _position_masks(self, output: Tensor) -> Iterator[Tensor | float]:
        """Yield masks, broadcastable to z, that single out one position of every datum."""
        yield 1.0

    def sample_gradient(self, output: Tensor, weights: Tensor, generator: Generator) -> Tensor:
        """Return √ω_t ∇ℓ_t(z, ỹ) `[*z.shape]` for labels ỹ drawn once from the model.

        Args:
            output: z, `[N, ...]`, without a graph.
            weights: ω_t, from `curvature_weights`.
            generator: Draws the labels, in one call.
        """
        sample = self.draw_gradient(output.to(_sampling_dtype(output)), generator)
        return (sample * self.spread(weights.sqrt(), output)).to(output.dtype)


def checked(likelihood: Likelihood) -> Likelihood:
    """Return the likelihood if its options make sense, else raise."""
    if likelihood.reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f'reduction must be "mean", "sum" or "none", got {likelihood.reduction!r}.'
        )
    weight = getattr(likelihood, "weight", None)
    if weight is not None and bool((weight < 0).any()):
        raise UnsupportedLossError("weight: negative weights make the loss concave; no Fisher.")
    return likelihood
