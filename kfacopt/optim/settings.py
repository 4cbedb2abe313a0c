"""What `KFACOptimizer` can be set to: one table, its checks, one object a concern; no tensors.

Nothing here is about tensors that are trained; defaults that are numbers in the constructor's
signature stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from kfacopt.kfac.factor_forms import FactorForm
from kfacopt.kfac.layers import (
    CONV_FACTORS,
    ENTRYWISE,
    KFAC_APPROXES,
    WIDE_FACTORS,
    ConvFactor,
    Kinds,
    WideFactor,
    all_kinds,
    described,
)
from kfacopt.likelihoods import FISHER_TYPES, FisherType, Likelihood, likelihood_of
from kfacopt.linalg.kronecker import DAMPING_METHODS, DampingMethod

PreconditionerKind = Literal["kfac", "ekfac"]
PRECONDITIONERS: tuple[PreconditionerKind, ...] = ("kfac", "ekfac")

# Steps between updates of factors, and of inverses, where a loss's curvature is looked for: on
# fourteen of eighteen small networks the objective was lower after the same time (docs/losses.md).
SEARCHED_INTERVALS = (30, 60)

# Steps at which factors are updated besides at first, where curvature is looked for.
FIRST_STEPS = (1, 2, 5, 10, 20)

# Steps between measurements of steps, at most where factors are updated so often: one costs three
# forward passes.
MEASUREMENT_INTERVAL = 40

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
    """When factors and inverses are renewed, and how fast averages forget; see `KFACOptimizer`.

    Attributes:
        ema_decay: The decay of earlier statistics.
        known: Steps between updates of the factors, and of the inverses.
        searched: The same where the loss is not known by its call, so that its curvature has to be
            looked for in each update.
        starts: Whether there are more updates at first, when a network changes fast: of inverses
            with each update of the factors until their interval is over, and where curvature is
            looked for, of factors at `FIRST_STEPS`.
        is_searched: Whether curvature is looked for now.
    """

    ema_decay: float
    known: tuple[int, int]
    searched: tuple[int, int]
    starts: bool = False
    is_searched: bool = False

    @property
    def factor_update_interval(self) -> int:
        """Steps between updates of the factors."""
        return (self.searched if self.is_searched else self.known)[0]

    @property
    def inverse_update_interval(self) -> int:
        """Steps between updates of the inverses."""
        return (self.searched if self.is_searched else self.known)[1]

    def factors_due(self, step: int) -> bool:
        """Tell whether factors are updated in a step, counted from 0."""
        early = self.starts and self.is_searched and step in FIRST_STEPS
        return early or step % self.factor_update_interval == 0

    def inverses_due(self, step: int) -> bool:
        """Tell whether inverses are updated in a step, counted from 0."""
        early = self.starts and step < self.inverse_update_interval and self.factors_due(step)
        return early or step % self.inverse_update_interval == 0

    def measurement_due(self, step: int) -> bool:
        """Tell whether a step is measured: where factors are updated, and not too often."""
        updates = max(1, MEASUREMENT_INTERVAL // self.factor_update_interval)
        return step % (updates * self.factor_update_interval) == 0


@dataclass(frozen=True)
class StepSettings:
    """How long steps are.

    Attributes:
        tuned: Whether steps tune themselves, `lr="auto"`.
        kl_clip: κ; `None` does not clip, `"auto"` follows the data.
        vector_lr: AdamW's rate of vectors, embeddings and recurrent modules.
        measured: Whether steps are measured by evaluating the loss again.
    """

    tuned: bool
    kl_clip: float | Literal["auto"] | None
    vector_lr: float
    measured: bool


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
    wide_factor: WideFactor
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
DEFAULTS = {
    "fixed": Defaults(1e-3, 0.9, 10, 50, 0.015),
    "auto": Defaults(1e-3, 0.8, 1, 5, 1e-3),
}


# Checks -------------------------------------------------------------------------------------------


def _or_none(check: Check) -> Check:
    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def as_number(value: Any) -> Any:
    """Return the number in a tensor of one, as torch.optim takes for `lr`, or of NumPy's.

    Anything else is returned as it is.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item()
    if isinstance(value, Real) and not isinstance(value, int | float):
        return float(value)
    return value


def _number(*bounds: float, **options: Any) -> Check:
    return lambda name, value: check_range(name, as_number(value), *bounds, **options)


_KEPT_DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)


def _check_kinds(name: str, kinds: Any) -> None:
    known = (*all_kinds(), *ENTRYWISE)
    if not isinstance(kinds, list | tuple | set | frozenset):
        raise ValueError(f"{name} must be None or a list of classes of modules, got {kinds!r}.")
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, known)):
            raise ValueError(
                f"{name} must be None or classes of modules that K-FAC knows, got {kind!r}; it "
                f"knows {described(known)}, and what register_layer is told of."
            )


def _check_kl_clip(name: str, value: Any) -> None:
    if isinstance(value, str) and value != "auto":
        raise ValueError(f'{name} must be "auto", None or a number greater than 0, got {value!r}.')
    if value is not None and value != "auto":
        check_range(name, value, 0, lower_open=True)


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
    "factor_update_interval": _or_none(check_count),
    "inverse_update_interval": _or_none(check_count),
    "kl_clip": _check_kl_clip,
    "max_factor_dim": _or_none(check_count),
    "conv_factor": partial(check_choice, allowed=CONV_FACTORS),
    "wide_factor": partial(check_choice, allowed=WIDE_FACTORS),
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
    for name in ("damping", "ema_decay"):
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
    measured = values["kl_clip"] == "auto" and not tuned and loss_func is None
    factors, inverses = values["factor_update_interval"], values["inverse_update_interval"]
    known = (defaults.factor_update_interval, defaults.inverse_update_interval)
    known, searched = (
        (factors or own[0], inverses or own[1])
        for own in (known, known if tuned else SEARCHED_INTERVALS)
    )
    settings = Settings(
        curvature,
        InverseForm(kind, values["damping_method"], values["inverse_dtype"]),
        Schedule(float(values["ema_decay"]), known, searched, not (tuned or factors or inverses)),
        StepSettings(tuned, values["kl_clip"], defaults.fallback_lr, measured),
        values["separate_weight_and_bias"],
        None if values["layers"] is None else tuple(values["layers"]),
        values["conv_factor"],
        "full" if values["damping_method"] == "exact" else values["wide_factor"],
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
    if method == "exact" and values["wide_factor"] == "low_rank":
        raise ValueError(
            'wide_factor must be "auto" or "full" where eigenbases are kept (damping_method='
            '"exact", preconditioner="ekfac"), got "low_rank": they are dense.'
        )
    if values["fisher_type"] != "mc" and samples != 1:
        raise ValueError(f'mc_samples must be 1 unless fisher_type="mc", got {samples}.')
    if tuned and values["loss_func"] is not None:
        raise ValueError(
            'loss_func must be None for lr="auto", which evaluates the loss: compute it '
            "with one of torch's functions on the model's output, so that it is recognised."
        )
