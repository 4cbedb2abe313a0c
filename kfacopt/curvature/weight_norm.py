"""Weight normalisation that can be differentiated any number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def normalized_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / ‖v‖, with a norm for each index along an axis.

    Args:
        v: Directions.
        g: Lengths, broadcastable to `v`.
        dim: The axis; −1 takes one norm over all of `v`, as `torch._weight_norm` does.

    References:
        Salimans & Kingma (2016), https://arxiv.org/abs/1602.07868, Eq. 2.
    """
    others = [axis for axis in range(v.ndim) if axis != dim]
    weight: Tensor = v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))
    return weight


class DifferentiableWeightNorm(TorchFunctionMode):
    """Within this context `torch._weight_norm` is `normalized_weight`.

    Both forms of PyTorch's weight normalisation, the hook and the parametrization, call the fused
    `torch._weight_norm`. Its double derivative is wrong (torch 2.6 to 2.13: gradgradcheck fails,
    without an error in a backward pass), and it has no forward mode.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or what stands in for it."""
        function = normalized_weight if func is torch._weight_norm else func
        return function(*args, **(kwargs or {}))
