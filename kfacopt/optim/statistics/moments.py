"""What a layer's statistics add up to between two steps; nothing is averaged over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.eigenvalues import Bases, block_second_moments
from kfacopt.kfac.factors import mean_input
from kfacopt.kfac.layers import Block


@dataclass
class UnprojectedGradients:
    """What second moments will be computed from, once there is a basis to compute them in.

    Attributes:
        uses: The uses of a layer in one forward pass.
        grads: For each use the gradient by the layer's output.
        scale: The factor of the second moments.
    """

    uses: list[LayerUse]
    grads: list[Tensor]
    scale: Tensor | float


def is_one(factor: Tensor | float) -> bool:
    """Tell whether a factor changes nothing, without a look at a device."""
    return not isinstance(factor, Tensor) and factor == 1


def _sum_in_place(total: Tensor | float, value: Tensor | float) -> Tensor | float:
    """Return a sum without a copy; a number is 0, the sum of nothing."""
    if not isinstance(total, Tensor):
        return value
    return total.add_(value)


@dataclass
class Moments:
    """What one layer's statistics since the last step add up to.

    Attributes:
        input_sum: Σ a aᵀ.
        rows: How many vectors it sums; `[B]` where groups have counts of their own.
        grad_output_sum: Σ g gᵀ.
        terms: How many terms of the loss they stem from, a scalar tensor.
        second_moments: For EKFAC, Λ of each block whose eigenbases were known.
        unprojected: For EKFAC, what Λ of the layer's other blocks follows from.
    """

    input_sum: Tensor | float = 0.0
    rows: int | Tensor = 0
    grad_output_sum: Tensor | float = 0.0
    terms: Tensor | float = 0.0
    second_moments: dict[Block, Tensor] = field(default_factory=dict)
    unprojected: list[UnprojectedGradients] = field(default_factory=list)

    def add(self, other: Moments) -> None:
        """Add another record's sums, which may be taken over."""
        self.add_inputs(other.input_sum, other.rows)
        self.add_grad_outputs(other.grad_output_sum)
        self.terms = self.terms + other.terms
        for block, value in other.second_moments.items():
            self.add_second_moments(block, value)
        self.unprojected += other.unprojected

    def add_inputs(self, value: Tensor | float, rows: int | Tensor) -> None:
        """Add to Σ a aᵀ; the value may be taken over, and changed later."""
        self.input_sum = _sum_in_place(self.input_sum, value)
        self.rows = self.rows + rows

    def add_grad_outputs(self, value: Tensor | float) -> None:
        """Add to Σ g gᵀ; the value may be taken over, and changed later."""
        self.grad_output_sum = _sum_in_place(self.grad_output_sum, value)

    def add_second_moments(self, block: Block, value: Tensor) -> None:
        """Add to Λ of a block."""
        known = self.second_moments.get(block)
        self.second_moments[block] = value if known is None else known + value

    def scale_curvature(self, factor: Tensor | float) -> None:
        """Multiply all that is quadratic in the gradients."""
        if is_one(factor):
            return
        self.grad_output_sum = self.grad_output_sum * factor
        self.second_moments = {b: value * factor for b, value in self.second_moments.items()}
        for entry in self.unprojected:
            entry.scale = entry.scale * factor

    def project(self, blocks: Mapping[Block, Bases]) -> None:
        """Compute Λ of blocks whose eigenbases have become known since, and let go of the rest."""
        for block, bases in blocks.items():
            for entry in self.unprojected:
                value = block_second_moments(block, entry.uses, entry.grads, bases)
                self.add_second_moments(block, value * entry.scale)
        self.unprojected = []

    def take_factors(self) -> tuple[Tensor, Tensor]:
        """Return A and G, in the memory of the sums, which are gone then."""
        A, G = (torch.as_tensor(x) for x in (self.input_sum, self.grad_output_sum))
        if isinstance(self.rows, Tensor):  # groups without any weigh nothing
            return mean_input(A, self.rows), G
        return A.div_(self.rows), G  # not finite without any, so that it is left out
