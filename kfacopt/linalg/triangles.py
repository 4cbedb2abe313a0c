"""Symmetric matrices `[..., d, d]` kept once, as `[..., d, k]` with k of about d / 2.

The numbers are those of the first rows' triangle, then of the rectangle below it, then of the
triangle of the rest, and zeros to fill up; triangles of more than `LEAF` rows are cut so again, and
smaller ones are kept row after row. Rectangles are copied whole, which takes half the time of an
index for each entry, and needs none.

Matrices that are multiplied in each step take more, for their product's time:

- Halves, 0.75 d² numbers: one cut, and squares on the diagonal. A product reads them as they are
  (`halves_of`), and takes 1.00 to 1.06 times as long as of a whole matrix.
- Beside few columns, where 0.25 d² are much beside the weight itself, squares at the end of all
  cuts, above `SQUARES_FROM` rows: 0.63 to 0.69 d² numbers, 0.56 d² for twice the rows, 0.53 d² for
  four times. They are written out for each product, and so are triangles of fewer rows.
- All of it below `WHOLE_BELOW` rows, and beside hardly any columns: writing out would take a third
  of the time of the product, or more.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

# Below it, the microseconds of a call weigh more than some kilobytes.
LEAST_SIDE = 64

# The same for matrices that each step multiplies.
WHOLE_BELOW = 192

LEAF = 272

SQUARES_FROM = 2 * LEAF

# Up to as many columns; of 64 with d = 129, 513 and 1,001 a product takes 27, 387 and 1,530 µs, and
# writing out 22, 221 and 439; of 128 columns twice as long, and as long.
FEW_COLUMNS = 64

# Halves take d / (4 columns) more numbers for each of the weight's: up to so many rows a column.
HALVES_UP_TO = 3

# On a GPU calls take longer than what they do: up to here an index for each entry is used.
GPU_LEAF = 2048

# What a matrix is kept as, and what the two on its diagonal are once it is cut.
Form = Literal["triangles", "squares", "halves", "square"]
_AFTER_A_CUT: dict[Form, Form] = {
    "triangles": "triangles",
    "squares": "squares",
    "halves": "square",
}


def kept_shape(shape: tuple[int, ...], columns: int | None = None) -> tuple[int, ...]:
    """Return the shape of what `kept_once` makes of matrices, or of diagonals, of a shape."""
    d = shape[-1]
    if len(shape) < 3 or shape[-2] != d or d < LEAST_SIDE:
        return shape
    if columns is None:
        return (*shape[:-1], _columns(d, "triangles"))
    split = len(shape) > 3  # of many blocks, which are more beside the weight, and are written out
    if columns <= FEW_COLUMNS or (d < WHOLE_BELOW and not split):
        return shape
    if d <= HALVES_UP_TO * columns and not split:
        return (*shape[:-1], _columns(d, "halves"))
    return (*shape[:-1], _columns(d, "squares" if d > SQUARES_FROM else "triangles"))


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
    if len(whole) < 3 or kept_shape(whole) == whole:
        return {whole}
    return {whole, *((*whole[:-1], _columns(whole[-1], form)) for form in _forms(whole[-1]))}


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
    d, (numbers, form) = shape[-1], _numbers(kept)
    leaf = 0 if kept.device.type == "cpu" else GPU_LEAF
    if d <= leaf or not _is_cut(d, form):
        return _selected(numbers, _matrix_places(d, form, kept.device)).view(shape)
    matrices = kept.new_empty(shape) if workspace is None else workspace.empty(kept, shape)
    _write(numbers, matrices.view(-1, d, d), form, leaf)
    return matrices


def halves_of(kept: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the first h columns of `[N, d, d]`, and the square of the rest's rows and columns.

    They are L `[N, d, h]` and S `[N, d - h, d - h]` of the matrices [L | [L[h:]ᵀ; S]], which are
    kept so; `None` if something else is kept.
    """
    d = kept.shape[-2]
    if kept.ndim != 3 or kept.shape[-1] == d or kept.shape[-1] != _columns(d, "halves"):
        return None
    numbers, form = _numbers(kept)
    h = _first(d, form)
    left, square = numbers.tensor_split([d * h], dim=1)
    return left.unflatten(1, (d, h)), square.unflatten(1, (d - h, d - h))


