"""Stand-ins for functions of torch whose derivatives are wrong or missing; nothing of kfacopt's."""

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

    Arguments and result are those of `torch.nn.functional.embedding`, but for two that change the
    gradient alone: it is dense, and not divided by frequencies, as a derivative is.
    """
    rows = functional.embedding(input, weight, None, max_norm, norm_type)
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
    return embedding(indices, weight, padding_idx if padding_idx >= 0 else None)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return sums, means or maxima of rows of `weight`, by operations that can be differentiated.

    Arguments and result are those of `torch.nn.functional.embedding_bag`, with the exceptions of
    `embedding`.
    """
    indices = input
    if input.ndim == 2 and offsets is None:  # bags of equal lengths
        indices, length = input.reshape(-1), max(input.shape[1], 1)
        offsets = torch.arange(0, len(indices), length, device=input.device).to(input.dtype)
        include_last_offset = False
    given = None if per_sample_weights is None else per_sample_weights.detach().reshape(-1)
    with torch.no_grad():  # checks the arguments, and writes what `max_norm` changes
        result = functional.embedding_bag(
            indices, weight.detach(), offsets, max_norm, norm_type, False, mode, False, given,
            include_last_offset, padding_idx,
        )  # fmt: skip
    assert offsets is not None
    starts = (offsets[:-1] if include_last_offset else offsets).to(torch.int64).contiguous()
    positions = torch.arange(len(indices), device=indices.device)
    bags = torch.bucketize(positions, starts, right=True) - 1
    kept = torch.ones_like(indices, dtype=torch.bool)
    if padding_idx is not None:
        kept = indices != (padding_idx if padding_idx >= 0 else len(weight) + padding_idx)
    number = bags.new_zeros(len(starts)).index_add(0, bags, kept.to(bags.dtype)).unsqueeze(-1)
    if mode == "max":
        with torch.no_grad():
            options = False, 2, False, None, include_last_offset, padding_idx
            largest = torch.embedding_bag(weight.detach(), indices, offsets, *options)[3]
        return torch.where(number > 0, weight.gather(0, largest), weight.new_zeros(()))
    rows = functional.embedding(indices, weight) * kept.unsqueeze(-1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    sums = rows.new_zeros(result.shape).index_add(0, bags, rows)
    return sums / number.clamp(min=1) if mode == "mean" else sums


def _with_weight(function: Callable[..., Any], position: int) -> Callable[..., Any]:
    """Return a normalisation that gets ones for a weight where it has a bias alone.

    Args:
        function: The normalisation; its bias follows its weight.
        position: Of the weight among its arguments.
    """

    def normalised(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("weight", "bias"), args[position : position + 2], strict=False)) | kwargs
        if given.get("weight") is None and given.get("bias") is not None:
            ones = torch.ones_like(given["bias"], requires_grad=False)
            if len(args) > position:
                args = (*args[:position], ones, *args[position + 1 :])
            else:
                kwargs["weight"] = ones
        return function(*args, **kwargs)

    return normalised


_STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: normalized_weight,
    torch.embedding: _embedding,
    functional.embedding: embedding,
    functional.embedding_bag: embedding_bag,
    **{f: _with_weight(f, 1) for f in (torch.batch_norm, torch.instance_norm)},
    **{f: _with_weight(f, 2) for f in (functional.layer_norm, functional.group_norm)},
    **{f: _with_weight(f, 2) for f in (torch.layer_norm, torch.group_norm)},
    **{f: _with_weight(f, 3) for f in (functional.batch_norm, functional.instance_norm)},
}


class DifferentiableFunctions(TorchFunctionMode):
    """Within this context others stand in for functions whose derivatives are wrong or missing.

    - Both forms of PyTorch's weight normalisation, the hook and the parametrization, call the fused
      `torch._weight_norm`. Its double derivative is wrong (torch 2.6 to 2.13: gradgradcheck fails,
      without an error in a backward pass), and it has no forward mode.
    - Of an embedding's row `padding_idx`, forward mode gives a derivative (torch 2.13), reverse
      mode none, as is documented. Sparse gradients cannot be multiplied, and those that are divided
      by frequencies are no derivatives.
    - `functional.embedding_bag` has neither double derivatives nor a forward mode.
    - Layer norm, batch norm and instance norm with a bias and no weight have double derivatives
      that leave out the bias, without an error; group norm has no backward pass (torch 2.13).
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
