"""J v from the rows of J, for want of a faster way; the faster ones are in `linearization`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfacopt.curvature.batched_autograd import batched_grad

# They are kept up to this size.
_MAX_BYTES = 2**26
_AT_ONCE = 16


def pull_back(output: Tensor, leaves: Sequence[Tensor], U: Tensor) -> list[Tensor]:
    """Return Jᵀ u, one `[K, *p.shape]` for each of θ, by backward passes.

    Args:
        output: z, with its graph.
        leaves: θ.
        U: `[K, *z.shape]`.
    """
    if not output.requires_grad:
        return [p.new_zeros(U.shape[0], *p.shape) for p in leaves]
    return batched_grad([output], leaves, [U])


class JacobianRows:
    """The rows of J = ∂z/∂θ, by a backward pass for each; kept once computed if they are small.

    Args:
        output: z, with its graph.
        leaves: θ.
    """

    def __init__(self, output: Tensor, leaves: Sequence[Tensor]) -> None:
        self._output, self._leaves = output, leaves
        self._kept: list[Tensor] = []

    def multiply(self, V: Sequence[Tensor]) -> Tensor:
        """Return J v `[K, *z.shape]` for K vectors, one `[K, *p.shape]` for each of θ."""
        columns = torch.cat([v.reshape(v.shape[0], -1) for v in V], dim=1)
        size = self._output.numel() * columns.shape[1] * columns.element_size()
        if not self._kept and size <= _MAX_BYTES:
            self._kept = list(self._blocks())
        pieces = [columns @ rows.mT for rows in self._kept or self._blocks()]
        product = torch.cat([columns.new_zeros(len(columns), 0), *pieces], dim=1)
        return product.to(self._output.dtype).reshape(-1, *self._output.shape)

    def _blocks(self) -> Iterator[Tensor]:
        """Yield rows, `[R, D]`."""
        number = self._output.numel()
        for start in range(0, number, _AT_ONCE):
            place = torch.arange(start, min(start + _AT_ONCE, number))
            unit = self._output.new_zeros(len(place), number)
            unit[place - start, place] = 1
            pulled = pull_back(self._output, self._leaves, unit.reshape(-1, *self._output.shape))
            yield torch.cat([p.reshape(len(unit), -1) for p in pulled], dim=1)
