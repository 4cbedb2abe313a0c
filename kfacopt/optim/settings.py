"""What `KFACOptimizer` can be set to: one table, its checks, one object a concern; no tensors.

Nothing here is about tensors that are trained; defaults that are numbers in the constructor's
signature stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfacopt.argument_checks import (
    check_choice,
    check_count,
    check_flag,
    check_integer,
    check_loss,
    check_range,
)
from kfacopt.kfac.factors import FactorForm
from kfacopt.kfac.layers import (
    CONV_FACTORS,
    KFAC_APPROXES,
    ConvFactor,
    Kinds,
    all_kinds,
    described,
)
from kfacopt.likelihoods import FISHER_TYPES, FisherType, Likelihood, likelihood_of
from kfacopt.linalg.kronecker import DAMPING_METHODS, DampingMethod

PreconditionerKind = Literal["kfac", "ekfac"]
PRECONDITIONERS: tuple[PreconditionerKind, ...] = ("kfac", "ekfac")

Check = Callable[[str, Any], None]
Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class CurvatureSettings:
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


@dataclass(frozen=True)
class InverseForm:
    """How damped inverses are formed.

    Attributes:
        preconditioner: `"kfac"`, or `"ekfac"`: eigenbases and second moments in them.
        method: K-FAC's damping, `"factored"` or `"exact"`; EKFAC's is always exact.
        stored_dtype: The dtype that inverses and bases are kept in; `None` is the factors'.
    """

    preconditioner: PreconditionerKind
    method: DampingMethod
    stored_dtype: torch.dtype | None = None

    @property
    def corrected(self) -> bool:
        """Whether eigenvalues are second moments of gradients."""
        return self.preconditioner == "ekfac"


@dataclass(frozen=True)
class Schedule:
    """When factors and inverses are renewed, and how fast averages forget; see `KFACOptimizer`."""

    ema_decay: float
    factor_update_interval: int
    inverse_update_interval: int

    def factors_due(self, step: int) -> bool:
        """Tell whether factors are updated in a step, counted from 0."""
        return step % self.factor_update_interval == 0

    def inverses_due(self, step: int) -> bool:
        """Tell whether inverses are updated in a step, counted from 0."""
        return step % self.inverse_update_interval == 0


@dataclass(frozen=True)
class StepSettings:
    """How long steps are.

    Attributes:
        tuned: Whether steps tune themselves, `lr="auto"`.
        kl_clip: κ; `None` does not clip.
        vector_lr: AdamW's rate of vectors, embeddings and recurrent modules.
    """

    tuned: bool
    kl_clip: float | None
    vector_lr: float


@dataclass(frozen=True)
class Settings:
    """All that is the same for all parameter groups; see `KFACOptimizer`."""

    curvature: CurvatureSettings
    inverse: InverseForm
    schedule: Schedule
    steps: StepSettings
    separate_weight_and_bias: bool
    layers: Kinds | None
    conv_factor: ConvFactor
    seed: int


@dataclass(frozen=True)
class Defaults:
    """Settings that suit mini-batches with a given learning rate, or full batches without one."""

    damping: float
    ema_decay: float
    factor_update_interval: int
    inverse_update_interval: int
    fallback_lr: float  # of vectors, embeddings and recurrent modules


# "fixed", with the numbers in the signature of `KFACOptimizer`, is the best of the settings in
# benchmarks/defaults.py (r1), but for `fallback_lr`: other matrices and positions get 1e-3 instead.
DEFAULTS = {"fixed": Defaults(5e-4, 0.9, 10, 50, 0.015), "auto": Defaults(1e-3, 0.8, 1, 5, 1e-3)}


# Checks -------------------------------------------------------------------------------------------


def _or_none(check: Check) -> Check:
    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def _number(*bounds: float, **options: Any) -> Check:
    return lambda name, value: check_range(name, as_number(value), *bounds, **options)


_KEPT_DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)


def _check_kinds(name: str, kinds: Any) -> None:
    known = all_kinds()
    if not isinstance(kinds, list | tuple | set | frozenset):
        raise ValueError(f"{name} must be None or a list of classes of modules, got {kinds!r}.")
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, known)):
            raise ValueError(
                f"{name} must be None or classes of modules that K-FAC knows, got {kind!r}; it "
                f"knows {described(known)}, and what register_layer is told of."
            )


def _check_model(name: str, model: Any) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"{name} must be an nn.Module or None, got {type(model).__name__}.")


def _check_unsupported(name: str, value: Any, reason: str) -> None:
    check_flag(name, value)
    if value:
        raise ValueError(f"{name} must be False, got True: {reason}.")


# The one table of settings: what a group may set, and what belongs to the whole optimizer, with
# what each must be. The constructor, groups, `load_state_dict` and the docs follow it.
GROUP_SETTINGS: dict[str, Check] = {
    "lr": _number(0),
    "momentum": _number(0, 1, upper_open=True),
    "weight_decay": _number(0),
    "damping": _number(0, lower_open=True),
    "fallback_lr": _or_none(_number(0)),
    "nesterov": check_flag,
    "maximize": check_flag,
    "foreach": _or_none(check_flag),
}
WHOLE_SETTINGS: dict[str, Check] = {
    "preconditioner": partial(check_choice, allowed=PRECONDITIONERS),
    "damping_method": partial(check_choice, allowed=DAMPING_METHODS),
    "factor_dtype": partial(check_choice, allowed=_KEPT_DTYPES),
    "inverse_dtype": partial(check_choice, allowed=_KEPT_DTYPES),
    "fisher_type": partial(check_choice, allowed=FISHER_TYPES),
    "kfac_approx": partial(check_choice, allowed=KFAC_APPROXES),
    "mc_samples": check_count,
    "ema_decay": partial(check_range, lower=0, upper=1, upper_open=True),
    "factor_batch_fraction": partial(check_range, lower=0, upper=1, lower_open=True),
    "factor_update_interval": check_count,
    "inverse_update_interval": check_count,
    "kl_clip": _or_none(partial(check_range, lower=0, lower_open=True)),
    "max_factor_dim": _or_none(check_count),
    "conv_factor": partial(check_choice, allowed=CONV_FACTORS),
    "separate_weight_and_bias": check_flag,
    "layers": _or_none(_check_kinds),
    "model": _check_model,
    "seed": check_integer,
    "loss_func": _or_none(lambda _, value: check_loss(value)),
    "capturable": partial(
        _check_unsupported,
        reason="inverses are checked on the host; capture forward and backward pass in a CUDA "
        "graph, and call step outside of it",
    ),
    "differentiable": partial(
        _check_unsupported,
        reason="a step is not differentiable; step with kfacopt.KFACLinearOperator's inverse on "
        "the gradient instead",
    ),
}
SETTINGS = (*GROUP_SETTINGS, *WHOLE_SETTINGS)

# Flags of torch.optim that a group may have, but not set.
_UNSUPPORTED_FLAGS = ("capturable", "differentiable", "fused")
_NUMBERS = ("lr", "momentum", "weight_decay", "damping", "fallback_lr")


def read_settings(given: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Check the constructor's arguments and sort them.

    Args:
        given: The arguments by name, `params` excepted.

    Returns:
        The settings of the whole optimizer, and the defaults of groups.

    Raises:
        ValueError: Names the argument.
    """
    values = dict(given)
    tuned = isinstance(values["lr"], str) and values["lr"] == "auto"
    defaults = DEFAULTS["auto" if tuned else "fixed"]
    for name in ("damping", "ema_decay", "factor_update_interval", "inverse_update_interval"):
        if values[name] is None:
            values[name] = getattr(defaults, name)
    kind = values["preconditioner"]
    if values["damping_method"] is None:
        values["damping_method"] = "factored" if kind == "kfac" else "exact"
    for name, check in WHOLE_SETTINGS.items():
        check(name, values[name])
    _check_together(values, tuned)
    loss_func = values["loss_func"]
    curvature = CurvatureSettings(
        values["fisher_type"],
        values["mc_samples"],
        FactorForm(values["kfac_approx"], values["max_factor_dim"], values["factor_dtype"]),
        None if loss_func is None else likelihood_of(loss_func),
        corrected=kind == "ekfac",
        recording=tuned,
        batch_fraction=values["factor_batch_fraction"],
    )
    intervals = (values["factor_update_interval"], values["inverse_update_interval"])
    settings = Settings(
        curvature,
        InverseForm(kind, values["damping_method"], values["inverse_dtype"]),
        Schedule(float(values["ema_decay"]), *intervals),
        StepSettings(tuned, values["kl_clip"], defaults.fallback_lr),
        values["separate_weight_and_bias"],
        None if values["layers"] is None else tuple(values["layers"]),
        values["conv_factor"],
        values["seed"],
    )
    if tuned:
        values["lr"] = 1.0
    return settings, {name: values[name] for name in GROUP_SETTINGS}


