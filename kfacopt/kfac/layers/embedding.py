"""`nn.Embedding` and `nn.EmbeddingBag`: z = a W with W `[V, d]` and a that counts tokens.

A is diagonal: the mean squares of the counts. For an embedding, whose a has a single 1, it is that
of expand exactly, token frequencies. Of means over positions, and of bags, it is the diagonal of
E[a aᵀ], which lacks what tokens have in common that occur together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfacopt.kfac.layers.linear import LinearFamily
from kfacopt.kfac.layers.sparse_rows import SparseRows


class Embedding(LinearFamily):
    """A linear layer on tokens `[N, ...]`, whose axes behind the first are positions."""

    datum_axes, diagonal_input = 0, True

    def __init__(self) -> None:
        super().__init__(bias_name=None, inputs_first=True)

    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Return a itself `[1, N, S, V]`, which is large; sums take `sparse_inputs`."""
        rows = self.sparse_inputs(module, x)
        a = rows.dense()
        return a.mean(2, keepdim=True) if reduce else a, rows.shape[1]

    def sparse_inputs(self, module: Any, x: Tensor) -> SparseRows:
        """Return a 1 for every token, or 0 for `padding_idx`, by which W has no derivative."""
        tokens = x.reshape(len(x), x.shape[1:].numel()) if x.ndim else x.reshape(1, 1)
        N, S = tokens.shape
        return self._entries(module, tokens, torch.arange(S, device=x.device).expand(N, S), S)

    def counted(self, module: Any, x: Tensor) -> Tensor | None:
        """Leave out `padding_idx`."""
        if module.padding_idx is None:
            return None
        shape = (len(x), x.shape[1:].numel()) if x.ndim else (1, 1)
        counted: Tensor = x != module.padding_idx
        return counted.reshape(shape)

    @staticmethod
    def _entries(module: Any, tokens: Tensor, positions: Tensor, S: int) -> SparseRows:
        """Return an entry for each token `[N, K]`."""
        N, K = tokens.shape
        tokens, dtype = tokens.long(), torch.promote_types(module.weight.dtype, torch.float32)
        data = torch.arange(N, device=tokens.device).unsqueeze(1).expand(N, K)
        value = torch.ones_like(tokens, dtype=dtype)
        if module.padding_idx is not None:
            value = (tokens != module.padding_idx).to(dtype)
        if getattr(module, "mode", "sum") == "mean":
            value = value / value.sum(1, keepdim=True).clamp(min=1)
        datum, position, index = (x.reshape(-1) for x in (data, positions, tokens))
        return SparseRows(datum, position, index, value.flatten(), (N, S, module.weight.shape[0]))


@dataclass(frozen=True, eq=False)
class Bags:
    """One call of `nn.EmbeddingBag` with offsets or weights of tokens.

    Attributes:
        weight: W `[V, d]`.
        tokens: The tokens of all bags that count, `[M]`.
        bags: Whose they are, `[M]`.
        values: What each adds to a, `[M]`.
    """

    weight: Parameter
    tokens: Tensor
    bags: Tensor
    values: Tensor

    @classmethod
    def of(cls, module: Any, tokens: Tensor, bags: Tensor, weights: Tensor | None) -> Bags:
        """Return a call by its tokens `[M]`, their bags and weights; padding does not count."""
        if module.padding_idx is not None:
            kept = tokens != module.padding_idx
            tokens, bags = tokens[kept], bags[kept]
            weights = None if weights is None else weights[kept]
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        values = torch.ones_like(tokens, dtype=dtype) if weights is None else weights.to(dtype)
        if module.mode == "mean":
            values = values / torch.bincount(bags).to(dtype)[bags]
        return cls(module.weight, tokens.long(), bags, values)

    def counted(self, x: Tensor) -> Tensor:
        """Tell which of some bags `[N]` have any tokens."""
        filled = torch.bincount(self.bags, minlength=int(x.max()) + 1 if len(x) else 0) > 0
        return filled[x]

    def rows(self, x: Tensor) -> SparseRows:
        """Return a of some bags `[N]`, by their numbers."""
        highest = max(int(y.max()) if len(y) else -1 for y in (x, self.bags))
        place = torch.full((highest + 1,), -1, device=x.device)
        place[x] = torch.arange(len(x), device=x.device)
        datum = place[self.bags]
        kept = datum >= 0
        datum, tokens, values = datum[kept], self.tokens[kept], self.values[kept]
        shape = (len(x), 1, self.weight.shape[0])
        return SparseRows(datum, torch.zeros_like(datum), tokens, values, shape)


class EmbeddingBag(Embedding):
    """Sums or means of embeddings of bags: a has the number, weight, or share, of each token.

    Of bags `[N, K]` x are the tokens; with offsets or weights x are the numbers of the bags `[N]`.
    """

    def computes(self, module: Any, kind: type[nn.Module]) -> bool:
        """Exclude maxima, which are not linear."""
        return super().computes(module, kind) and module.mode in ("sum", "mean")

    def record(
        self, module: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor
    ) -> tuple[Any, Tensor] | None:
        """Keep tokens, or, with offsets or weights, what they add to a."""
        names = ("input", "offsets", "per_sample_weights")
        x, offsets, weights = (
            {**kwargs, **dict(zip(names, args, strict=False))}.get(n) for n in names
        )
        if x is None or (x.ndim == 2 and weights is None):
            return None if x is None else (module, x)
        weights = None if weights is None else weights.detach().flatten()
        numbers = torch.arange(len(output), device=x.device)
        if x.ndim == 2:
            bags = numbers.repeat_interleave(x.shape[1])
        elif offsets is not None:
            whole = module.include_last_offset
            ends = offsets if whole else torch.cat([offsets, offsets.new_tensor([len(x)])])
            bags = numbers.repeat_interleave(ends.diff())
        else:
            return None
        tokens = x.flatten()[: len(bags)]
        weights = None if weights is None else weights[: len(bags)]
        return Bags.of(module, tokens, bags, weights), numbers

    def sparse_inputs(self, module: Any, x: Tensor) -> SparseRows:
        """Return 1 for every token of a sum, 1/K of a mean, where `padding_idx` does not count."""
        if isinstance(module, Bags):
            return module.rows(x.long())
        return self._entries(module, x, torch.zeros_like(x), 1)

    def counted(self, module: Any, x: Tensor) -> Tensor | None:
        """Leave out bags without tokens, or of `padding_idx` alone."""
        if isinstance(module, Bags):
            return module.counted(x).unsqueeze(1)
        tokens = super().counted(module, x)
        return None if tokens is None else tokens.any(1, keepdim=True)
