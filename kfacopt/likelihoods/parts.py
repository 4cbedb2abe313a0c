"""The curvature of some of the tensors z of an objective; how it is found is in `structure`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Generator, Tensor

from kfacopt.likelihoods.found import KrylovRows, RowGradients
from kfacopt.likelihoods.interface import FisherType, Likelihood
from kfacopt.likelihoods.layouts import Layout


@dataclass(frozen=True, eq=False)
class CurvaturePart:
    """The curvature of tensors z that see each other, or of one.

    Attributes:
        members: Which of the tensors z they are.
        layout: How they are rows; `None` for a tensor as it is.
        likelihood: Has the curvature.
        output: z in the layout.
        weights: ω of each term.
        kind: What was found, in a word or two.
    """

    members: tuple[int, ...]
    layout: Layout | None
    likelihood: Likelihood
    output: Tensor
    weights: Tensor
    kind: str

    @property
    def empirical(self) -> bool:
        """Whether this is the empirical Fisher, which is quadratic in the objective."""
        return isinstance(self.likelihood, RowGradients)

    @property
    def num_rows(self) -> int:
        """How many rows of a member's entries, in their order, do not see each other."""
        if self.layout is not None and not self.layout.in_order:
            return self.layout.shapes[0][0]
        return self.output.shape[0] if self.likelihood.has_data_axis(self.output) else 1

    def vectors(
        self, fisher_type: FisherType, samples: int, generator: Generator
    ) -> Iterator[list[Tensor]]:
        """Yield v with Σ v vᵀ = H⁺, or E[Σ v vᵀ] = H⁺, one tensor for each member.

        Args:
            fisher_type: Only `"mc"` draws, and not from the empirical Fisher.
            samples: How many are drawn.
            generator: Draws them, or signs.
        """
        one = (self.output, self.weights, generator)
        if fisher_type != "mc" or isinstance(self.likelihood, KrylovRows | RowGradients):
            yield from map(self._split, self.likelihood.hessian_root(*one))
            return
        for _ in range(samples):
            scaled = (self.output, self.weights / samples, generator)
            yield self._split(self.likelihood.sample_gradient(*scaled))

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return H⁺ v, one tensor for each member.

        Args:
            vectors: v, likewise.
        """
        v = vectors[0] if self.layout is None else self.layout.join(vectors)
        return self._split(self.likelihood.hessian_product(self.output, self.weights, v))

    def _split(self, rows: Tensor) -> list[Tensor]:
        return [rows] if self.layout is None else self.layout.split(rows)


def joint_vectors(
    parts: Sequence[CurvaturePart],
    count: int,
    fisher_type: FisherType,
    samples: int,
    generator: Generator,
) -> Iterator[list[Tensor | None]]:
    """Yield v of parts that do not see each other, side by side: their signs are independent.

    Args:
        parts: The parts.
        count: How many tensors z there are.
        fisher_type: Only `"mc"` draws.
        samples: How many vectors are drawn.
        generator: Draws them, or signs.
    """
    sources = [part.vectors(fisher_type, samples, generator) for part in parts]
    for row in zip_longest(*sources):
        joint: list[Tensor | None] = [None] * count
        for part, own in zip(parts, row, strict=True):
            for member, vector in zip(part.members, own or (), strict=bool(own)):
                joint[member] = vector
        yield joint
