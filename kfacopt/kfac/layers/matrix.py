"""Matrices that are multiplied without a module's call; which products these are is not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from kfacopt.kfac.layers.linear import LinearFamily


@dataclass(frozen=True)
class RowsOfOutputs:
    """Which outputs of a matrix `[d_out, d_in]` a product has: a slice of its rows.

    Attributes:
        start: The first one.
        total: d_out.
    """

    start: int
    total: int


class Matrix(LinearFamily):
    """z = W a + b of rows a `[R, d_in]`, each of them a datum: what N was is not known any more.

    Outputs that a product leaves out have g = 0. A reduced factor is that of expand.

    Args:
        inputs_first: Whether W is kept as `[d_in, d_out]`.
    """

    def __init__(self, inputs_first: bool) -> None:
        super().__init__(bias_name=None, inputs_first=inputs_first)

    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Bring `[R, d_in]` to `[1, R, 1, d_in]`."""
        return super().inputs(module, x.flatten(0, -2), reduce)

    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Bring `[R, outputs]` to `[1, R, 1, d_out]`."""
        rows = g.flatten(0, -2)
        if isinstance(module, RowsOfOutputs):
            rows = F.pad(rows, (module.start, module.total - module.start - rows.shape[-1]))
        return super().grad_outputs(module, rows)
