"""What is measured with which settings, from a call's arguments or an optimizer; no curvature."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from kfacopt.argument_checks import (
    check_count,
    check_evaluation,
    check_integer,
    check_loss,
    check_range,
)
from kfacopt.diagnosis.candidates import Options
from kfacopt.kfac.layers import Kinds, default_kinds
from kfacopt.likelihoods import has_likelihood, likelihood_of
from kfacopt.optim.inspection import Inspection, inspect
from kfacopt.optim.kfac import KFACOptimizer
from kfacopt.optim.settings import DEFAULTS, WHOLE_SETTINGS, as_number

# Data are taken until a forward pass of them takes about so many multiplications.
MOST_OPERATIONS = 2 * 10**9
MOST_DATA = 1024
# Up to so many entries of a datum's predictions, K-FAC's Fisher is "type-2"; else labels are drawn.
TYPE_2, LABELS = 32, 8
WIDEST_DENSE = 8192  # the optimizer's default


@dataclass(frozen=True)
class Plan:
    """How K-FAC is set.

    Attributes:
        kinds: The kinds of modules that are layers.
        allowed: The parameters of the optimizer, if there is one.
        damping: δ by parameter.
        separate: Whether W and b have blocks of their own.
        fisher_type: `"empirical"` if the optimizer's is; else it follows from the predictions.
        inspection: What the optimizer has.
        shown: What the report says of the settings.
        reduction: `"mean"`, `"sum"` or, if the loss does not say, `None`.
    """

    kinds: Kinds
    allowed: Collection[Parameter] | None
    damping: Mapping[Parameter, float]
    separate: bool
    fisher_type: str | None
    inspection: Inspection | None
    shown: dict[str, Any]
    reduction: str | None

    def options(self, outputs: int, seed: int, batch_size_fn: Any) -> Options:
        """Return how factors are formed, for predictions of so many entries for a datum."""
        fisher = self.fisher_type or ("type-2" if outputs <= TYPE_2 else "mc")
        widest, conv_factor, wide_factor = WIDEST_DENSE, "auto", "auto"
        if self.inspection is not None:
            settings = self.inspection.settings
            widest = settings.curvature.form.max_factor_dim or widest
            conv_factor, wide_factor = settings.conv_factor, settings.wide_factor
        operator = {
            "fisher_type": fisher,
            "mc_samples": LABELS if fisher == "mc" else 1,
            "seed": seed,
            "loss_average": "batch" if self.reduction == "mean" else None,
            "separate_weight_and_bias": self.separate,
            "check_deterministic": False,
            "batch_size_fn": batch_size_fn,
            "max_factor_dim": widest,
            "conv_factor": conv_factor,
            "wide_factor": wide_factor,
        }
        return Options(self.shown["kfac_approx"], self.shown["damping_method"], operator)


def check_arguments(
    model: Any, loss_func: Any, data: Any, optimizer: Any, numbers: Mapping[str, Any]
) -> None:
    """Raise a `ValueError` that names the argument; see `kfacopt.diagnose`."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
    check_loss(loss_func)
    check_evaluation(data, numbers["progressbar"], False, numbers["batch_size_fn"])
    if optimizer is not None and not isinstance(optimizer, KFACOptimizer):
        raise ValueError(
            f"optimizer must be a KFACOptimizer or None, got {type(optimizer).__name__}."
        )
    if numbers["damping"] is not None:
        check_range("damping", numbers["damping"], 0, lower_open=True)
    check_count("max_batches", numbers["max_batches"])
    if numbers["max_data"] is not None:
        check_count("max_data", numbers["max_data"])
    check_range("max_seconds", numbers["max_seconds"], 0, lower_open=True)
    check_integer("seed", numbers["seed"])
    layers = numbers["layers"]
    if layers is not None and optimizer is not None:
        raise ValueError("layers must be None with an optimizer, whose own layers are looked at.")
    WHOLE_SETTINGS["layers"]("layers", layers)
    _check_parameters(model, optimizer)


def _check_parameters(model: nn.Module, optimizer: KFACOptimizer | None) -> None:
    trained = {p for p in model.parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model: it has no parameters that require gradients.")
    dtypes = {p.dtype for p in trained} - {torch.float32, torch.float64}
    if dtypes:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"model: its parameters must be in float32 or float64, got {found}. Call "
            "model.float(), which keeps the parameters, so that the optimizer still fits, give the "
            "data in float32, too, and go back by model.to(dtype) afterwards: no value changes."
        )
    own = [] if optimizer is None else [p for g in optimizer.param_groups for p in g["params"]]
    if optimizer is not None and not trained & set(own):
        raise ValueError("optimizer: it has none of the parameters that model trains.")


def make_plan(
    model: nn.Module,
    loss_func: Any,
    optimizer: KFACOptimizer | None,
    damping: float | None,
    layers: Iterable[type[nn.Module]] | None,
) -> Plan:
    """Return how K-FAC is set; the arguments are checked already."""
    likely = has_likelihood(loss_func)
    said = likelihood_of(loss_func).reduction if likely else getattr(loss_func, "reduction", None)
    reduction = said if said in ("mean", "sum") else None
    if optimizer is None:
        delta = DEFAULTS["fixed"].damping if damping is None else damping
        kinds = default_kinds() if layers is None else tuple(layers)
        shown: dict[str, Any] = {"kfac_approx": "expand", "damping_method": "factored"}
        by_parameter = dict.fromkeys(model.parameters(), delta)
        return Plan(kinds, None, by_parameter, False, None, None, shown, reduction)
    seen = inspect(optimizer)
    settings = seen.settings
    shown = {
        "lr": "auto" if settings.steps.tuned else float(as_number(optimizer.param_groups[0]["lr"])),
        "kfac_approx": settings.curvature.form.kfac_approx,
        "damping_method": settings.inverse.method,
        "preconditioner": settings.inverse.preconditioner,
        "ema_decay": settings.schedule.ema_decay,
        "factor_update_interval": settings.schedule.factor_update_interval,
        "inverse_update_interval": settings.schedule.inverse_update_interval,
        "num_steps": seen.num_steps,
    }
    chosen = seen.damping if damping is None else dict.fromkeys(seen.damping, damping)
    kind = settings.curvature.fisher_type
    empirical = kind if kind == "empirical" else None
    separate = settings.separate_weight_and_bias
    return Plan(seen.kinds, set(seen.damping), chosen, separate, empirical, seen, shown, reduction)


@contextmanager
def evaluation_mode(model: nn.Module, loss_func: Any) -> Iterator[tuple[str, ...]]:
    """Put model and loss into evaluation mode for a while.

    Yields:
        What that changes of what they compute: where a module was in training mode that has one of
        its own (dropout, batch norm, recurrent layers with dropout).
    """
    owners = [m for m in (model, loss_func) if isinstance(m, nn.Module)]
    modules = [m for owner in owners for m in owner.modules()]
    before = [m.training for m in modules]
    differs = [_changed(m) for m, t in zip(modules, before, strict=True) if t]
    for m in modules:
        m.training = False
    try:
        yield tuple(dict.fromkeys(filter(None, differs)))
    finally:
        for m, training in zip(modules, before, strict=True):
            m.training = training


def _changed(module: nn.Module) -> str:
    """Return what evaluation mode changes of a module in training mode; `""` for nothing."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        running = module.running_mean is not None
        return "with running statistics of normalisations" if running else ""
    dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    drops = module.p if dropout else getattr(module, "dropout", 0.0)
    return "without dropout" if isinstance(drops, float | int) and drops > 0 else ""
