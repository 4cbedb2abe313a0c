"""Lists of parameter-shaped tensors as columns of one matrix, and back; no products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shapes = Sequence[tuple[int, ...]]


def is_tensor_list(x: Any) -> bool:
    """Tell whether `x` is a non-empty list (or tuple) of tensors."""
    return isinstance(x, list | tuple) and len(x) > 0 and all(isinstance(t, Tensor) for t in x)


def stack_rows(
    tensors: Sequence[Tensor], shapes: Shapes, name: str = "x"
) -> tuple[Tensor, tuple[int, ...]]:
    """Stack tensors `[*shape]` or `[*shape, K]` into `[D, K]`; return it and the trailing axes."""
    if len(tensors) != len(shapes):
        raise ValueError(
            f"{name}: the operator has {len(shapes)} parameter tensors, the list has "
            f"{len(tensors)}."
        )
    trailing = tuple(tensors[0].shape[len(shapes[0]) :]) if tensors else ()
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if len(trailing) > 1 or tuple(tensor.shape) != (*shape, *trailing):
            raise ValueError(
                f"{name}[{i}] must have the shape {tuple(shape)} of parameter {i}, or that with "
                f"one more axis for columns, the same for all; got {tuple(tensor.shape)}."
            )
    columns = trailing[0] if trailing else 1
    return torch.cat([t.reshape(-1, columns) for t in tensors]), trailing


def split_rows(matrix: Tensor, shapes: Shapes) -> list[Tensor]:
    """Split `[D, K]` into tensors `[*shape, K]`, the inverse of stacking flattened parameters."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    pieces = matrix.split(sizes)
    return [p.reshape(*s, matrix.shape[1]) for p, s in zip(pieces, shapes, strict=True)]
