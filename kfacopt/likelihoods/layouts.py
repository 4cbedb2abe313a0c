"""Entries of one or several tensors z as rows `[R, C]`; what the rows mean is in `structure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

# Entries of the last axis, of all axes but the first, or all of them, are a row.
RowKind = Literal["last", "datum", "all"]


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
        return shape[0], shape[1:].numel()

    def fits(self) -> bool:
        """Tell whether the tensors have as many rows each."""
        return len({self._rows(shape)[0] for shape in self.shapes}) == 1

    @property
    def width(self) -> int:
        """C."""
        return sum(self._rows(shape)[1] for shape in self.shapes)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors to `[R, C]`."""
        rows = [t.reshape(self._rows(s)) for t, s in zip(tensors, self.shapes, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Invert `join`."""
        widths = [self._rows(shape)[1] for shape in self.shapes]
        pieces = rows.split(widths, -1)
        return [piece.reshape(s) for piece, s in zip(pieces, self.shapes, strict=True)]
