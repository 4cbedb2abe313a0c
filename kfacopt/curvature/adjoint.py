"""Whether products with a Jacobian are right, by ⟨u, J v⟩ = ⟨Jᵀ u, v⟩; not the products.

Jᵀ u is a plain backward pass, u and v are random. A parameter whose derivative is small beside
the others' (behind a layer scale of 1e-6) would hide in the sums: each part of v is divided by
that of Jᵀ u, so that all have the same part in both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kfacopt.curvature.batched_autograd import batched_grad

# Products are right if they agree with a backward pass to this part of the dtype's digits.
CONFIRMATION_DIGITS = 0.5

# How many vectors. A wrong product agrees by chance about as often as the bound says, to the power
# of their number: of graphs that are torch's own, one is enough to know torch's rules.
_FEW = {torch.float64: 1, torch.float32: 1}
_MANY = {torch.float64: 2, torch.float32: 4}
_IN_HALF_PRECISION = 4, 16
# A part of Jᵀ u may be nothing but round-off (that of a bias before a normalisation): so many times
# the square root of it are what parts are divided by at least, so that it stays below the bound.
_ROUND_OFFS = 8
# In half precision a wrong part is seen among as many, of about equal derivatives, not among all;
# those below some round-offs of the largest say nothing.
_AT_ONCE = 8
_RANGE_IN_HALF = 1e2
_ROUND_OFFS_IN_HALF = 4

Columns = list[Tensor]


def random_like(tensors: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return one random vector of length about 1, `[1, *x.shape]` for each tensor."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sum(x.numel() for x in tensors), 1) ** 0.5
    return [(torch.randn(1, *x.shape, generator=generator) / length).to(x) for x in tensors]


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


class AdjointTest:
    """⟨u, J v⟩ = ⟨Jᵀ u, v⟩ for J = ∂z/∂θ.

    Args:
        output: z, with its graph.
        leaves: θ.
        careful: Whether J may be wrong in more than torch's rules.
    """

    def __init__(self, output: Tensor, leaves: Sequence[Tensor], careful: bool) -> None:
        self._dtype, self._leaves = leaves[0].dtype, leaves
        self._in_half = self._dtype not in _MANY
        few, many = _IN_HALF_PRECISION
        number = _MANY.get(self._dtype, many) if careful else _FEW.get(self._dtype, few)
        u = [random_like([output], seed=1 + k)[0] for k in range(number)]
        self._U = torch.cat(u)
        # not by vmap: what it is compared with should be what users' own backward passes are
        pulled = [pull_back(output, leaves, x) for x in u]
        self._pulled = [torch.cat(x) for x in zip(*pulled, strict=True)]
        self._careful = careful

    def agrees(self, product: Callable[[Columns], Tensor | None]) -> bool | None:
        """Tell whether products are right; `None` if Jᵀ u is not finite, or all is 0.

        Args:
            product: Maps vectors, `[K, *p.shape]` for each of θ, to J v `[K, *z.shape]`, or `None`
                if it cannot.
        """
        verdicts: list[bool | None] = []
        for V in self._vectors():
            Jv = product(V)
            verdicts.append(False if Jv is None else self._is_adjoint(Jv, V))
        if False in verdicts:
            return False
        return True if True in verdicts else None

    def _vectors(self) -> Iterator[Columns]:
        """Yield random v, for all of θ or for groups with about equal derivatives."""
        sizes = [float(wide(g).norm()) for g in self._pulled]
        if not (self._in_half and self._careful):
            yield self._scaled(set(range(len(sizes))), sizes)
            return
        round_off = _ROUND_OFFS_IN_HALF * torch.finfo(self._dtype).eps * max(sizes)
        order = sorted(
            (i for i, size in enumerate(sizes) if size == 0 or size > round_off),
            key=lambda i: sizes[i],
        )
        group: list[int] = []
        for i in order:
            if group and (len(group) == _AT_ONCE or sizes[i] > _RANGE_IN_HALF * sizes[group[0]]):
                yield self._scaled(set(group), sizes)
                group = []
            group.append(i)
        if group:
            yield self._scaled(set(group), sizes)

    def _scaled(self, group: set[int], sizes: Sequence[float]) -> Columns:
        largest = max(sizes[i] for i in group)
        least = _ROUND_OFFS * torch.finfo(self._dtype).eps ** (1 - CONFIRMATION_DIGITS)
        least = 1 / _RANGE_IN_HALF if self._in_half and self._careful else min(least, 1.0)
        generator = torch.Generator().manual_seed(0)
        V: Columns = []
        for i, p in enumerate(self._leaves):
            if i not in group:
                V.append(p.new_zeros(1, *p.shape).expand(len(self._U), *p.shape))
                continue
            v = torch.randn(len(self._U), *p.shape, generator=generator)
            share = sizes[i] / largest if sizes[i] > 0 and largest < torch.inf else 1.0
            V.append((v / max(share, least)).to(p))
        return V

    def _is_adjoint(self, Jv: Tensor, V: Columns) -> bool | None:
        left = wide(self._U).view(len(Jv), -1) * wide(Jv).view(len(Jv), -1)
        right = torch.cat(
            [(wide(a) * wide(b)).view(len(Jv), -1) for a, b in zip(self._pulled, V, strict=True)],
            dim=1,
        )
        error = (left.sum(1) - right.sum(1)).square().sum()
        # Of terms with random signs: the size of their sums, where those are not 0 by chance.
        scale = left.square().sum() + right.square().sum()
        bound = torch.finfo(self._dtype).eps ** CONFIRMATION_DIGITS
        tells = right.isfinite().all() & (scale != 0)
        known, agree = torch.stack([tells, error <= bound**2 * scale]).tolist()
        return bool(agree) if known else None


def wide(x: Tensor) -> Tensor:
    """Return entries in float64 (which MPS does not have), as a vector."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64).flatten()
