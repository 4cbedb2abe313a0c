"""The settings of `KFACOptimizer` that are the same for all parameter groups, and their checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kfacopt.argument_checks import check_flag
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


DEFAULTS = {"fixed": Defaults(0.03, 0.95, 5, 10), "auto": Defaults(1e-3, 0.8, 1, 5)}


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
