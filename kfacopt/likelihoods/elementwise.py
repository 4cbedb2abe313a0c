"""What losses of single entries of z share; each of them has a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.interface import Likelihood


def drawn(random: Callable[..., Tensor], output: Tensor, generator: Generator) -> Tensor:
    """Draw a number for each entry of z, on the generator's device, wherever z lives."""
    shape, device = output.shape, generator.device
    return random(shape, generator=generator, dtype=output.dtype, device=device).to(output.device)


@dataclass(frozen=True, eq=False)
class Elementwise(Likelihood):
    """Shared by losses whose terms are single entries of z."""

    weight: Tensor | None = None

    def _second_derivative(self, output: Tensor) -> Tensor:
        raise NotImplementedError

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of entries of z."""
        return torch.full((), output.numel(), dtype=output.dtype, device=output.device)

    def num_terms(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of rows of z: the mean over a datum's outputs is part of ℓ_n."""
        rows = output.shape[0] if output.ndim else 1
        return torch.full((), rows, dtype=output.dtype, device=output.device)

    def num_positions(self, output: Tensor) -> int:
        """Return the number of vectors along the last axis of z."""
        return output.shape[:-1].numel() if output.ndim > 1 else output.numel()

    def _hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        return self._second_derivative(output) * vector

    def _root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield √(∂²ℓ/∂z²) at one entry of each datum."""
        root = self._second_derivative(output).sqrt()
        if root.ndim == 0:
            yield root
            return
        flat = root.reshape(root.shape[0], root.shape[1:].numel())
        for i in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, i] = flat[:, i]
            yield column.reshape(root.shape)
