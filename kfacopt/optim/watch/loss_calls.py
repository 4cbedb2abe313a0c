"""What a call of a function of torch means as a loss; its curvature is in `likelihoods`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from kfacopt.likelihoods import (
    Bernoulli,
    CrossEntropy,
    Likelihood,
    NegativeLogLikelihood,
    SquaredError,
    UnsupportedLossError,
    checked,
    widened,
)


@dataclass(frozen=True, eq=False)
class LossCall:
    """A recognised call of a loss function.

    Attributes:
        likelihood: What the loss means.
        output: The tensor z that the curvature refers to, with its graph.
        target: The targets, or `None` where they are part of z (MSE: z is the residual).
    """

    likelihood: Likelihood
    output: Tensor
    target: Tensor | None


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


KNOWN_LOSSES: dict[Callable[..., Any], inspect.Signature] = {
    function: inspect.signature(function)
    for function in (F.cross_entropy, F.nll_loss, F.mse_loss, F.binary_cross_entropy_with_logits)
}


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
    bound = KNOWN_LOSSES[function].bind(*args, **kwargs)
    bound.apply_defaults()
    if function is F.mse_loss:
        return _squared_error_call(bound.arguments)
    if function is F.binary_cross_entropy_with_logits:
        return _bernoulli_call(bound.arguments)
    return _categorical_call(function.__name__, bound.arguments)
