"""Layers as matrices: z = W a + b with a `[B, N, S, d_in]` and [W | b] `[B, d_out, d_in (+ 1)]`.

B counts the groups of a convolution, each with its own block, N data, S shared positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kfacopt.kfac.patches import patch_sums, patches

KFACApprox = Literal["expand", "reduce"]
KFAC_APPROXES: tuple[KFACApprox, ...] = ("expand", "reduce")

SUPPORTED_MODULES = (nn.Linear, nn.Conv2d)


def is_supported(module: nn.Module) -> bool:
    """Tell whether a module computes what `nn.Linear` or `nn.Conv2d` compute.

    Subclasses count if they do not override the forward pass. The output projection of
    `nn.MultiheadAttention` does not count: its forward pass is never called.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    forward = type(module).forward
    if isinstance(module, nn.Linear):
        return forward is nn.Linear.forward
    if isinstance(module, nn.Conv2d):
        return (
            forward is nn.Conv2d.forward and type(module)._conv_forward is nn.Conv2d._conv_forward
        )
    return False


@dataclass(frozen=True, eq=False)
class Layer:
    """The trained parameters of a supported module that share Kronecker factors.

    Attributes:
        name: The module's name in the model.
        weight: W, if it is trained.
        bias: b, if it is trained.
        groups: B.
        joint: Whether [W | b] is one matrix, with a constant 1 appended to a.
    """

    name: str
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    groups: int
    joint: bool

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
    def d_in(self) -> int:
        """The side of A in one group."""
        if self.weight is None:
            return 1
        return self.weight[0].numel() + int(self.joint)

    @property
    def d_out(self) -> int:
        """The side of G in one group."""
        return self.anchor.shape[0] // self.groups


@dataclass(frozen=True, eq=False)
class Block:
    """A diagonal block of F ≈ G ⊗ A, over W, b or [W | b] of one layer."""

    layer: Layer
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    @property
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
        groups, columns = self.layer.groups, []
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            lead = tensor.shape[: tensor.ndim - parameter.ndim]
            columns.append(tensor.reshape(*lead, groups, parameter.shape[0] // groups, -1))
        return columns

    def from_columns(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """Invert `to_columns`."""
        return [
            x.reshape(*x.shape[:-3], *p.shape)
            for x, p in zip(columns, self.parameters, strict=True)
        ]

    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors `[*lead, *p.shape]`, one per parameter, to `[*lead, B, d_out, d_in]`."""
        columns = self.to_columns(tensors)
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Invert `to_matrix`: `[*lead, B, d_out, d_in]` to tensors `[*lead, *p.shape]`."""
        return self.from_columns(matrix.split([p[0].numel() for p in self.parameters], dim=-1))

    def input_factor(self, layer_factor: Tensor) -> Tensor:
        """Return the block's A: the layer's, or 1 for a bias, whose input is the constant 1."""
        if self.weight is not None:
            return layer_factor
        return layer_factor.new_ones(self.layer.groups, 1, 1)


def find_layers(
    named_modules: Iterable[tuple[str, nn.Module]],
    params: Iterable[nn.Parameter],
    separate_weight_and_bias: bool,
) -> list[tuple[Layer, list[nn.Module]]]:
    """Find the supported layers that own any of the parameters.

    Modules that share their weight (and bias) are one layer. A bias that a module does not share
    with the module of the same weight has no layer, nor has a parameter that a module of another
    kind owns too (an embedding tied to a linear layer), or one that requires no gradient, is
    complex, or has no entries.

    Args:
        named_modules: Candidate modules with their names.
        params: The parameters to look for.
        separate_weight_and_bias: Whether W and b get blocks of their own.

    Returns:
        Each layer with the modules that call it, in the order of the modules.
    """
    modules_by_name = list(named_modules)
    own = [p for p in params if p.requires_grad and p.is_floating_point() and p.numel()]
    wanted = {id(p) for p in own}
    for _, module in modules_by_name:
        # Tied to a supported layer, for instance an embedding; but a list of parameters uses none.
        if not (is_supported(module) or isinstance(module, nn.ParameterList | nn.ParameterDict)):
            wanted -= {id(p) for p in module._parameters.values()}
    layers: dict[int, tuple[Layer, list[nn.Module]]] = {}
    for name, module in modules_by_name:
        if not is_supported(module):
            continue
        weight, bias = (
            p if p is not None and id(p) in wanted else None
            for p in (module._parameters.get("weight"), module._parameters.get("bias"))
        )
        anchor = weight if weight is not None else bias
        if anchor is None:
            continue
        if id(anchor) in layers:
            modules = layers[id(anchor)][1]
            if all(module is not m for m in modules):
                modules.append(module)
            continue
        joint = not separate_weight_and_bias and weight is not None and bias is not None
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        layers[id(anchor)] = (Layer(name, weight, bias, groups, joint), [module])
    return list(layers.values())


# Inputs and output gradients -----------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """Bring `[N, ..., d]` or `[d]` to `[N, S, d]`; N may be 0, where -1 could not be inferred."""
    if x.ndim == 1:
        return x.reshape(1, 1, -1)
    return x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


def layer_inputs(module: nn.Module, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
    """Bring a module's input to `[B, N, S, d_in]`.

    Args:
        module: An `nn.Linear` or `nn.Conv2d`.
        x: Its input, `[N, ..., d_in]` or `[N, C, H, W]`; the axis N may lack.
        reduce: Whether to average over the positions, which leaves S = 1.

    Returns:
        a, and the number S of positions before averaging.
    """
    if isinstance(module, nn.Conv2d):
        if reduce:
            sums, positions = patch_sums(module, x)
            means = (sums / positions).unflatten(1, (module.groups, -1))
            return means.flatten(2).transpose(0, 1).unsqueeze(2), positions
        kernel_sees = patches(module, x)
        positions = kernel_sees.shape[2] * kernel_sees.shape[3]
        # [N, C, OH, OW, KH, KW] -> [B, C/B KH KW, N, OH OW], d in the order of the weight's
        # entries; S comes last in memory, as long runs are fast to copy.
        grouped = kernel_sees.unflatten(1, (module.groups, -1)).permute(1, 2, 5, 6, 0, 3, 4)
        return grouped.flatten(5).flatten(1, 3).permute(0, 2, 3, 1), positions
    rows = _rows(x)
    positions = rows.shape[1]
    return (rows.mean(1, keepdim=True) if reduce else rows).unsqueeze(0), positions


def layer_grad_outputs(module: nn.Module, g: Tensor) -> Tensor:
    """Bring the gradient by a module's output to `[B, N, S, d_out]`.

    Args:
        module: An `nn.Linear` or `nn.Conv2d`.
        g: `[N, ..., d_out]` or `[N, C, OH, OW]`; the axis N may lack.
    """
    if isinstance(module, nn.Conv2d):
        if g.ndim == 3:
            g = g.unsqueeze(0)
        positions = g.shape[2:].numel()  # N may be 0, where -1 could not be inferred
        channels = g.reshape(g.shape[0], module.groups, g.shape[1] // module.groups, positions)
        return channels.permute(1, 0, 3, 2)
    return _rows(g).unsqueeze(0)
