"""Binary cross entropy at logits; what it shares with others is in `elementwise`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.elementwise import Elementwise, drawn
from kfacopt.likelihoods.interface import UnsupportedLossError


@dataclass(frozen=True, eq=False)
class Bernoulli(Elementwise):
    """Binary cross entropy at logits z: ∇²ℓ = σ(z) (1 − σ(z)), times `weight` and `pos_weight`."""

    pos_weight: Tensor | None = None

    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return w (1 + (pos_weight − 1) y), the factor of σ(1 − σ) in the Hessian."""
        weights = torch.ones_like(output)
        if self.pos_weight is not None:
            if target is None:
                raise UnsupportedLossError(
                    "loss_func: pos_weight needs the targets, which are unknown when the loss is "
                    "only stated. Compute the loss with F.binary_cross_entropy_with_logits."
                )
            weights = weights + (self.pos_weight.to(output) - 1) * target.to(output)
        return weights if self.weight is None else weights * self.weight.to(output)

    def second_derivative(self, output: Tensor) -> Tensor:
        """Return σ(z) (1 − σ(z))."""
        p = output.sigmoid()
        return p * (1 - p)

    def draw_gradient(self, output: Tensor, generator: Generator) -> Tensor:
        """Return σ(z) − ỹ."""
        p = output.sigmoid()
        return p - (drawn(torch.rand, output, generator) < p).to(p.dtype)
