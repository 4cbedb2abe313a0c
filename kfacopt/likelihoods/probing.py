"""Random products with H = ∂²L/∂z², and their comparison; what follows is in `structure`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Generator, Tensor

# H v for v, a tensor for each z; for `[V, *z.shape]` with a leading axis, where it is asked so.
Product = Callable[[list[Tensor]], list[Tensor]]

# Among more tensors z nobody looks which of them see each other.
_MAX_TENSORS = 8

# What products may be off by, in units of round-off; fewer in low precision, where so many would be
# as large as the entries.
ROUND_OFFS = 64


@dataclass(frozen=True, eq=False)
class Probing:
    """Products with H = ∂²L/∂z², and what they are compared by.

    Attributes:
        values: z, widened, without a graph; `None` where it is unknown.
        gradients: ∂L/∂z, likewise.
        product: H v, widened.
        eps: Of the dtype that products are computed in.
        draws: Draws what is multiplied with H.
    """

    values: Sequence[Tensor | None]
    gradients: Sequence[Tensor]
    product: Product
    eps: float
    draws: Generator

    @property
    def tolerance(self) -> float:
        """What is smaller than the rest of its row by this factor counts as 0."""
        return min(ROUND_OFFS * math.exp(0.75 * math.log(self.eps)), max(12 * self.eps, 1e-3))

    def probe(self, members: Sequence[int]) -> list[Tensor]:
        """Draw u, with entries of random sign between 1/2 and 3/2; 0 for other tensors."""
        drawn = [torch.zeros_like(g) for g in self.gradients]
        for k in members:
            uniform = torch.rand(drawn[k].shape, generator=self.draws, dtype=torch.float64)
            sign = torch.rand(drawn[k].shape, generator=self.draws) < 0.5
            drawn[k] = torch.where(sign, -0.5 - uniform, 0.5 + uniform).to(drawn[k])
        return drawn

    def signs(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Draw random signs."""
        return 1 - 2 * torch.randint(2, tuple(shape), generator=self.draws).to(like)

    @property
    def round_off_share(self) -> float:
        """What entries of products may be off by, as a share of the largest one."""
        return min(ROUND_OFFS * self.eps, max(4 * self.eps, 1e-2))

    def round_off(self, *products: Tensor) -> float:
        """Return what entries of products may be off by."""
        return self.round_off_share * max((_largest(x) for x in products), default=0.0)

    def is_zero(self, k: int, product: Tensor, asymmetric: bool = False) -> bool:
        """Tell whether H v is 0, or all round-off of a gradient.

        Args:
            k: Where H v is.
            product: H v.
            asymmetric: Whether H is: only then all of round-off counts. Else a mean square whose
                targets are of size 10⁶ would look like 0.
        """
        z, gradient = self.value(k), self.gradients[k]
        smallest = 1e-3 * min(self.eps, torch.finfo(torch.float32).eps)
        share = self.round_off_share if asymmetric else smallest
        return _largest(product) <= share * _largest(gradient) / (1 + _largest(z))

    def close(self, one: Tensor, other: Tensor, round_off: float | Tensor) -> bool:
        """Tell whether rows `[..., C]` are equal, but for what counts as 0."""
        scale = torch.maximum(one.abs(), other.abs()).amax(-1, keepdim=True)
        return bool(((one - other).abs() <= self.tolerance * scale + round_off).all())

    def groups(self) -> tuple[list[tuple[int, ...]], list[Tensor], list[Tensor]]:
        """Return which tensors see each other, a vector u and H u, for all of them at once."""
        everything = range(len(self.gradients))
        if len(everything) > 1 and len(everything) <= _MAX_TENSORS:
            return self._groups_of_few()
        u = self.probe(everything)
        Hu = self.product(u)
        if len(everything) == 1:
            return [(0,)], u, Hu
        for signs in separating_signs(len(everything)):
            again = self.product([s * x for s, x in zip(signs, u, strict=True)])
            triples = zip(signs, again, Hu, strict=True)
            pairs = (((s * x).reshape(1, -1), y.reshape(1, -1)) for s, x, y in triples)
            if not all(self.close(*pair, 0.0) for pair in pairs):
                return [tuple(everything)], u, Hu
        return [(k,) for k in everything], u, Hu

    def _groups_of_few(self) -> tuple[list[tuple[int, ...]], list[Tensor], list[Tensor]]:
        everything = range(len(self.gradients))
        us = [self.probe([k]) for k in everything]
        stacked = self.product([torch.stack(list(column)) for column in zip(*us, strict=True)])
        products = [[x[k] for x in stacked] for k in everything]
        group_of = list(everything)
        sizes = [[_largest(x) for x in own] for own in products]
        for k, i in permutations(everything, 2):
            if sizes[k][i] > self.tolerance * (sizes[k][k] * sizes[i][i]) ** 0.5:
                old, new = group_of[i], group_of[k]
                group_of = [new if group == old else group for group in group_of]
        groups = [tuple(k for k in everything if group_of[k] == g) for g in dict.fromkeys(group_of)]
        total = [torch.stack([p[i] for p in products]).sum(0) for i in everything]
        return groups, [us[k][k] for k in everything], total

    def product_of(self, members: tuple[int, ...], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return H v at some tensors for v that is 0 at all others; see `Product`."""
        lead = vectors[0].ndim - self.gradients[members[0]].ndim
        shape = vectors[0].shape[:lead]
        full = [g.new_zeros(*shape, *g.shape) for g in self.gradients]
        for k, vector in zip(members, vectors, strict=True):
            full[k] = vector
        products = self.product(full)
        return [products[k] for k in members]

    def value(self, k: int) -> Tensor:
        """Return z, or zeros where it is unknown."""
        value = self.values[k]
        return torch.zeros_like(self.gradients[k]) if value is None else value


def separating_signs(count: int) -> Iterator[list[int]]:
    """Yield ⌈log₂ n⌉ times n signs; any two of the n differ in one of them: their numbers' bits."""
    for bit in range(max(count - 1, 0).bit_length()):
        yield [1 - 2 * (number >> bit & 1) for number in range(count)]


def _largest(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0
