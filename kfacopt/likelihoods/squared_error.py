"""The mean squared error, as a normal likelihood; what it shares with others is `elementwise`."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.elementwise import Elementwise, drawn


class SquaredError(Elementwise):
    """MSE: ℓ = (z − y)², ∇²ℓ = 2; the negative log-likelihood of y ~ N(z, 1/2)."""

    def check_target(self, output: Tensor, target: Tensor | None) -> None:
        """Raise a `ValueError` if predictions and targets have different shapes."""
        if isinstance(target, Tensor) and target.shape != output.shape:
            raise ValueError(
                f"MSE: the prediction has the shape {tuple(output.shape)} and the target "
                f"{tuple(target.shape)}, which would be broadcast against each other; reshape one."
            )

    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the elementwise `weight` of the loss, or ones."""
        self.check_target(output, target)
        return torch.ones_like(output) if self.weight is None else self.weight.to(output)

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of entries of z, or the sum of the elementwise weights."""
        self.check_target(output, target)
        if self.weight is None:
            return super().normalizer(output, target)
        return self.weight.to(output).sum()

    def second_derivative(self, output: Tensor) -> Tensor:
        """Return 2."""
        return torch.full_like(output, 2.0)

    def draw_gradient(self, output: Tensor, generator: Generator) -> Tensor:
        """Return 2 (z − ỹ) with ỹ − z ~ N(0, 1/2)."""
        return drawn(torch.randn, output, generator) * 2**0.5
