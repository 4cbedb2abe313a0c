"""Functions of each entry alone that may lie between a parameter and its use, with derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# From what a node has kept, and the node, to the derivative of its output by its operand.
_Derivative = Callable[[Any, Any], Tensor | float]


def _softplus(x: Tensor, node: Any) -> Tensor:
    beta = node._saved_beta
    steep = torch.sigmoid(x * beta)
    return torch.where(x * beta > node._saved_threshold, torch.ones_like(x), steep)


def _power(x: Tensor, node: Any) -> Tensor:
    exponent = node._saved_exponent
    return x.pow(exponent - 1).mul(exponent)


def _clamp(x: Tensor, node: Any) -> Tensor:
    lower = getattr(node, "_saved_min", None)
    upper = getattr(node, "_saved_max", None)
    inside = torch.ones_like(x, dtype=torch.bool)
    if lower is not None:
        inside &= x >= lower
    if upper is not None:
        inside &= x <= upper
    return inside.to(x)


FUNCTIONS: dict[str, tuple[str, _Derivative]] = {
    "ExpBackward0": ("_saved_result", lambda y, node: y),
    "SigmoidBackward0": ("_saved_result", lambda y, node: y * (1 - y)),
    "TanhBackward0": ("_saved_result", lambda y, node: 1 - y.square()),
    "SqrtBackward0": ("_saved_result", lambda y, node: 0.5 / y),
    "ReciprocalBackward0": ("_saved_result", lambda y, node: -y.square()),
    "LogBackward0": ("_saved_self", lambda x, node: 1 / x),
    "SoftplusBackward0": ("_saved_self", _softplus),
    "PowBackward0": ("_saved_self", _power),
    "ClampBackward1": ("_saved_self", _clamp),
    "NegBackward0": ("", lambda x, node: -1.0),
    "RsubBackward1": ("", lambda x, node: -float(node._saved_alpha)),
}
