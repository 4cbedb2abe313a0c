"""The settings of `KFACOptimizer` that are the same for all parameter groups, and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kfacopt.argument_checks import check_flag, check_range
from kfacopt.kfac.factors import FactorForm
from kfacopt.likelihoods import FisherType, Likelihood
from kfacopt.optim.preconditioner import InverseForm


@dataclass(frozen=True)
class Schedule:
    """Settings that are the same for all parameter groups; see `KFACOptimizer`."""

    inverse: InverseForm
    ema_decay: float
    factor_update_interval: int
    inverse_update_interval: int
    kl_clip: float | None
    separate_weight_and_bias: bool


@dataclass(frozen=True)
class Defaults:
    """Settings that suit mini-batches with a given learning rate, or full batches without one."""

    damping: float
    ema_decay: float
    factor_update_interval: int
    inverse_update_interval: int
    fallback_lr: float  # of vectors and embeddings


# "fixed", with the numbers in the signature of `KFACOptimizer`, is the best of the settings in
# benchmarks/defaults.py (r1), but for `fallback_lr`: matrices and positions get 1e-3 instead.
DEFAULTS = {"fixed": Defaults(5e-4, 0.9, 10, 50, 0.015), "auto": Defaults(1e-3, 0.8, 1, 5, 1e-3)}


@dataclass(frozen=True)
class CurvatureOptions:
    """Which curvature is collected.

    Attributes:
        fisher_type: `"mc"`, `"type-2"` or `"empirical"`.
        mc_samples: Labels drawn for each datum.
        form: How factors are formed.
        likelihood: The stated loss at the model's output; `None` recognises it.
        corrected: Whether second moments are collected in the layers' eigenbases, too.
        recording: Whether forward passes and losses are recorded, so that they can be evaluated
            again.
        batch_fraction: The share of a batch's data that factors are summed over.
    """

    fisher_type: FisherType
    mc_samples: int
    form: FactorForm
    likelihood: Likelihood | None
    corrected: bool = False
    recording: bool = False
    batch_fraction: float = 1.0

    @property
    def loss_scale_power(self) -> int:
        """How often G carries a factor on the loss that is not the objective's: a loss scale.

        A recognised loss's factor is carried once. A stated loss is not looked at, but the
        gradients of an empirical Fisher carry the factor, squared.
        """
        if self.likelihood is None:
            return 1
        return 2 if self.fisher_type == "empirical" else 0


def check_kept_dtype(name: str, dtype: torch.dtype | None) -> None:
    """Raise unless factors or inverses can be kept in a dtype."""
    allowed = (None, torch.bfloat16, torch.float32, torch.float64)
    if dtype not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {dtype!r}.")


def refuse_flags(**flags: bool) -> None:
    """Raise if a flag of torch.optim is set that is not supported; say what to do instead."""
    reasons = {
        "capturable": "inverses are checked on the host; capture forward and backward pass in a "
        "CUDA graph, and call step outside of it",
        "differentiable": "a step is not differentiable; step with kfacopt.KFACLinearOperator's "
        "inverse on the gradient instead",
    }
    for name, value in flags.items():
        check_flag(name, value)
        if value:
            raise ValueError(f"{name} must be False, got True: {reasons[name]}.")


# Settings of the whole optimizer, which a group cannot have for itself; flags only if they are set.
_OF_ALL_GROUPS = (
    *("preconditioner", "damping_method", "fisher_type", "mc_samples", "kfac_approx"),
    *("ema_decay", "factor_update_interval", "inverse_update_interval", "kl_clip"),
    *("factor_batch_fraction", "separate_weight_and_bias", "max_factor_dim"),
    *("factor_dtype", "inverse_dtype"),
    *("loss_func", "model", "seed"),
)
_UNSUPPORTED_FLAGS = ("capturable", "differentiable", "fused")


_RATES = ("lr", "momentum", "weight_decay", "damping", "fallback_lr")
_OWN = (*_RATES, "nesterov", "maximize", "foreach")


def as_number(value: Any) -> Any:
    """Return the number in a tensor of one, as torch.optim takes for `lr`, or of NumPy's.

    Anything else is returned as it is.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item()
    if isinstance(value, Real) and not isinstance(value, int | float):
        return float(value)
    return value


@contextmanager
def numbers_alone(groups: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Let settings be plain numbers for a while, also those that are tensors.

    Args:
        groups: The parameter groups.
    """
    replaced = []
    for group in groups:
        for name in _RATES:
            value = group[name]
            if type(value) is not float:
                number = group[name] = as_number(value)
                replaced.append((group, name, value, number))
    try:
        yield
    finally:
        for group, name, value, number in replaced:
            if group[name] is number:  # else the step has adapted it
                group[name] = value


def settings_of(groups: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what groups may set, to see whether it has changed."""
    values = ([group.get(name) for name in _OWN] for group in groups)
    # Tensors that are no numbers cannot be compared.
    return [tuple(str(x) if isinstance(x, Tensor) else x for x in own) for own in values]


def check_group(group: Mapping[str, Any], where: str = "") -> None:
    """Raise unless a parameter group has all settings, each in its range.

    Args:
        group: The group; keys of others (`name`, what schedulers keep) are let be.
        where: What errors put before a setting's name.

    Raises:
        ValueError: Names the setting.
    """
    missing = [name for name in (*_OWN, "base_lr", "num_steps") if name not in group]
    if missing:
        raise ValueError(
            f"{where}lacks {missing}; it is not that of a KFACOptimizer of this version."
        )
    strange = [name for name in _OF_ALL_GROUPS if name in group]
    strange += [name for name in _UNSUPPORTED_FLAGS if group.get(name)]
    if strange:
        raise ValueError(
            f"{where}{', '.join(strange)} cannot be set for a group; groups may set {_OWN}."
        )
    for name in ("lr", "base_lr", "weight_decay", "fallback_lr"):
        if name != "fallback_lr" or group[name] is not None:
            check_range(f"{where}{name}", as_number(group[name]), 0)
    check_range(f"{where}momentum", as_number(group["momentum"]), 0, 1, upper_open=True)
    check_range(f"{where}damping", as_number(group["damping"]), 0, lower_open=True)
    check_flag(f"{where}nesterov", group["nesterov"])
    check_flag(f"{where}maximize", group["maximize"])
    if group["foreach"] is not None:
        check_flag(f"{where}foreach", group["foreach"])
    steps = group["num_steps"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"{where}num_steps must be an integer of at least 0, got {steps!r}.")
