"""`nn.Linear`: axes between the first and the last are positions; other layers have other files."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kfacopt.kfac.layers.interface import LayerFamily


def _rows(x: Tensor) -> Tensor:
    """Bring `[N, ..., d]` or `[d]` to `[N, S, d]`; N may be 0, where -1 could not be inferred."""
    if x.ndim == 1:
        return x.reshape(1, 1, -1)
    return x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


class Linear(LayerFamily):
    """z = W a + b for a `[N, ..., d_in]`."""

    datum_axes = 1

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
