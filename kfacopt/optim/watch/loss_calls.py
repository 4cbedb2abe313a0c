"""What a call of a function of torch means as a loss; its curvature is in `likelihoods`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn import functional as F

from kfacopt.likelihoods import (
    Bernoulli,
    CrossEntropy,
    NegativeLogLikelihood,
    SquaredError,
    UnsupportedLossError,
    checked,
    widened,
)
from kfacopt.likelihoods.registry import LOSS_RULES, LossRule
from kfacopt.likelihoods.registry import LossCall as LossCall


def _legacy_reduction(arguments: dict[str, Any]) -> str:
    if arguments.get("size_average") is None and arguments.get("reduce") is None:
        return str(arguments["reduction"])
    if arguments.get("reduce") is False:
        return "none"
    return "sum" if arguments.get("size_average") is False else "mean"


def _categorical_call(name: str, arguments: dict[str, Any]) -> LossCall:
    output, target = arguments["input"], arguments["target"]
    if target.requires_grad:
        raise UnsupportedLossError(f"{name}: the target requires gradients; detach it.")
    options = (_legacy_reduction(arguments), arguments["weight"], arguments["ignore_index"])
    if name == "nll_loss":
        likelihood = NegativeLogLikelihood(*options)
        likelihood.check_output(widened(output))
        return LossCall(checked(likelihood), output, target)
    smoothing = arguments["label_smoothing"]
    return LossCall(checked(CrossEntropy(*options, smoothing)), output, target)


def _squared_error_call(arguments: dict[str, Any]) -> LossCall:
    """Take z as the residual: broadcasting, swapped arguments and two outputs are then right."""
    residual = arguments["input"] - arguments["target"]
    likelihood = SquaredError(_legacy_reduction(arguments), arguments.get("weight"))
    return LossCall(checked(likelihood), residual, None)


def _bernoulli_call(arguments: dict[str, Any]) -> LossCall:
    if arguments["target"].requires_grad:
        raise UnsupportedLossError(
            "binary_cross_entropy_with_logits: the target requires gradients; detach it."
        )
    likelihood = Bernoulli(
        _legacy_reduction(arguments), arguments["weight"], arguments["pos_weight"]
    )
    return LossCall(checked(likelihood), arguments["input"], arguments["target"])


# The four, and what users register.
KNOWN_LOSSES = LOSS_RULES
KNOWN_LOSSES.update(
    {
        F.cross_entropy: LossRule(
            inspect.signature(F.cross_entropy), partial(_categorical_call, "cross_entropy")
        ),
        F.nll_loss: LossRule(inspect.signature(F.nll_loss), partial(_categorical_call, "nll_loss")),
        F.mse_loss: LossRule(inspect.signature(F.mse_loss), _squared_error_call),
        F.binary_cross_entropy_with_logits: LossRule(
            inspect.signature(F.binary_cross_entropy_with_logits), _bernoulli_call
        ),
    }
)


def recognise_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LossCall:
    """Return what a call of a known loss means.

    Args:
        function: One of `KNOWN_LOSSES`.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        UnsupportedLossError: If the loss is known but an option of it is not supported.
    """
    return KNOWN_LOSSES[function].call(args, kwargs)
