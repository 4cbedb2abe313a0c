"""The K-FAC optimizer."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from kfacopt.argument_checks import (
    check_choice,
    check_count,
    check_flag,
    check_integer,
    check_loss,
    check_range,
)
from kfacopt.kfac.factors import FactorForm, Factors
from kfacopt.kfac.layers import KFAC_APPROXES, Block, KFACApprox, Layer, find_layers
from kfacopt.likelihoods import FISHER_TYPES, FisherType, likelihood_of
from kfacopt.linalg.kronecker import DAMPING_METHODS, DampingMethod
from kfacopt.optim.distributed import (
    average_moments,
    average_second_moments,
    data_parallel_wrapper,
    group_of,
    mean_over_ranks,
)
from kfacopt.optim.fallback import adamw_step
from kfacopt.optim.initial_state import complete_state, is_initialisation, state_shapes
from kfacopt.optim.loss_scale import calling_loss_scale
from kfacopt.optim.messages import (
    log_layers,
    log_new_layer,
    missing_statistics,
    uncompiled_cause,
    user_stacklevel,
)
from kfacopt.optim.model_search import find_modules, parameter_names
from kfacopt.optim.monitoring import Scalars, block_statistics
from kfacopt.optim.preconditioner import (
    PRECONDITIONERS,
    InverseForm,
    PreconditionerKind,
    bases_of,
    discard_unfitting,
    fold_factors,
    fold_second_moments,
    has_inverse,
    inverse_of,
    precondition,
    refresh_inverse,
)
from kfacopt.optim.replay import ObjectiveTerm, undisturbed
from kfacopt.optim.self_tuning import ClosureLoss, SelfTuning
from kfacopt.optim.serialization import (
    check_state_dict,
    follow_parameters,
    restore_dtypes,
    restore_generator,
    store_generator,
)
from kfacopt.optim.statistics import CurvatureOptions, Moments, StatisticsCollector
from kfacopt.optim.step_rules import apply_step, are_finite, kl_clip_scale


class KFACWarning(UserWarning):
    """Something works otherwise than a reader of the training script would expect."""


@dataclass(frozen=True)
class _Schedule:
    """Settings that are the same for all parameter groups; see `KFACOptimizer`."""

    inverse: InverseForm
    ema_decay: float
    factor_update_interval: int
    inverse_update_interval: int
    kl_clip: float | None
    separate_weight_and_bias: bool


def _detached(loss: Any) -> Tensor:
    return torch.as_tensor(loss, dtype=torch.float64).detach()


@dataclass(frozen=True)
class _Defaults:
    """Settings that suit mini-batches with a given learning rate, or full batches without one."""

    damping: float
    ema_decay: float
    factor_update_interval: int
    inverse_update_interval: int


DEFAULTS = {"fixed": _Defaults(0.03, 0.95, 5, 10), "auto": _Defaults(1e-3, 0.8, 1, 5)}


def _check_kept_dtype(name: str, dtype: torch.dtype | None) -> None:
    allowed = (None, torch.bfloat16, torch.float32, torch.float64)
    if dtype not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {dtype!r}.")


def _refuse_flags(**flags: bool) -> None:
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


class KFACOptimizer(Optimizer):
    r"""Steps along F⁻¹ ∇L, with the Fisher/GGN F approximated by K-FAC.

        optimizer = KFACOptimizer(model.parameters())
        for X, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), y)
            loss.backward()
            optimizer.step()

    For every `nn.Linear` and `nn.Conv2d` layer with inputs a and output gradients g, F ≈ G ⊗ A (see
    `kfacopt.KFACLinearOperator`); with Ā and Ḡ their running averages and ∇ the layer's gradient,

        Δ = (Ḡ + √δ/π I)⁻¹ ∇ (Ā + π√δ I)⁻¹,    m ← μ m + ν Δ,    θ ← (1 − lr λ) θ − lr m,

    with the damping δ, momentum μ, weight decay λ and ν = min(1, √(κ / (lr² Σ⟨Δ, ∇⟩))). All other
    parameters are trained by AdamW with `fallback_lr`.

    Which loss is minimised is seen from the calls of `cross_entropy`, `mse_loss`,
    `binary_cross_entropy_with_logits` and `nll_loss` (by their `nn` modules or functions) on the
    model's output, on views and functions of it, or inside the model. F is the Fisher of the
    objective on which `backward` is called: of `loss / k`, of a weighted sum of losses, of a sum
    divided by a number. Terms that are not recognised count by their gradient alone.

    Args:
        params: Parameters, named parameters or groups, as for any `torch.optim` optimizer. Groups
            may set `lr`, `momentum`, `weight_decay`, `damping` and `fallback_lr`. A joint block
            [W | b] takes W's damping.
        lr: The learning rate, in units of a natural-gradient step: 1 is a full one. `"auto"`
            chooses step size, momentum and damping in every step, for large or full batches:
            see `kfacopt.optim.self_tuning`. The groups' `lr` is then 1, and what schedulers make of
            it multiplies the steps; `momentum=0` leaves momentum out, `damping` is where the
            adaptation starts, and `kl_clip` is not used.
        momentum: μ in [0, 1), on the preconditioned step.
        weight_decay: λ ≥ 0, decoupled.
        damping: δ > 0, in units of F; 0.03, or 1e-3 (where it starts) for `lr="auto"`.
        preconditioner: `"kfac"` (above) or `"ekfac"`: Q_G ((Q_Gᵀ ∇ Q_A) / (Λ + δ)) Q_Aᵀ with Ḡ's
            and Ā's eigenbases Q and the running averages Λ of the second moments of single data's
            gradients in them (see `kfacopt.EKFACLinearOperator`). Λ is updated with the factors,
            the bases, by warm-started orthogonal iteration, with the inverses.
        damping_method: For K-FAC, `"factored"` (above; Cholesky; the default) or `"exact"`:
            (Ḡ ⊗ Ā + δI)⁻¹ (eigenbases). EKFAC's is always `"exact"`.
        fisher_type: `"mc"`: labels drawn from the model, one extra backward pass through the
            layers' outputs (no weight gradients) per sample; `"type-2"`: the loss's exact Hessian,
            one such pass for every entry of a datum's output (exact where rows of the output are
            independent data, else unbiased by random signs of the rows); `"empirical"`: the data's
            labels, no extra pass, not a Fisher.
        mc_samples: Labels drawn for each datum; 1 unless `fisher_type="mc"`.
        kfac_approx: `"expand"` or `"reduce"`, for layers with shared positions.
        ema_decay: The decay of Ā and Ḡ per update, in [0, 1); the averages are free of bias, and a
            step counts by its number of terms. 0.95, or 0.8 for `lr="auto"`.
        factor_update_interval: Steps between updates of Ā and Ḡ. Between them hooks do nothing.
            5, or 1 for `lr="auto"`.
        inverse_update_interval: Steps between updates of the inverses. 10, or 5 for `lr="auto"`.
        kl_clip: κ > 0; `None` switches it off.
        separate_weight_and_bias: Give W and b blocks of their own instead of [W | b].
        max_factor_dim: A side of a layer wider than that gets a diagonal factor.
        factor_dtype: The dtype that Ā, Ḡ and Λ are kept in; `None` is the parameters', at least
            float32. Sums and decompositions are computed in at least float32.
        inverse_dtype: The dtype that inverses and bases are kept in; `None` is the factors', at
            least float32. They are multiplied in that, but at least float32.
        fallback_lr: AdamW's learning rate for all other parameters; it follows the ratio of the
            group's current to its initial `lr`.
        loss_func: The loss at the model's output (an `nn` loss), where it is computed in a way
            that is not recognised; the curvature is then taken at the output of the outermost
            module. Its targets are unknown: no class weights, no ignored targets. A factor on it
            is not seen either; a mean is taken over all data since the last step.
        model: The module (or a module that contains all) whose parameters are trained. `None`
            searches the process, once, for the modules that own `params`.
        seed: Seeds the generator that draws labels.
        maximize: Maximise the objective instead; groups may set it.
        foreach: `False` updates parameters one after the other; groups may set it.
        capturable: Only `False`: inverses are checked on the host.
        differentiable: Only `False`.

    A step whose gradients have NaN or infinite entries is skipped as a whole, as a `GradScaler`
    would: it changes neither parameters nor state, is warned of once, and counted by `statistics`
    (with `lr="auto"` the step before it is undone).

    Raises:
        ValueError: If an argument is out of its range, or no module owns the parameters.
        RuntimeError: In `step`, if no loss was recognised.
        UnsupportedLossError: In `backward`, for an option of a known loss that is not supported.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn import functional as F
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> X = torch.rand(64, 2)
        >>> y = (X[:, :1] * X[:, 1:]).sin()
        >>> optimizer = KFACOptimizer(model.parameters())
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = F.mse_loss(model(X), y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(loss < 1e-3)
        True

    References:
        - Martens & Grosse (2015), https://arxiv.org/abs/1503.05671.
        - Eschenhagen et al. (2023), https://arxiv.org/abs/2311.00636.

    Deviations from Martens & Grosse (2015): fixed damping and learning rate with the KL clip of Ba
    et al. (2017) instead of their self-tuning rules (sections 6 and 7); factored damping without
    the search for its best split; averages are bias-corrected.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Literal["auto"] = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float | None = None,
        preconditioner: PreconditionerKind = "kfac",
        damping_method: DampingMethod | None = None,
        fisher_type: FisherType = "mc",
        mc_samples: int = 1,
        kfac_approx: KFACApprox = "expand",
        ema_decay: float | None = None,
        factor_update_interval: int | None = None,
        inverse_update_interval: int | None = None,
        kl_clip: float | None = 3e-4,
        separate_weight_and_bias: bool = False,
        max_factor_dim: int | None = 8192,
        factor_dtype: torch.dtype | None = None,
        inverse_dtype: torch.dtype | None = None,
        fallback_lr: float = 1e-3,
        loss_func: nn.Module | None = None,
        model: nn.Module | None = None,
        seed: int = 2147483647,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if isinstance(params, nn.Module | Tensor) or not isinstance(params, Iterable):
            raise ValueError(
                "params must be an iterable of parameters or groups, as model.parameters(), got "
                f"{type(params).__name__}."
            )
        check_choice("preconditioner", preconditioner, PRECONDITIONERS)
        if damping_method is None:
            damping_method = "factored" if preconditioner == "kfac" else "exact"
        check_choice("damping_method", damping_method, DAMPING_METHODS)
        if preconditioner == "ekfac" and damping_method != "exact":
            raise ValueError(
                'damping_method must be "exact" or None for preconditioner="ekfac", got '
                f'"{damping_method}": there are no factors between which damping could be split.'
            )
        for name, dtype in (("factor_dtype", factor_dtype), ("inverse_dtype", inverse_dtype)):
            _check_kept_dtype(name, dtype)
        check_choice("fisher_type", fisher_type, FISHER_TYPES)
        check_choice("kfac_approx", kfac_approx, KFAC_APPROXES)
        check_count("mc_samples", mc_samples)
        if fisher_type != "mc" and mc_samples != 1:
            raise ValueError(f'mc_samples must be 1 unless fisher_type="mc", got {mc_samples}.')
        defaults = DEFAULTS["auto" if lr == "auto" else "fixed"]
        damping = defaults.damping if damping is None else damping
        ema_decay = defaults.ema_decay if ema_decay is None else ema_decay
        if factor_update_interval is None:
            factor_update_interval = defaults.factor_update_interval
        if inverse_update_interval is None:
            inverse_update_interval = defaults.inverse_update_interval
        check_range("ema_decay", ema_decay, 0, 1, upper_open=True)
        check_count("factor_update_interval", factor_update_interval)
        check_count("inverse_update_interval", inverse_update_interval)
        if kl_clip is not None:
            check_range("kl_clip", kl_clip, 0, lower_open=True)
        if max_factor_dim is not None:
            check_count("max_factor_dim", max_factor_dim)
        check_flag("separate_weight_and_bias", separate_weight_and_bias)
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module or None, got {type(model).__name__}.")
        check_integer("seed", seed)
        _refuse_flags(capturable=capturable, differentiable=differentiable)
        self._schedule = _Schedule(
            InverseForm(preconditioner, damping_method, inverse_dtype),
            float(ema_decay),
            factor_update_interval,
            inverse_update_interval,
            kl_clip,
            separate_weight_and_bias,
        )
        if loss_func is not None:
            check_loss(loss_func)
        likelihood = None if loss_func is None else likelihood_of(loss_func)
        form = FactorForm(kfac_approx, max_factor_dim, factor_dtype)
        self._tuning: SelfTuning | None = None
        if lr == "auto":
            if loss_func is not None:
                raise ValueError(
                    'loss_func must be None for lr="auto", which evaluates the loss: compute it '
                    "with one of torch's functions on the model's output, so that it is recognised."
                )
            self._tuning, lr = SelfTuning(momentum > 0), 1.0
        self._curvature = CurvatureOptions(
            fisher_type,
            mc_samples,
            form,
            likelihood,
            corrected=preconditioner == "ekfac",
            recording=self._tuning is not None,
        )
        self._seed = seed
        self._start_unconnected(model)
        group_defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "fallback_lr": fallback_lr,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, group_defaults)
        self._generator = Generator(self._parameters()[0].device).manual_seed(seed)
        self._connect()

    def _start_unconnected(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._layers: list[Layer] = []
        self._blocks: list[Block] = []
        self._names: dict[int, str] = {}
        self._collector: StatisticsCollector
        self._placement: list[tuple[torch.dtype, torch.device]] = []
        self._warned: set[str] = set()
        self._skipped_steps = self._num_fallback = 0
        self._kl_clip_scale: Tensor | None = None
        self._labels_before: Tensor | None = None
        self._waiting = False
        self._ddp_known = False
        self._ddp_wrapper: weakref.ref[Any] | None = None
        self._ddp_group: Any = None

    # Groups and modules ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if any(is_lazy(p) for p in group["params"]):
            raise ValueError(
                "params: a parameter is not initialized yet (nn.Lazy...); run a forward pass of "
                "the model before making the optimizer."
            )
        if any(hasattr(p, "placements") for p in group["params"]):  # a DTensor
            raise ValueError(
                "params: a parameter is sharded (FSDP, DTensor), which KFACOptimizer does not "
                "support. Use nn.parallel.DistributedDataParallel."
            )
        check_range("lr", group["lr"], 0)
        check_range("momentum", group["momentum"], 0, 1, upper_open=True)
        check_range("weight_decay", group["weight_decay"], 0)
        check_range("damping", group["damping"], 0, lower_open=True)
        check_range("fallback_lr", group["fallback_lr"], 0)
        check_flag("maximize", group["maximize"])
        if group["maximize"] and self._tuning is not None:
            raise ValueError('maximize must be False for lr="auto", which models the loss it sees.')
        if group["foreach"] is not None:
            check_flag("foreach", group["foreach"])
        group.setdefault("base_lr", group["lr"])
        group.setdefault("num_steps", self.param_groups[0].get("num_steps", 0))
        if self._names:
            self._collector.active = False
            self._connect()

    def _reconnect_if_frozen(self) -> bool:
        """Find the layers anew where parameters were frozen or unfrozen since; tell of new ones."""
        if [p.requires_grad for p in self._parameters()] == self._trained:
            return False
        modules = self._collector.living_modules()
        self._collector.active = False
        self._connect(modules)
        return not all(self._has_statistics(layer) for layer in self._layers)

    def _follow_moved_parameters(self) -> None:
        """Convert the state where the model was moved to another dtype or device since."""
        params = self._parameters()
        if [(p.dtype, p.device) for p in params] == self._placement:
            return
        self._placement = [(p.dtype, p.device) for p in params]
        follow_parameters(self.state, self._curvature.form, self._schedule.inverse)
        if self._generator.device != params[0].device:
            self._generator = Generator(params[0].device).manual_seed(self._seed)
            self._collector.generator = self._generator

    def _parameters(self) -> list[Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _connect(self, modules: list[tuple[str, nn.Module]] | None = None) -> None:
        """Find the modules of the parameters and put hooks on them."""
        params = self._parameters()
        if modules is None:
            modules = find_modules(params, None if self._model is None else self._model())
        layers = find_layers(modules, params, self._schedule.separate_weight_and_bias)
        self._names = parameter_names(modules, params)
        self._trained = [p.requires_grad for p in params]
        self._placement = [(p.dtype, p.device) for p in params]
        self._layers = [layer for layer, _ in layers]
        self._blocks = [block for layer in self._layers for block in layer.blocks]
        for layer in self._layers:
            discard_unfitting(self.state, layer, self._curvature.form)
        self._collector = StatisticsCollector(layers, modules, self._curvature, self._generator)
        self._watch(True)
        covered = {id(p) for layer in self._layers for p in (layer.weight, layer.bias)}
        rest = [self._names[id(p)] for p in params if id(p) not in covered]
        log_layers(self._layers, rest, self._curvature.form)
        if not self._layers:
            self._warn(
                "no-layers",
                "none of the parameters is in a layer that K-FAC knows (nn.Linear, nn.Conv2d); "
                "all are trained by the AdamW fallback.",
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(
                f"KFACOptimizer: {message} (Shown once; silence it with "
                "warnings.simplefilter('ignore', kfacopt.KFACWarning).)",
                KFACWarning,
                stacklevel=user_stacklevel(),
            )

    # State -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state: per parameter tensors and numbers; see `torch.optim.Optimizer`.

        A run that is resumed from it between two steps goes on bit by bit as it would have.
        """
        self._complete_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; factors keep their own dtype.

        Args:
            state_dict: What `state_dict` returned, for the same parameters in the same order.

        Raises:
            ValueError: If it is not a KFACOptimizer's or does not fit the layers.
        """
        params = self._parameters()
        shapes = state_shapes(params, self._layers, self._curvature.form)
        check_state_dict(state_dict, [(self._names[id(p)], p) for p in params], shapes)
        super().load_state_dict(state_dict)
        restore_dtypes(self.state, self.param_groups, state_dict)
        self._resume()

    def _complete_state(self) -> None:
        forms = self._curvature.form, self._schedule.inverse
        tuned = self._tuning is not None
        complete_state(self.state, self._layers, self.param_groups, *forms, tuned)
        store_generator(self.state, self._layers, self._generator)

    def _resume(self) -> None:
        self._collector.clear()
        restore_generator(self.state, self._generator)
        new = not all(self._has_statistics(layer) for layer in self._layers)
        self._watch(new or self._due(self._schedule.factor_update_interval))

    def _watch(self, active: bool) -> None:
        """Put hooks on the modules or take them off, and tell the collector of the bases."""
        if active and self._schedule.inverse.corrected:
            bases = {b: bases_of(self.state.get(b.anchor, {})) for b in self._blocks}
            self._collector.bases = {b: known for b, known in bases.items() if known is not None}
        self._collector.collecting = active
        self._collector.active = active or self._tuning is not None
        due = self._due(self._schedule.factor_update_interval)
        self._labels_before = self._generator.get_state() if active and not due else None

    def _has_statistics(self, layer: Layer) -> bool:
        return bool(self.state.get(layer.anchor, {}).get("factor_updates", 0))

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles are made of, the modules included."""
        store_generator(self.state, self._layers, self._generator)
        own = {
            name: getattr(self, name) for name in ("_schedule", "_curvature", "_seed", "_tuning")
        }
        return super().__getstate__() | own | {"_modules": self._collector.living_modules()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy that works on copies of the modules."""
        modules = state.pop("_modules", None)
        if modules is None:  # Optimizer.load_state_dict comes here with state and groups alone
            super().__setstate__(state)
            return
        self._start_unconnected(None)
        super().__setstate__(state)
        self._generator = Generator(self._parameters()[0].device).manual_seed(self._seed)
        self._connect(modules)
        self._resume()

    # Steps -------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and with them the statistics that wait for the next step."""
        seen = self._collector.forward_seen  # forward, zero_grad, backward is a usual order, too
        if not seen:
            self._reconnect_if_frozen()
        self._collector.clear()
        self._collector.forward_seen = seen
        super().zero_grad(set_to_none)

    def _due(self, interval: int) -> bool:
        return bool(self.param_groups[0]["num_steps"] % interval == 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or `None`.

        Raises:
            RuntimeError: If there are gradients but no loss was recognised so far.
            DecompositionError: If a layer's factors cannot be inverted (repeatedly).
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._follow_moved_parameters()
        if self._only_initialises() or not self._has_finite_gradients():
            return result
        terms = self._collector.objective() if self._tuning is not None else []
        first: dict[Layer, Moments] = {}
        due, collecting = (
            self._due(self._schedule.factor_update_interval),
            self._collector.collecting,
        )
        # Layers that became new after the forward pass have to wait for the next one.
        self._waiting = collecting and not (due or self._collector.forward_seen)
        if collecting and not self._waiting:  # at an interval's start, and when layers are new
            first = self._update_factors()
        else:
            self._collector.clear()
        if self._due(self._schedule.inverse_update_interval):
            self._update_inverses(self._blocks)
        else:
            fresh = [b for b in self._blocks if not has_inverse(self.state[b.anchor])]
            self._update_inverses(b for b in fresh if self._has_statistics(b.layer))
        self._start_second_moments(first)
        if self._tuning is None:
            self._update_parameters()
        else:
            self._tuned_update(terms, closure, result)
        if self._labels_before is not None:  # layers that are new leave the others' labels alone
            self._generator.set_state(self._labels_before)
        new = self._reconnect_if_frozen()
        for group in self.param_groups:
            group["num_steps"] += 1
        due = self._due(self._schedule.factor_update_interval)
        self._watch(due or new or self._waiting)
        return result

    def _only_initialises(self) -> bool:
        """Make the state, and nothing else, in a step that checkpoint tools take for that."""
        if self.state or self._collector.forward_seen or not is_initialisation(self.param_groups):
            return False
        self._complete_state()
        return True

    def _has_finite_gradients(self) -> bool:
        """Tell whether the step can be made; else nothing of it may leave a trace."""
        grads = {p: p.grad for p in self._parameters() if p.grad is not None}
        for p, grad in grads.items():
            if grad.is_sparse:
                raise RuntimeError(f"{self._names[id(p)]}: sparse gradients are unsupported.")
        if are_finite(list(grads.values())):
            return True
        names = [self._names[id(p)] for p, grad in grads.items() if not bool(grad.isfinite().all())]
        self._skipped_steps += 1
        self._collector.clear()
        undone = ""
        if self._tuning is not None:
            undone = " and the one before it undone"
            self._tuning.undo_last_step(self.state, self.param_groups)
        self._warn(
            "skipped",
            f"the step is skipped{undone}: gradients have NaN or infinite entries "
            f"({', '.join(names)}). statistics()['skipped_steps'] counts such steps.",
        )
        return False

    def statistics(self) -> Scalars:
        """Return numbers for logging: plain floats, one for each name.

        `skipped_steps` (as gradients were not finite), `kl_clip_scale` (ν of the last step; 1
        without a clip), `fallback_parameters` (tensors that the last step gave to AdamW), and for
        every layer `<layer>/damping`, `condition`, `factor_age`, `inverse_age`,
        `skipped_factor_updates` and `inverse_failures`; see `block_statistics`. Where weight and
        bias have blocks of their own, `<parameter>/...` instead. It costs an eigendecomposition
        per inverse; a step costs nothing more for it. With `lr="auto"` the quantities of
        `TuningStatistics` are among them.

        Example:
            for name, value in optimizer.statistics().items():
                writer.add_scalar(name, value, step)  # TensorBoard; or wandb.log(the whole)
        """
        scale = self._kl_clip_scale
        result: Scalars = {
            "skipped_steps": float(self._skipped_steps),
            "kl_clip_scale": 1.0 if scale is None else float(scale),
            "fallback_parameters": float(self._num_fallback),
        }
        if self._tuning is not None:
            tuned = vars(self._tuning.statistics).items()
            result |= {name: math.nan if x is None else float(x) for name, x in tuned}
        damping = {p: group["damping"] for group in self.param_groups for p in group["params"]}
        for block in self._blocks:
            alone = len(block.layer.blocks) == 1
            name = block.layer.name if alone else self._names[id(block.anchor)]
            steps = self.param_groups[0]["num_steps"]
            values = block_statistics(self.state, block, damping[block.anchor], steps)
            result |= {f"{name}/{key}": value for key, value in values.items()}
        return result

    def factors(self, key: str | Parameter) -> Factors:
        """Return the running averages of a layer's Kronecker factors.

        Args:
            key: The layer's name, a parameter's name, or a parameter.

        Raises:
            KeyError: If there is no such layer, or no statistics of it yet.
        """
        owners = [layer for layer in self._layers if layer.owns(key, self._names)]
        if len(owners) > 1:
            raise KeyError(
                f"{key!r} names {len(owners)} layers of different models; give a parameter."
            )
        if owners and self._has_statistics(owners[0]):
            state = self.state[owners[0].anchor]
            return Factors.of(owners[0], state["input_factor"], state["grad_output_factor"])
        known = [layer.name for layer in self._layers]
        raise KeyError(f"{key!r}: no such layer or parameter, or no step yet; layers: {known}.")

    def _update_factors(self) -> dict[Layer, Moments]:
        """Fold the statistics since the last step; return what has no eigenbases yet."""
        if not self._ddp_known:
            self._ddp_wrapper, self._ddp_known = data_parallel_wrapper(self._parameters()), True
        wrapper = None if self._ddp_wrapper is None else self._ddp_wrapper()
        self._ddp_group = None if wrapper is None else group_of(wrapper)
        unknown_losses, forward_seen = self._collector.unknown_losses, self._collector.forward_seen
        ignored = self._collector.unknown_objectives
        pending = self._collector.finish()
        form = self._curvature.form
        if self._ddp_group is not None:
            pending = average_moments(pending, self._layers, form, self._ddp_group)
        if pending and ignored and self._curvature.likelihood is None:
            self._warn(
                "ignored-loss",
                f"the objective contains {', '.join(sorted(ignored))}, whose curvature is not "
                "known: it counts by its gradient alone.",
            )
        if not pending:
            self._report_missing_loss(forward_seen, unknown_losses)
        if not self._due(self._schedule.factor_update_interval):  # here for new layers alone
            pending = {la: m for la, m in pending.items() if not self._has_statistics(la)}
        self._report_uncompiled()
        loss_scale = calling_loss_scale() ** self._curvature.loss_scale_power
        for layer, moments in pending.items():
            state = self.state[layer.anchor]
            moments.scale_curvature(1 / loss_scale)
            step = self.param_groups[0]["num_steps"]
            fold_factors(state, layer, moments, form, self._schedule.ema_decay, step)
        if not self._schedule.inverse.corrected:
            return {}
        bases = self._collector.bases
        new = dict.fromkeys(b.layer for b in self._blocks if b not in bases)
        known = [block for block in self._blocks if block.layer not in new]
        self._update_second_moments(pending, known)
        return {layer: pending.get(layer, Moments()) for layer in new}

    def _start_second_moments(self, first: dict[Layer, Moments]) -> None:
        """Fold the second moments of layers whose bases were not known when they were collected."""
        blocks = [b for la in first for b in la.blocks if has_inverse(self.state[b.anchor])]
        for layer, moments in first.items():
            own = {b: bases_of(self.state[b.anchor]) for b in blocks if b.layer is layer}
            moments.project({b: known for b, known in own.items() if known is not None})
        self._update_second_moments(first, blocks)

    def _update_second_moments(self, pending: dict[Layer, Moments], blocks: list[Block]) -> None:
        values = {b: v for moments in pending.values() for b, v in moments.second_moments.items()}
        if self._ddp_group is not None:
            values = average_second_moments(values, blocks, self._ddp_group)
        for block in blocks:
            moments = pending.get(block.layer)
            if moments is not None and block in values:
                state, decay = self.state[block.anchor], self._schedule.ema_decay
                fold_second_moments(state, values[block], moments.terms, decay)

    def _report_uncompiled(self) -> None:
        kind = self._collector.uncompiled
        interval = 1 if self._tuning is not None else self._schedule.factor_update_interval
        cause = None if kind is None else uncompiled_cause(kind, interval)
        if cause is not None:
            self._warn("uncompiled", cause)

    def _report_missing_loss(self, forward_seen: bool, unknown_losses: set[str]) -> None:
        owned = [p for layer in self._layers for p in (layer.weight, layer.bias)]
        if not any(p is not None and p.grad is not None for p in owned):
            return
        cause = missing_statistics(forward_seen, unknown_losses)
        if any(self._has_statistics(layer) for layer in self._layers):
            self._warn("missing-loss", f"{cause} The step uses the curvature of earlier steps.")
        else:
            raise RuntimeError(f"KFACOptimizer: {cause}")

    def _update_inverses(self, blocks: Iterable[Block]) -> None:
        damping = {id(p): g["damping"] for g in self.param_groups for p in g["params"]}
        for block in blocks:
            layer_state, state = self.state[block.layer.anchor], self.state[block.anchor]
            form = self._schedule.inverse
            if refresh_inverse(state, layer_state, block, damping[id(block.anchor)], form):
                state["inverse_step"] = self.param_groups[0]["num_steps"]

    def _directions(self, gradients: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """Return the preconditioned gradients of the parameters in layers."""
        directions: dict[Parameter, Tensor] = {}
        damping = {p: group["damping"] for group in self.param_groups for p in group["params"]}
        for block in self._blocks:
            grads = [gradients.get(p) for p in block.parameters]
            if all(g is None for g in grads):
                continue
            inverse = inverse_of(self.state[block.anchor], damping[block.anchor])
            if inverse is None and self._waiting:
                log_new_layer(block.layer)
                continue
            if inverse is None:
                self._warn(
                    f"uncaptured {block.layer.name}",
                    f"layer {block.layer.name!r} has a gradient but no curvature was captured "
                    "(its forward pass runs outside the hooks, or the loss on it was not "
                    "recognised, or was not finite); it gets the AdamW fallback update.",
                )
                continue
            products = precondition(inverse, block, grads)
            with_grad = zip(block.parameters, products, strict=True)
            directions.update({p: d for p, d in with_grad if p in gradients})
        return directions

    def _tuned_update(
        self, terms: list[ObjectiveTerm], closure: Callable[[], Any] | None, loss: Any
    ) -> None:
        """Take a step whose size, momentum and damping follow from the quadratic model."""
        assert self._tuning is not None
        directions = self._directions(self._gradients())
        taken = True
        if directions:
            if not terms:
                raise RuntimeError(f"KFACOptimizer: {missing_statistics(True, set())}")
            over_ranks = partial(mean_over_ranks, group=self._ddp_group)
            again = None
            if closure is not None:
                value = float(over_ranks(_detached(loss)))
                again = ClosureLoss(value, self._reevaluation(terms, closure, over_ranks))
            settings = (calling_loss_scale(), over_ranks)
            groups = self.param_groups
            taken = self._tuning.step(self.state, groups, directions, terms, again, *settings)
        if taken:
            self._update_fallback(directions)

    def _reevaluation(
        self,
        terms: list[ObjectiveTerm],
        closure: Callable[[], Any],
        over_ranks: Callable[[Tensor], Tensor],
    ) -> Callable[[], float]:
        """Make a function that evaluates a closure again, and leaves the gradients alone."""

        def evaluate() -> float:
            grads = [(p, p.grad) for p in self._parameters()]
            for p, _ in grads:
                p.grad = None
            try:
                with undisturbed(terms), torch.enable_grad():
                    return float(over_ranks(_detached(closure())))
            finally:
                for p, grad in grads:
                    p.grad = grad

        return evaluate

    def _gradients(self) -> dict[Parameter, Tensor]:
        """Return what to descend along: the gradients, with their sign changed to maximise."""
        return {
            p: -p.grad if group["maximize"] else p.grad
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }

    def _update_parameters(self) -> None:
        gradients = self._gradients()
        directions = self._directions(gradients)
        lr = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        if directions and self._schedule.kl_clip is not None:
            grads = [gradients[p] for p in directions]
            lrs = [lr[p] for p in directions]
            values = list(directions.values())
            scale = kl_clip_scale(grads, values, lrs, self._schedule.kl_clip)
            self._kl_clip_scale = scale
            directions = {p: d * scale.to(d.device, d.dtype) for p, d in directions.items()}
        for group in self.param_groups:
            own = [p for p in group["params"] if p in directions]
            if own:
                momentum = group["momentum"]
                buffers = [self._momentum_buffer(p) for p in own] if momentum else []
                apply_step(
                    own,
                    [directions[p] for p in own],
                    buffers,
                    lr=group["lr"],
                    momentum=momentum,
                    weight_decay=group["weight_decay"],
                    foreach=group["foreach"] is not False,
                )
        self._update_fallback(directions)

    def _update_fallback(self, directions: dict[Parameter, Tensor]) -> None:
        self._num_fallback = 0
        for group in self.param_groups:
            rest = [p for p in group["params"] if p.grad is not None and p not in directions]
            self._num_fallback += len(rest)
            adamw_step(rest, self.state, group)

    def _momentum_buffer(self, p: Parameter) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer
