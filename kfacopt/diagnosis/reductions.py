"""Whether a loss that does not say so is a mean or a sum over data, found out by trying."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfacopt.data import Batch, to_device
from kfacopt.likelihoods.loss_parts import loss_name, uncompiled

# By how much, relatively, two evaluations may differ by round-off.
_TOLERANCE = 1e-4

Reduction = Literal["mean", "sum"]


class Reduced:
    """A loss that has an attribute `reduction`.

    Args:
        loss_func: The loss.
        reduction: Over data.
    """

    def __init__(self, loss_func: Any, reduction: Reduction) -> None:
        self._loss_func, self.reduction = uncompiled(loss_func), reduction
        self.__name__ = loss_name(loss_func)

    def __call__(self, z: Tensor, y: Any) -> Any:
        """Return the loss."""
        return self._loss_func(z, y)


def reduction_by_trial(model: nn.Module, loss_func: Any, batch: Batch) -> Reduction | None:
    """Return what a loss does with the data of a batch that come twice.

    Args:
        model: The model.
        loss_func: A loss without a `reduction`.
        batch: X and y.

    Returns:
        `"mean"` if it stays the same, `"sum"` if it doubles; `None` for anything else, and where
        predictions or targets cannot be had twice.
    """
    device = next(model.parameters()).device
    X, y = (to_device(x, device) for x in batch)
    try:
        z = model(X).detach().requires_grad_()
        losses = [loss_func(z, y), loss_func(_twice(z), _twice(y))]
        once, twice = (float(loss.detach()) for loss in losses)
    except Exception:  # whatever a loss of the user's does with rows that it does not expect
        return None
    if not once or not math.isfinite(once):
        return None
    ratio = twice / once
    if abs(ratio - 1) < _TOLERANCE:
        return "mean"
    return "sum" if abs(ratio - 2) < _TOLERANCE else None


def _twice(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.cat([x, x])
    if type(x) is dict:
        return {key: _twice(value) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(_twice, x))
    raise TypeError(f"{type(x).__name__} cannot be repeated.")


def said_of(reduction: Reduction | None) -> str:
    """Return what the report says of a loss without a `reduction`."""
    if reduction is None:
        return (
            "The loss has no `reduction`, and a batch that comes twice neither leaves it as it is "
            'nor doubles it, so that a single batch is looked at. Set loss_func.reduction = "mean" '
            'or "sum" if it is one over data.'
        )
    does = "leaves it as it is" if reduction == "mean" else "doubles it"
    return (
        f"The loss has no `reduction`; a batch that comes twice {does}, so that it is taken for a "
        f"{reduction} over data."
    )
