"""Inputs a with a few entries that are not 0, as those of embeddings, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseRows:
    """a `[1, N, S, d_in]` by its M entries; several at one place add up.

    Attributes:
        datum: Which n, `[M]`.
        position: Which s, `[M]`.
        index: Which of the d_in columns, `[M]`.
        value: The entry, `[M]`.
        shape: N, S and d_in.
        live: Which rows `[N, S]` count, if not all; there are no entries elsewhere.
    """

    datum: Tensor
    position: Tensor
    index: Tensor
    value: Tensor
    shape: tuple[int, int, int]
    live: Tensor | None = None

    def at(self, live: Tensor) -> SparseRows:
        """Return the rows `[N, S]` that are told, alone."""
        kept = live[self.datum, self.position]
        datum, position = self.datum[kept], self.position[kept]
        return SparseRows(datum, position, self.index[kept], self.value[kept], self.shape, live)

    def dense(self) -> Tensor:
        """Return a itself."""
        N, S, d_in = self.shape
        a = self.value.new_zeros(1, N, S, d_in)
        places = (torch.zeros_like(self.datum), self.datum, self.position, self.index)
        return a.index_put_(places, self.value, accumulate=True)

    def squares(self, reduce: bool) -> tuple[Tensor, int]:
        """Return the diagonal of Σ a aᵀ `[1, d_in]`, or that of the means over s, and their number.

        Args:
            reduce: Whether to average over the positions first.
        """
        N, S, d_in = self.shape
        if self.live is not None:
            return self._live_squares(self.live, reduce)
        if not reduce and len(self.index) == N * S:  # one entry a row
            return self._by_column(self.value.square(), self.index).unsqueeze(0), N * S
        rows = self.datum if reduce else self.datum * S + self.position
        keys, sums = _added_up(rows * d_in + self.index, self.value / S if reduce else self.value)
        return self._by_column(sums.square(), keys % d_in).unsqueeze(0), N if reduce else N * S

    def _live_squares(self, live: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Return what `squares` does, with means over the positions that count."""
        _, S, d_in = self.shape
        counts, value = live.sum(1), self.value
        rows = self.datum if reduce else self.datum * S + self.position
        if reduce:
            value = value / counts[self.datum]
        keys, sums = _added_up(rows * d_in + self.index, value)
        number = int((counts > 0).sum() if reduce else counts.sum())
        return self._by_column(sums.square(), keys % d_in).unsqueeze(0), number

    def products(self, g: Tensor) -> Tensor:
        """Return Σ g aᵀ `[1, d_out, d_in]` for g `[1, N, S, d_out]`."""
        return self._by_column(self._scaled(g), self.index).mT.unsqueeze(0)

    def gradient_squares(self, g: Tensor) -> Tensor:
        """Return Σ_n (Σ_s g aᵀ)², entry by entry, `[1, d_out, d_in]`, for g `[1, N, S, d_out]`."""
        d_in = self.shape[2]
        keys, gradients = _added_up(self.datum * d_in + self.index, self._scaled(g))
        return self._by_column(gradients.square(), keys % d_in).mT.unsqueeze(0)

    def _scaled(self, g: Tensor) -> Tensor:
        """Return the rows of g, by entry, times the entries, `[M, d_out]`."""
        rows: Tensor = g[0, self.datum, self.position]
        return rows * self.value.to(g.dtype).unsqueeze(1)

    def _by_column(self, values: Tensor, index: Tensor) -> Tensor:
        """Add up values `[M, ...]` to `[d_in, ...]`."""
        total = values.new_zeros(self.shape[2], *values.shape[1:])
        return total.index_add_(0, index, values)


def side_by_side(parts: Sequence[SparseRows]) -> SparseRows:
    """Return the rows of several uses by the same data, as further positions."""
    starts = [sum(rows.shape[1] for rows in parts[:i]) for i in range(len(parts))]
    moved = [
        replace(rows, position=rows.position + start)
        for rows, start in zip(parts, starts, strict=True)
    ]
    N, _, d_in = parts[0].shape
    live = None
    if any(rows.live is not None for rows in parts):
        everywhere = [rows.datum.new_ones(rows.shape[:2], dtype=torch.bool) for rows in parts]
        pairs = zip(parts, everywhere, strict=True)
        live = torch.cat([own if rows.live is None else rows.live for rows, own in pairs], dim=1)
    return SparseRows(
        torch.cat([rows.datum for rows in moved]),
        torch.cat([rows.position for rows in moved]),
        torch.cat([rows.index for rows in moved]),
        torch.cat([rows.value for rows in moved]),
        (N, sum(rows.shape[1] for rows in parts), d_in),
        live,
    )


def _added_up(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys `[U]` that are different, and the sum of the values `[M, ...]` of each."""
    unique, place = torch.unique(keys, return_inverse=True)
    sums = values.new_zeros(len(unique), *values.shape[1:])
    return unique, sums.index_add_(0, place, values)
