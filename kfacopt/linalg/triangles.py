"""Symmetric matrices `[..., d, d]` kept once, as `[..., d, k]` with k of about d / 2.

The numbers are those of the first rows' triangle, then of the rectangle below it, then of the
triangle of the rest, and zeros to fill up; triangles of more than `LEAF` rows are cut so again, and
smaller ones are kept row after row. Rectangles are copied whole, which takes half the time of an
index for each entry, and needs none.

Of matrices of more than `SQUARES_FROM` rows that are read in each step, squares are kept at the
end, which takes less time again: 0.63 to 0.69 d² numbers there, 0.56 d² for twice the rows, 0.53 d²
for four times. Small matrices stay as they are, and those that each step multiplies with few
columns: to write them out would take a third of the time of the product, or more.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# Below it, the microseconds of a call weigh more than some kilobytes.
LEAST_SIDE = 64

LEAF = 272

SQUARES_FROM = 2 * LEAF

# Up to as many columns; of 64 with d = 129, 513 and 1,001 a product takes 27, 387 and 1,530 µs, and
# writing out 22, 221 and 439; of 128 columns twice as long, and as long.
FEW_COLUMNS = 64

# On a GPU calls take longer than what they do: up to here an index for each entry is used.
GPU_LEAF = 2048


def kept_shape(shape: tuple[int, ...], columns: int | None = None) -> tuple[int, ...]:
    """Return the shape of what `kept_once` makes of matrices, or of diagonals, of a shape."""
    d = shape[-1]
    if len(shape) < 3 or shape[-2] != d or d < LEAST_SIDE:
        return shape
    if columns is not None and columns <= FEW_COLUMNS:
        return shape
    return (*shape[:-1], _columns(d, columns is not None and d > SQUARES_FROM))


def whole_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the matrices, or diagonals, of which something of a shape is kept."""
    return shape if len(shape) < 3 else (*shape[:-1], shape[-2])


def kept_once(x: Tensor, columns: int | None = None) -> Tensor:
    """Return what is to be kept of something.

    Args:
        x: Symmetric matrices `[..., d, d]`. Small ones, diagonals `[B, d]`, and what is kept
            once already, are returned as they are.
        columns: With how many columns it is multiplied in each step; `None` if it is seldom read.
    """
    shape, d = kept_shape(tuple(x.shape), columns), x.shape[-1]
    if shape == x.shape:
        return x
    kept = x.new_zeros(shape)
    _read(x.reshape(-1, d, d), *_numbers(kept))
    return kept


