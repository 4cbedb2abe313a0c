"""Functions of torch in a form whose derivatives of every order and mode are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
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


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return rows of `weight`; that of `padding_idx` is a constant, also in forward mode.

    Arguments and result are those of `torch.nn.functional.embedding`.
    """
    options = max_norm, norm_type, scale_grad_by_freq, sparse
    rows = functional.embedding(input, weight, None, *options)
    if padding_idx is None:
        return rows
    is_padding = input == (padding_idx if padding_idx >= 0 else len(weight) + padding_idx)
    return torch.where(is_padding.unsqueeze(-1), rows.detach(), rows)


def _embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return what `torch.embedding` does, whose −1 stands for none."""
    padding = padding_idx if padding_idx >= 0 else None
    return embedding(indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


_STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: normalized_weight,
    torch.embedding: _embedding,
    functional.embedding: embedding,
}


class DifferentiableFunctions(TorchFunctionMode):
    """Within this context other functions stand in for those whose derivatives are wrong.

    - Both forms of PyTorch's weight normalisation, the hook and the parametrization, call the fused
      `torch._weight_norm`. Its double derivative is wrong (torch 2.6 to 2.13: gradgradcheck fails,
      without an error in a backward pass), and it has no forward mode.
    - Of an embedding's row `padding_idx`, forward mode gives a derivative (torch 2.13), reverse
      mode none, as is documented.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or what stands in for it."""
        return _STAND_INS.get(func, func)(*args, **(kwargs or {}))