def _check_together(values: Mapping[str, Any], tuned: bool) -> None:
    """Raise where settings that are in their ranges contradict each other."""
    method, samples = values["damping_method"], values["mc_samples"]
    if values["preconditioner"] == "ekfac" and method != "exact":
        raise ValueError(
            'damping_method must be "exact" or None for preconditioner="ekfac", got '
            f'"{method}": there are no factors between which damping could be split.'
        )
    if values["fisher_type"] != "mc" and samples != 1:
        raise ValueError(f'mc_samples must be 1 unless fisher_type="mc", got {samples}.')
    if tuned and values["loss_func"] is not None:
        raise ValueError(
            'loss_func must be None for lr="auto", which evaluates the loss: compute it '
            "with one of torch's functions on the model's output, so that it is recognised."
        )


# Groups -------------------------------------------------------------------------------------------


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
    """Let settings be plain numbers for a while, also those that are tensors."""
    replaced = []
    for group in groups:
        for name in _NUMBERS:
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
    values = ([group.get(name) for name in GROUP_SETTINGS] for group in groups)
    # Tensors that are no numbers cannot be compared.
    return [tuple(str(x) if isinstance(x, Tensor) else x for x in own) for own in values]


def check_group(group: Mapping[str, Any], where: str = "", tuned: bool = False) -> None:
    """Raise unless a parameter group has all settings, each in its range.

    Args:
        group: The group; keys of others (`name`, what schedulers keep) are let be.
        where: What errors put before a setting's name.
        tuned: Whether steps tune themselves.

    Raises:
        ValueError: Names the setting.
    """
    missing = [name for name in (*GROUP_SETTINGS, "base_lr", "num_steps") if name not in group]
    if missing:
        raise ValueError(
            f"{where}lacks {missing}; it is not that of a KFACOptimizer of this version."
        )
    whole = [name for name in WHOLE_SETTINGS if name not in _UNSUPPORTED_FLAGS]
    strange = [name for name in whole if name in group]
    strange += [name for name in _UNSUPPORTED_FLAGS if group.get(name)]
    if strange:
        raise ValueError(
            f"{where}{', '.join(strange)} cannot be set for a group; groups may set "
            f"{tuple(GROUP_SETTINGS)}."
        )
    for name, check in (*GROUP_SETTINGS.items(), ("base_lr", GROUP_SETTINGS["lr"])):
        check(f"{where}{name}", group[name])
    steps = group["num_steps"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"{where}num_steps must be an integer of at least 0, got {steps!r}.")
    if tuned and group["maximize"]:
        raise ValueError('maximize must be False for lr="auto", which models the loss it sees.')
