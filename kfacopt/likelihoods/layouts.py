"""Entries of one or several tensors z as rows `[R, C]`; what the rows mean is in `structure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

# What a row has the entries of: the last axis, axis 1 where there are others behind it, all axes
# but the first, or all of them.
RowKind = Literal["last", "channels", "datum", "all"]


@dataclass(frozen=True)
class Layout:
    """Which entries of tensors make a row.

    Attributes:
        kind: What a row is. Tensors that make rows together have as many rows each.
        shapes: The tensors' shapes.
    """

    kind: RowKind
    shapes: tuple[Size, ...]

    def _rows(self, shape: Size) -> tuple[int, int]:
        """Return R and the columns of one tensor; a vector is one row for each entry."""
        if self.kind == "all" or not shape:
            return 1, shape.numel()
        if self.kind == "last" and len(shape) > 1:
            return shape[:-1].numel(), shape[-1]
        if self.kind == "channels" and len(shape) > 2:
            return shape[0] * shape[2:].numel(), shape[1]
        return shape[0], shape[1:].numel()

    @property
    def in_order(self) -> bool:
        """Whether rows one after the other are a tensor's entries in their order."""
        return self.kind != "channels"

    def fits(self) -> bool:
        """Tell whether the tensors have as many rows each."""
        return len({self._rows(shape)[0] for shape in self.shapes}) == 1

    @property
    def width(self) -> int:
        """C."""
        return sum(self._rows(shape)[1] for shape in self.shapes)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors to `[R, C]`."""
        if self.kind == "channels":
            tensors = [t.movedim(1, -1) if t.ndim > 2 else t for t in tensors]
        rows = [t.reshape(self._rows(s)) for t, s in zip(tensors, self.shapes, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Invert `join`."""
        widths = [self._rows(shape)[1] for shape in self.shapes]
        pieces = rows.split(widths, -1)
        return [self._tensor(piece, s) for piece, s in zip(pieces, self.shapes, strict=True)]

    def _tensor(self, piece: Tensor, shape: Size) -> Tensor:
        if self.kind == "channels" and len(shape) > 2:
            return piece.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return piece.reshape(shape)
