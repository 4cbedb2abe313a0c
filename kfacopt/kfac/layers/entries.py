"""Parameters whose entries multiply, or are added, past modules: the exact diagonal of the Fisher.

With z = p x entry by entry, a datum's gradient by an entry is γ = Σ g x over the positions that the
entry has in this datum, and for z = x + p it is Σ g. As for normalisations each entry is a block of
its own, with A = 1 and G = Σ_n γ². Where uses are found is in `kfacopt.kfac.entry_uses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Size, Tensor
from torch.nn import Parameter

from kfacopt.kfac.layers.blocks import Layer
from kfacopt.kfac.layers.interface import LayerFamily

ENTRIES = "."  # the role of a parameter whose axes have none


@dataclass(frozen=True, eq=False)
class EntryCall:
    """One operation `[n, *positions]` that has entries of a parameter, the same for all data.

    Attributes:
        weight: The parameter.
        offset: The place of the first entry in the flat parameter.
        positions: For each axis of the positions its parts: sizes, and how far apart entries are;
            0 where they are repeated.
        slope: The derivative of what is multiplied or added by the parameter's entries, `[B]`.
        rows: How many of the n rows, one behind the other, a datum has.
        whole: Whether a part of the data cannot be taken, as a use of the parameter has several.
    """

    weight: Parameter
    offset: int
    positions: Sequence[Sequence[tuple[int, int]]]
    slope: Tensor | float
    rows: int
    whole: bool

    def by_entry(self, x: Tensor) -> Tensor:
        """Bring `[n, *positions]` to `[B, N, S, 1]`, 0 at entries that the operation has not."""
        parts = [part for axis in self.positions for part in axis]
        order = sorted(range(len(parts)), key=lambda i: -parts[i][1])
        own = [i for i in order if parts[i][1]]
        repeated = [i for i in order if not parts[i][1]]
        x = x.reshape(x.shape[0] // self.rows, self.rows, *(n for n, _ in parts))
        N, S = x.shape[0], self.rows * prod(parts[i][0] for i in repeated)
        x = x.permute(*(i + 2 for i in own), 0, 1, *(i + 2 for i in repeated))
        sizes, B = [parts[i][0] for i in own], self.weight.numel()
        x = x.reshape(*sizes, N, S)
        if prod(sizes) == B:
            return x.reshape(B, N, S, 1)
        full = x.new_zeros(B, N, S)
        strides = [parts[i][1] * N * S for i in own]
        full.as_strided((*sizes, N, S), (*strides, S, 1), self.offset * N * S).copy_(x)
        return full.unsqueeze(3)


class Entries(LayerFamily):
    """Entries of a parameter that belong to no module of a known kind."""

    datum_axes, bias_name, elementwise = 0, None, True

    def is_single(self, module: Any, x: Tensor) -> bool:
        """Take all data where a datum has several rows in any use."""
        return module is None or module.whole

    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Bring x to `[B, N, S, 1]`, or its means."""
        rows: Tensor = module.by_entry(x)
        if isinstance(module.slope, Tensor):
            rows = rows * module.slope.to(rows).reshape(-1, 1, 1, 1)
        elif module.slope != 1:
            rows = rows * module.slope
        return rows.mean(2, keepdim=True) if reduce else rows, rows.shape[2]

    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Bring g to `[B, N, S, 1]`."""
        rows: Tensor = module.by_entry(g)
        return rows

    def matrix_shape(self, shape: Size, groups: int) -> tuple[int, int, int]:
        """Return the number of entries, 1 and 1."""
        return groups, 1, 1


def entries_layer(name: str, p: Parameter) -> Layer:
    """Return the layer that a parameter is by its entries."""
    return Layer(name, p, None, p.numel(), False, Entries())
