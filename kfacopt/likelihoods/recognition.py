"""From `nn` loss modules to likelihoods; calls of functions are in `optim.watch.loss_calls`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from kfacopt.likelihoods.bernoulli import Bernoulli
from kfacopt.likelihoods.categorical import CrossEntropy, NegativeLogLikelihood
from kfacopt.likelihoods.interface import Likelihood, UnsupportedLossError, checked
from kfacopt.likelihoods.squared_error import SquaredError

# The likelihood of each loss, and the loss's attributes that are its arguments after `reduction`.
_LIKELIHOODS: dict[type[nn.Module], tuple[Callable[..., Likelihood], tuple[str, ...]]] = {
    nn.MSELoss: (SquaredError, ()),
    nn.CrossEntropyLoss: (CrossEntropy, ("weight", "ignore_index", "label_smoothing")),
    nn.BCEWithLogitsLoss: (Bernoulli, ("weight", "pos_weight")),
    nn.NLLLoss: (NegativeLogLikelihood, ("weight", "ignore_index")),
}
SUPPORTED_LOSSES = tuple(_LIKELIHOODS)


def has_likelihood(loss_func: object) -> bool:
    """Tell whether a loss is one of `SUPPORTED_LOSSES`; a subclass that changes it is not."""
    return any(
        isinstance(loss_func, kind) and type(loss_func).forward is kind.forward
        for kind in SUPPORTED_LOSSES
    )


def with_sum(loss_func: nn.Module) -> Any:
    """Return a loss that is the sum of the terms of which a loss is the mean or the sum."""
    summed: Any = copy.copy(loss_func)
    summed.reduction = "sum"
    return summed


def likelihood_of(loss_func: Any) -> Likelihood:
    """Return the likelihood of an `nn` loss module.

    Args:
        loss_func: `nn.MSELoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss` or `NLLLoss`.

    Raises:
        UnsupportedLossError: For any other loss, by name.
    """
    if not has_likelihood(loss_func):
        supported = ", ".join(f"nn.{loss.__name__}" for loss in SUPPORTED_LOSSES)
        name = getattr(loss_func, "__name__", type(loss_func).__name__)
        compiled = (
            " (it was compiled: loss_func._orig_mod)" if hasattr(loss_func, "_orig_mod") else ""
        )
        raise UnsupportedLossError(
            f"loss_func: {name} is not supported; give one of {supported}{compiled}."
        )
    kind = next(kind for kind in SUPPORTED_LOSSES if isinstance(loss_func, kind))
    likelihood, names = _LIKELIHOODS[kind]
    return checked(likelihood(loss_func.reduction, *(getattr(loss_func, name) for name in names)))