def other_shapes(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return what else may be kept of a matrix: what is kept of it depends on how it is read."""
    whole = whole_shape(shape)
    return {whole, kept_shape(whole), kept_shape(whole, whole[-1])}


def kept_anew(kept: Tensor, columns: int | None = None) -> Tensor:
    """Return what `kept_once` makes of the matrices of which something is kept."""
    fits = kept_shape(whole_shape(tuple(kept.shape)), columns) == tuple(kept.shape)
    return kept if fits else kept_once(symmetric(kept), columns)


class Workspace:
    """Memory that matrices are written out into one after the other, within one step.

    Without it each takes new memory, which the system has to clear, and which is in no cache.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return memory for a matrix; what was there before is overwritten."""
        memory, size = self._memory, math.prod(shape)
        fits = memory is not None and memory.dtype == like.dtype and memory.device == like.device
        if memory is None or not fits or len(memory) < size:
            memory = self._memory = like.new_empty(size)
        return memory[:size].view(shape)


def symmetric(kept: Tensor, workspace: Workspace | None = None) -> Tensor:
    """Return the matrices of which something is kept, in new memory or a workspace's."""
    shape = whole_shape(tuple(kept.shape))
    if shape == kept.shape:
        return kept
    d, (numbers, squares) = shape[-1], _numbers(kept)
    leaf = LEAF if kept.device.type == "cpu" else GPU_LEAF
    if d <= leaf:
        return _selected(numbers, _matrix_places(d, squares, kept.device)).view(shape)
    matrices = kept.new_empty(shape) if workspace is None else workspace.empty(kept, shape)
    _write(numbers, matrices.view(-1, d, d), squares, leaf)
    return matrices


def _columns(d: int, squares: bool) -> int:
    return -(-_size(d, squares) // d)


def _numbers(kept: Tensor) -> tuple[Tensor, bool]:
    """Return `[N, n]` of what is kept, and whether there are squares at the end."""
    d, k = kept.shape[-2:]
    squares = k > _columns(d, False)
    return kept.reshape(-1, d * k)[:, : _size(d, squares)], squares


def _first(d: int) -> int:
    """Return how many rows the first triangle has.

    No multiple of a large power of two: the rectangle is read across its rows, too, which takes
    three times as long then.
    """
    return d // 32 * 16 + 8


@lru_cache(maxsize=512)
def _size(d: int, squares: bool) -> int:
    """Return n."""
    if d <= LEAF:
        return d * d if squares else d * (d + 1) // 2
    h = _first(d)
    return _size(h, squares) + (d - h) * h + _size(d - h, squares)


def _parts(numbers: Tensor, d: int, squares: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first triangle's numbers, the rectangle `[N, d - h, h]` and the second's."""
    h = _first(d)
    start = _size(h, squares)
    first, rectangle, second = numbers.tensor_split([start, start + (d - h) * h], dim=1)
    return first, rectangle.unflatten(1, (d - h, h)), second


def _read(x: Tensor, numbers: Tensor, squares: bool) -> None:
    """Put what is kept of `[N, d, d]` into `[N, n]`."""
    d = x.shape[-1]
    if d <= LEAF:
        rows = x.reshape(len(x), -1)
        numbers.copy_(rows if squares else _selected(rows, _triangle_places(d, x.device)))
        return
    (first, rectangle, second), h = _parts(numbers, d, squares), _first(d)
    rectangle.copy_(x[:, h:, :h])
    _read(x[:, :h, :h], first, squares)
    _read(x[:, h:, h:], second, squares)


def _write(numbers: Tensor, x: Tensor, squares: bool, leaf: int = LEAF) -> None:
    """Put what is kept, `[N, n]`, into symmetric matrices `[N, d, d]`, by an index up to `leaf`."""
    d = x.shape[-1]
    if squares and d <= LEAF:
        x.copy_(numbers.view(x.shape))
        return
    if d <= leaf:
        x.copy_(_selected(numbers, _matrix_places(d, squares, x.device)).view(x.shape))
        return
    (first, rectangle, second), h = _parts(numbers, d, squares), _first(d)
    x[:, h:, :h].copy_(rectangle)
    x[:, :h, h:].copy_(rectangle.mT)
    _write(first, x[:, :h, :h], squares, leaf)
    _write(second, x[:, h:, h:], squares, leaf)


def _selected(rows: Tensor, places: Tensor) -> Tensor:
    """Return entries of each row; on the CPU of one after the other, which torch does fast."""
    if rows.device.type != "cpu":
        return rows.index_select(1, places)
    if len(rows) == 1:
        return rows[0].index_select(0, places).unsqueeze(0)
    found: Tensor = torch.stack([row.index_select(0, places) for row in rows])
    return found


@lru_cache(maxsize=64)
def _triangle_places(d: int, device: torch.device) -> Tensor:
    """Return where the lower triangle is in a matrix, row after row."""
    rows, columns = torch.tril_indices(d, d, device=device)
    places: Tensor = (rows * d + columns).to(torch.int32)
    return places


@lru_cache(maxsize=64)
def _matrix_places(d: int, squares: bool, device: torch.device) -> Tensor:
    """Return where among the kept numbers each entry of a matrix is."""
    if d <= LEAF and not squares:
        i, j = torch.arange(d).unsqueeze(1), torch.arange(d)
        high, low = torch.maximum(i, j), torch.minimum(i, j)
        places = high * (high + 1) // 2 + low
    else:
        numbers = torch.arange(_size(d, squares), dtype=torch.int32).unsqueeze(0)
        places = numbers.new_empty(1, d, d)
        _write(numbers, places, squares)
    return places.flatten().to(device, torch.int32)
