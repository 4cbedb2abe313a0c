"""A layer's trained parameters and their diagonal blocks of F; nothing that differs by family.

z = W a + b with a `[B, N, S, d_in]` and [W | b] `[B, d_out, d_in (+ 1)]`: B counts the groups of a
convolution, each with its own block, N data, S shared positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.linalg.split_factors import Factor


@dataclass(frozen=True, eq=False)
class Layer:
    """The trained parameters of a supported module that share Kronecker factors.

    Attributes:
        name: The module's name in the model.
        weight: W, if it is trained.
        bias: b, if it is trained.
        groups: B.
        joint: Whether [W | b] is one matrix, with a constant 1 appended to a.
        family: How W is laid out.
        parts: Uses of different kinds, each a layer of the same W whose factors are collected
            apart; none for most.
        positions: K, the entries of the kernel, where A is kept by channels and positions (see
            `kfacopt.linalg.split_factors`); 0 where it is kept whole.
        ranks: r of A, and of G, where they are kept as a low rank plus a diagonal (see
            `kfacopt.linalg.low_rank`); 0 where not.
    """

    name: str
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    groups: int
    joint: bool
    family: LayerFamily
    parts: tuple[Layer, ...] = ()
    positions: int = 0
    ranks: tuple[int, int] = (0, 0)

    @property
    def collected(self) -> tuple[Layer, ...]:
        """The layers that uses are of: the parts, or the layer itself."""
        return self.parts or (self,)

    @property
    def anchor(self) -> nn.Parameter:
        """The parameter that stands for the layer, W where it is trained."""
        parameter = self.weight if self.weight is not None else self.bias
        assert parameter is not None
        return parameter

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The diagonal blocks of F: [W | b], or W and b on their own; the same objects always."""
        if self.joint:
            return (Block(self, self.weight, self.bias),)
        weight = () if self.weight is None else (Block(self, self.weight, None),)
        bias = () if self.bias is None else (Block(self, None, self.bias),)
        return weight + bias

    def owns(self, key: str | nn.Parameter, names: Mapping[int, str]) -> bool:
        """Tell whether a key is the layer's name, or one of its parameters or their names.

        Args:
            key: What a user looks for.
            names: The parameters' names by their `id`.
        """
        if isinstance(key, str) and key == self.name:
            return True
        owned = [p for p in (self.weight, self.bias) if p is not None]
        return any(p is key or (isinstance(key, str) and names[id(p)] == key) for p in owned)

    @property
    def diagonal_input(self) -> bool:
        """Whether A is kept as its diagonal, whatever its side."""
        own = self.family.diagonal_input or self.family.elementwise
        return self.weight is not None and own

    @property
    def d_in(self) -> int:
        """The side of A in one group."""
        if self.weight is None:
            return 1
        return self.family.matrix_shape(self.weight.shape, self.groups)[2] + int(self.joint)

    @property
    def channels(self) -> int:
        """C, the channels of a group's input, where A is split."""
        return (self.d_in - int(self.joint)) // self.positions

    @property
    def d_out(self) -> int:
        """The side of G in one group."""
        return self.family.matrix_shape(self.anchor.shape, self.groups)[1]


@dataclass(frozen=True, eq=False)
class Block:
    """A diagonal block of F ≈ G ⊗ A, over W, b or [W | b] of one layer."""

    layer: Layer
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The block's parameters, in the order of the columns of its matrix."""
        return tuple(p for p in (self.weight, self.bias) if p is not None)

    @property
    def anchor(self) -> nn.Parameter:
        """The first of the block's parameters."""
        return self.parameters[0]

    @property
    def d_in(self) -> int:
        """The side of the block's A: the layer's, or 1 for a bias."""
        return self.layer.d_in if self.weight is not None else 1

    def to_columns(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Bring tensors `[*lead, *p.shape]`, one per parameter, to `[*lead, B, d_out, width]`."""
        family, groups = self.layer.family, self.layer.groups
        pairs = zip(tensors, self.parameters, strict=True)
        return [family.to_matrix(tensor, p.shape, groups) for tensor, p in pairs]

    def from_columns(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """Invert `to_columns`."""
        pairs = zip(columns, self.parameters, strict=True)
        return [self.layer.family.from_matrix(x, p.shape) for x, p in pairs]

    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors `[*lead, *p.shape]`, one per parameter, to `[*lead, B, d_out, d_in]`."""
        columns = self.to_columns(tensors)
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Invert `to_matrix`: `[*lead, B, d_out, d_in]` to tensors `[*lead, *p.shape]`."""
        family, groups = self.layer.family, self.layer.groups
        widths = [family.matrix_shape(p.shape, groups)[2] for p in self.parameters]
        return self.from_columns(matrix.split(widths, dim=-1))

    def input_factor(self, layer_factor: Factor) -> Factor:
        """Return the block's A: the layer's, or 1 for a bias, whose input is the constant 1."""
        if self.weight is not None:
            return layer_factor
        shape, device = (self.layer.groups, 1, 1), self.anchor.device
        return torch.ones(shape, dtype=layer_factor.dtype, device=device)
