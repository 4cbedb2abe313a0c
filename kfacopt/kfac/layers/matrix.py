"""Matrices that are multiplied without a module's call; which products these are is not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Size, Tensor
from torch.nn import functional as F

from kfacopt.kfac.layers.interface import LayerFamily


@dataclass(frozen=True)
class Span:
    """A range of the outputs, inputs or groups of a matrix, or of the rows of a product.

    Attributes:
        start: The first one.
        length: How many there are.
        total: How many the matrix has.
    """

    start: int
    length: int
    total: int

    def padded(self, rows: Tensor) -> Tensor:
        """Return rows of which the last axis has this range, with zeros elsewhere."""
        return F.pad(rows, (self.start, self.total - self.start - rows.shape[-1]))


@dataclass(frozen=True)
class Product:
    """How one product has a matrix.

    Attributes:
        left: Whether it is W x, whose data are columns.
        outputs: Which outputs it has, if not all.
        inputs: Which inputs it has, if not all.
        groups: Which groups it has, if not all.
        rows: Which rows of the node's output are its own, if not all.
        chosen: Indices of its own along the first axis of a node's output `[S, ...]`, if not all.
        order: The parameter's axes that its outputs have, with their sizes, if they are in another
            order.
        positions: Whether its rows were `[N, S, d_in]`, as far as that is known.
    """

    left: bool = False
    outputs: Span | None = None
    inputs: Span | None = None
    groups: Span | None = None
    rows: Span | None = None
    order: tuple[tuple[int, int], ...] = ()
    positions: bool = False
    chosen: Tensor | None = field(default=None, compare=False)


def by_axis(rows: Tensor, axes: Sequence[tuple[int, int]]) -> Tensor:
    """Bring the last axis of rows, made of several axes and sizes, into the order of the axes."""
    if len(axes) < 2 or list(axes) == sorted(axes):
        return rows
    lead = range(rows.ndim - 1)
    places = [rows.ndim - 1 + i for i in sorted(range(len(axes)), key=lambda i: axes[i])]
    split: Tensor = rows.unflatten(-1, [n for _, n in axes])
    return split.permute(*lead, *places).flatten(rows.ndim - 1)


class Matrix(LayerFamily):
    """z = W a + b of rows a, each of them a datum: what N was is not known any more.

    Outputs that a product leaves out have g = 0. A reduced factor is that of expand.

    Args:
        roles: A letter for each of the parameter's axes: "g" for groups, each a matrix of its own
            (as experts are), "o" for outputs, "i" for inputs. "oi" is `nn.Linear`'s. A bias has
            fewer axes: groups, if there are several, then outputs.
    """

    datum_axes, bias_name = 1, None

    def __init__(self, roles: str) -> None:
        self.roles, self.routed = roles, "g" in roles

    @property
    def inputs_first(self) -> bool:
        """Whether W is kept as `[d_in, d_out]`."""
        return self.roles == "io"

    def is_single(self, module: Any, x: Tensor) -> bool:
        """Take all rows where they are not the first axis of g, or others are there, too."""
        if module is None:
            return False
        partial = module.rows is not None or module.chosen is not None
        return module.left or x.ndim > 2 or partial

    def groups_used(self, module: Any) -> slice | None:
        """Return the experts of a product."""
        span = module.groups
        return None if span is None else slice(span.start, span.start + span.length)

    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Bring `[R, inputs]` to `[1, R, 1, d_in]`, `[B, R, inputs]` to `[B, R, 1, d_in]`."""
        if module.inputs is not None:
            x = module.inputs.padded(x)
        return (x if x.ndim == 3 else x.unsqueeze(0)).unsqueeze(2), 1

    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Bring `[B, R, outputs]`, `[B, outputs, R]`, or less of it, to `[B, R, 1, d_out]`."""
        g = g.unsqueeze(-1) if g.ndim == 1 else g
        rows = g.mT if module.left else g
        if module.rows is not None:
            rows = rows.narrow(0, module.rows.start, module.rows.length)
        if module.chosen is not None:
            rows = rows[module.chosen].flatten(0, 1)
        if not self.routed:
            rows = rows.reshape(1, rows.shape[:-1].numel(), rows.shape[-1])
        elif rows.ndim == 2:
            rows = rows.unsqueeze(0)
        rows = by_axis(rows, module.order)
        if module.outputs is not None:
            rows = module.outputs.padded(rows)
        return rows.unsqueeze(2)

    # The layout -----------------------------------------------------------------------------------

    def _sizes(self, shape: Size, role: str) -> list[int]:
        return [n for n, own in zip(shape, self.roles, strict=True) if own == role]

    def _order(self) -> list[int]:
        return [i for role in "goi" for i, own in enumerate(self.roles) if own == role]

    def matrix_shape(self, shape: Size, groups: int) -> tuple[int, int, int]:
        """Return B, d_out and d_in of W, or B, d_out and 1 of b."""
        if len(shape) < len(self.roles):
            return groups, shape.numel() // groups, 1
        B, d_out, d_in = (prod(self._sizes(shape, role)) for role in "goi")
        return B, d_out, d_in

    def to_matrix(self, tensor: Tensor, shape: Size, groups: int) -> Tensor:
        """Bring `[*lead, *shape]` to `[*lead, B, d_out, columns]`."""
        if len(shape) < len(self.roles):
            return super().to_matrix(tensor, shape, groups)
        lead = tensor.ndim - len(shape)
        turned = tensor.permute(*range(lead), *(lead + i for i in self._order()))
        return turned.reshape(*tensor.shape[:lead], *self.matrix_shape(shape, groups))

    def from_matrix(self, matrix: Tensor, shape: Size) -> Tensor:
        """Invert `to_matrix`."""
        if len(shape) < len(self.roles):
            return super().from_matrix(matrix, shape)
        order, lead = self._order(), matrix.ndim - 3
        split = matrix.reshape(*matrix.shape[:lead], *(shape[i] for i in order))
        back = [order.index(i) for i in range(len(order))]
        return split.permute(*range(lead), *(lead + i for i in back))
