"""`nn.Embedding` and `nn.EmbeddingBag`: z = a W with W `[V, d]` and a that counts tokens.

A is diagonal: the mean squares of the counts. For an embedding, whose a has a single 1, it is that
of expand exactly, token frequencies. Of means over positions, and of bags, it is the diagonal of
E[a aᵀ], which lacks what tokens have in common that occur together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.kfac.layers.interface import first_argument
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


class EmbeddingBag(Embedding):
    """Sums or means of embeddings of bags `[N, K]`: a has the number, or share, of each token.

    Bags of different sizes (`offsets`) and with weights of their tokens are left out.
    """

    def computes(self, module: Any, kind: type[nn.Module]) -> bool:
        """Exclude maxima, which are not linear."""
        return super().computes(module, kind) and module.mode in ("sum", "mean")

    def record(
        self, module: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor
    ) -> tuple[Any, Tensor] | None:
        """Leave out calls with offsets, weights, or anything that is no `[N, K]`."""
        x = first_argument(args, kwargs)
        others = [*args[1:], kwargs.get("offsets"), kwargs.get("per_sample_weights")]
        if x.ndim != 2 or any(value is not None for value in others):
            return None
        return module, x

    def sparse_inputs(self, module: Any, x: Tensor) -> SparseRows:
        """Return 1 for every token of a sum, 1/K of a mean, where `padding_idx` does not count."""
        return self._entries(module, x, torch.zeros_like(x), 1)

    def counted(self, module: Any, x: Tensor) -> Tensor | None:
        """Leave out bags of `padding_idx` alone."""
        tokens = super().counted(module, x)
        return None if tokens is None else tokens.any(1, keepdim=True)
