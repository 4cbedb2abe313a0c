"""Curvature that was found by products with H = ∂²L/∂z²; how it is found is in `structure`.

Each is a likelihood in the sense of what K-FAC asks of one: vectors v with Σ v vᵀ, or E[v vᵀ], the
positive part H⁺, and products with H⁺. Every factor of the objective is in H itself, so all weights
are 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.elementwise import Elementwise
from kfacopt.likelihoods.interface import Likelihood
from kfacopt.likelihoods.roots import KrylovSpace


@dataclass(frozen=True, eq=False)
class SecondDerivative(Elementwise):
    """H = diag(h), of any loss that is a sum over entries of z.

    Attributes:
        values: h `[*z.shape]`; negative entries count as 0.
    """

    values: Tensor | None = None

    def second_derivative(self, output: Tensor) -> Tensor:
        """Return h⁺."""
        assert self.values is not None
        return self.values.clamp(min=0)


@dataclass(frozen=True, eq=False)
class _Rows(Likelihood):
    """What likelihoods on z `[R, C]`, whose rows do not see each other, share."""

    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return ones `[R]`."""
        return output.new_ones(output.shape[0])

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return R."""
        return output.new_full((), output.shape[0])

    def num_terms(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return R."""
        return output.new_full((), output.shape[0])

    def num_positions(self, output: Tensor) -> int:
        """Return R."""
        return output.shape[0]

    def spread(self, weights: Tensor, output: Tensor) -> Tensor:
        """Return `[R, 1]`."""
        return weights.unsqueeze(-1)

    def draw_gradient(self, output: Tensor, generator: Generator) -> Tensor:
        """Draw Σ_c ε_c v_c with random signs ε_c for each row."""
        total = torch.zeros_like(output)
        for column in self.root_columns(output):
            draw = torch.rand(len(output), 1, generator=generator, device=generator.device)
            total += column * (1 - 2 * (draw < 0.5).to(output))
        return total


@dataclass(frozen=True, eq=False)
class RowHessians(_Rows):
    """H is made of one block for each row of z.

    Attributes:
        roots: B `[R, C, K]` with B Bᵀ = H⁺ for each row.
    """

    roots: Tensor

    @property
    def is_zero(self) -> bool:
        """Whether no block has a positive part."""
        return not bool((self.roots != 0).any())

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield B's columns."""
        yield from self.roots.unbind(-1)

    def multiply_hessian(self, output: Tensor, vector: Tensor) -> Tensor:
        """Return B Bᵀ v."""
        inner = torch.einsum("rck,rc->rk", self.roots, vector)
        return torch.einsum("rck,rk->rc", self.roots, inner)


@dataclass(frozen=True, eq=False)
class KrylovRows(_Rows):
    """H is made of one block for each row, too wide to be formed.

    Attributes:
        space: H⁺ in a Krylov space of each row, and what it is outside of it on average.
        samples: √H⁺ ε of random signs ε, one for each label that is drawn, `[M, R, C]`.
    """

    space: KrylovSpace
    samples: Tensor

    @property
    def is_zero(self) -> bool:
        """Whether no block has a positive part."""
        return not bool((self.space.eigenvalues != 0).any())

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield √H⁺ ε / √M: no root of H has few columns."""
        yield from self.samples / len(self.samples) ** 0.5

    def multiply_hessian(self, output: Tensor, vector: Tensor) -> Tensor:
        """Return what the space tells of H⁺ v."""
        return self.space.multiply(vector)


@dataclass(frozen=True, eq=False)
class RowGradients(_Rows):
    """The empirical Fisher: each row's gradient is the only column of its root.

    Attributes:
        gradients: ∂L/∂z `[R, C]`.
    """

    gradients: Tensor

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield the gradients."""
        yield self.gradients

    def multiply_hessian(self, output: Tensor, vector: Tensor) -> Tensor:
        """Return g gᵀ v."""
        return self.gradients * (self.gradients * vector).sum(-1, keepdim=True)