def _forms(d: int) -> list[Form]:
    """Return what matrices of d rows may be kept as, from the fewest numbers on."""
    return ["triangles", "squares", "halves"] if d > SQUARES_FROM else ["triangles", "halves"]


def _columns(d: int, form: Form) -> int:
    return -(-_size(d, form) // d)


def _numbers(kept: Tensor) -> tuple[Tensor, Form]:
    """Return `[N, n]` of what is kept, and what it is."""
    d, k = kept.shape[-2:]
    form = next(form for form in _forms(d) if _columns(d, form) == k)
    return kept.reshape(-1, d * k)[:, : _size(d, form)], form


def _is_cut(d: int, form: Form) -> bool:
    return form == "halves" or (form != "square" and d > LEAF)


def _first(d: int, form: Form) -> int:
    """Return how many rows the first of the two on the diagonal has.

    Of what is multiplied as it is, what processors multiply fastest. Else no multiple of a large
    power of two: the rectangle is read across its rows, too, which takes three times as long then.
    """
    return (d + 16) // 32 * 16 if form == "halves" else d // 32 * 16 + 8


@lru_cache(maxsize=512)
def _size(d: int, form: Form) -> int:
    """Return n."""
    if not _is_cut(d, form):
        return d * (d + 1) // 2 if form == "triangles" else d * d
    h, part = _first(d, form), _AFTER_A_CUT[form]
    return _size(h, part) + (d - h) * h + _size(d - h, part)


def _parts(numbers: Tensor, d: int, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first triangle's numbers, the rectangle `[N, d - h, h]` and the second's."""
    h = _first(d, form)
    start = _size(h, _AFTER_A_CUT[form])
    first, rectangle, second = numbers.tensor_split([start, start + (d - h) * h], dim=1)
    return first, rectangle.unflatten(1, (d - h, h)), second


def _read(x: Tensor, numbers: Tensor, form: Form) -> None:
    """Put what is kept of `[N, d, d]` into `[N, n]`."""
    d = x.shape[-1]
    if not _is_cut(d, form):
        rows, triangle = x.reshape(len(x), -1), form == "triangles"
        numbers.copy_(_selected(rows, _triangle_places(d, x.device)) if triangle else rows)
        return
    (first, rectangle, second), h = _parts(numbers, d, form), _first(d, form)
    rectangle.copy_(x[:, h:, :h])
    _read(x[:, :h, :h], first, _AFTER_A_CUT[form])
    _read(x[:, h:, h:], second, _AFTER_A_CUT[form])


def _write(numbers: Tensor, x: Tensor, form: Form, leaf: int = 0) -> None:
    """Put what is kept, `[N, n]`, into symmetric matrices `[N, d, d]`, by an index up to `leaf`."""
    d = x.shape[-1]
    if form != "triangles" and not _is_cut(d, form):
        x.copy_(numbers.view(x.shape))
        return
    if d <= leaf or not _is_cut(d, form):
        x.copy_(_selected(numbers, _matrix_places(d, form, x.device)).view(x.shape))
        return
    (first, rectangle, second), h = _parts(numbers, d, form), _first(d, form)
    x[:, h:, :h].copy_(rectangle)
    x[:, :h, h:].copy_(rectangle.mT)
    _write(first, x[:, :h, :h], _AFTER_A_CUT[form], leaf)
    _write(second, x[:, h:, h:], _AFTER_A_CUT[form], leaf)


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
def _matrix_places(d: int, form: Form, device: torch.device) -> Tensor:
    """Return where among the kept numbers each entry of a matrix is."""
    if form == "triangles" and d <= LEAF:
        i, j = torch.arange(d).unsqueeze(1), torch.arange(d)
        high, low = torch.maximum(i, j), torch.minimum(i, j)
        places = high * (high + 1) // 2 + low
    else:
        numbers = torch.arange(_size(d, form), dtype=torch.int32).unsqueeze(0)
        places = numbers.new_empty(1, d, d)
        _write(numbers, places, form)
    return places.flatten().to(device, torch.int32)
