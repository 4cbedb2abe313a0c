"""`nn.Linear`: axes between the first and the last are positions; other layers have other files."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kfacopt.kfac.layers.interface import LayerFamily


def _rows(x: Tensor) -> Tensor:
    """Bring `[N, ..., d]` or `[d]` to `[N, S, d]`; N may be 0, where -1 could not be inferred."""
    if x.ndim == 1:
        return x.reshape(1, 1, -1)
    return x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


class LinearFamily(LayerFamily):
    """z = W a + b for a `[N, ..., d_in]`.

    Args:
        weight_name: Which parameter of a module W is.
        bias_name: Which one b is; `None` if there is none.
        inputs_first: Whether W is kept as `[d_in, d_out]`, for z = a W + b, as GPT-2 does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import kfacopt
        >>> class InputsFirst(nn.Module):
        ...     def __init__(self, d_in, d_out):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(d_in, d_out))
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> family = kfacopt.LinearFamily("kernel", bias_name=None, inputs_first=True)
        >>> kfacopt.register_layer(InputsFirst, family)
        >>> InputsFirst in kfacopt.default_layers()
        True
    """

    datum_axes = 1

    def __init__(
        self,
        weight_name: str = "weight",
        bias_name: str | None = "bias",
        inputs_first: bool = False,
    ) -> None:
        self.weight_name, self.bias_name = weight_name, bias_name
        self.inputs_first = inputs_first

    def computes(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Exclude the output projection of `nn.MultiheadAttention`, which is never called."""
        called = not isinstance(module, NonDynamicallyQuantizableLinear)
        return called and super().computes(module, kind)

    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Flatten the positions of `[N, ..., d_in]`."""
        rows = _rows(x)
        return (rows.mean(1, keepdim=True) if reduce else rows).unsqueeze(0), rows.shape[1]

    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Flatten the positions of `[N, ..., d_out]`."""
        return _rows(g).unsqueeze(0)

    # The layout -----------------------------------------------------------------------------------

    def _is_turned(self, shape: Size) -> bool:
        return self.inputs_first and len(shape) == 2

    def matrix_shape(self, shape: Size, groups: int) -> tuple[int, int, int]:
        """Return 1, d_out and the number of columns of W or b."""
        return super().matrix_shape(shape[::-1] if self._is_turned(shape) else shape, groups)

    def to_matrix(self, tensor: Tensor, shape: Size, groups: int) -> Tensor:
        """Bring `[*lead, *shape]` to `[*lead, 1, d_out, columns]`."""
        if self._is_turned(shape):
            return tensor.mT.unsqueeze(-3)
        return super().to_matrix(tensor, shape, groups)

    def from_matrix(self, matrix: Tensor, shape: Size) -> Tensor:
        """Invert `to_matrix`."""
        return (
            matrix.squeeze(-3).mT if self._is_turned(shape) else super().from_matrix(matrix, shape)
        )
