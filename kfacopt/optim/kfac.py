"""The K-FAC optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from kfacopt.argument_checks import (
    check_choice,
    check_count,
    check_flag,
    check_integer,
    check_loss,
    check_range,
)
from kfacopt.kfac.factors import FactorForm
from kfacopt.kfac.layers import KFAC_APPROXES, KFACApprox, Layer
from kfacopt.likelihoods import FISHER_TYPES, FisherType, likelihood_of
from kfacopt.linalg.kronecker import DAMPING_METHODS, DampingMethod
from kfacopt.optim.distributed import mean_over_ranks
from kfacopt.optim.fallback import adamw_step, by_learning_rate
from kfacopt.optim.initial_state import is_initialisation
from kfacopt.optim.label_draws import LabelDraws
from kfacopt.optim.loss_scale import calling_loss_scale
from kfacopt.optim.messages import missing_statistics
from kfacopt.optim.moments import Moments
from kfacopt.optim.monitoring import Scalars, block_statistics
from kfacopt.optim.preconditioner import (
    PRECONDITIONERS,
    InverseForm,
    PreconditionerKind,
    has_inverse,
)
from kfacopt.optim.preconditioning import PreconditioningOptimizer
from kfacopt.optim.replay import ObjectiveTerm, undisturbed
from kfacopt.optim.self_tuning import ClosureLoss, SelfTuning
from kfacopt.optim.settings import (
    DEFAULTS,
    CurvatureOptions,
    Schedule,
    as_number,
    check_group,
    check_kept_dtype,
    numbers_alone,
    refuse_flags,
    settings_of,
)
from kfacopt.optim.step_rules import apply_step, are_finite, kl_clip_scale


def _detached(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor | float | int):
        raise ValueError(f'closure must return the loss for lr="auto", got {type(loss).__name__}.')
    return torch.as_tensor(loss, dtype=torch.float64).detach()


class KFACOptimizer(PreconditioningOptimizer):
    r"""Steps along F⁻¹ ∇L, with the Fisher/GGN F approximated by K-FAC.

        optimizer = KFACOptimizer(model.parameters())
        for X, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), y)
            loss.backward()
            optimizer.step()

    For every `nn.Linear` and `nn.Conv2d` layer with inputs a and output gradients g, F ≈ G ⊗ A (see
    `kfacopt.KFACLinearOperator`); with Ā and Ḡ their running averages and ∇ the layer's gradient,

        Δ = ν (Ḡ + √δ/π I)⁻¹ ∇ (Ā + π√δ I)⁻¹,    m ← μ m + lr Δ,    θ ← (1 − lr λ) θ − (lr Δ + μ m),

    with the damping δ, Nesterov's momentum μ, weight decay λ and ν = min(1, √(κ / (lr² Σ⟨Δ, ∇⟩)))
    of the unscaled Δ. All other parameters are trained by AdamW with `fallback_lr`.

    Which loss is minimised is seen from the calls of `cross_entropy`, `mse_loss`,
    `binary_cross_entropy_with_logits` and `nll_loss` (by their `nn` modules or functions) on the
    model's output, on views and functions of it, or inside the model. F is the Fisher of the
    objective on which `backward` is called: of `loss / k`, of a weighted sum of losses, of a sum
    divided by a number. Terms that are not recognised count by their gradient alone.

    Args:
        params: Parameters, named parameters or groups, as for any `torch.optim` optimizer. Groups
            may set `lr`, `momentum`, `nesterov`, `weight_decay`, `damping` and `fallback_lr`. A
            joint block [W | b] takes W's damping.
        lr: The learning rate, in units of a natural-gradient step: 1 is a full one; a number, or
            a tensor of one, as for AdamW (the other settings of groups, too). Where the clip
            is active (ν < 1) the step's length follows from κ alone, and a schedule acts where it
            falls below that: tune `kl_clip` first. `"auto"` chooses step size, momentum and damping
            in every step, for large or full batches: see `kfacopt.optim.self_tuning`. The groups'
            `lr` is then 1, and what schedulers make of it multiplies the steps; `momentum=0` leaves
            momentum out, `damping` is where the adaptation starts, `weight_decay` counts per step
            of size 1, and `kl_clip` is not used; AdamW's part is outside of what is undone. An
            objective with terms that are not recognised needs `step(closure)`.
        momentum: μ in [0, 1), on the preconditioned step.
        nesterov: Take Nesterov's step; `False` is θ ← (1 − lr λ) θ − m. Without momentum, and for
            `lr="auto"`, it has no effect.
        weight_decay: λ ≥ 0, decoupled.
        damping: δ > 0, in units of F; 5e-4, or 1e-3 (where it starts) for `lr="auto"`.
        preconditioner: `"kfac"` (above) or `"ekfac"`: Q_G ((Q_Gᵀ ∇ Q_A) / (Λ + δ)) Q_Aᵀ with Ḡ's
            and Ā's eigenbases Q and the running averages Λ of the second moments of single data's
            gradients in them (see `kfacopt.EKFACLinearOperator`). Λ is updated with the factors,
            the bases, by warm-started orthogonal iteration, with the inverses; a step that does
            so keeps its layers' inputs and output gradients until then. A datum is an entry of the
            leading axis of a layer's input (use `batch_first=True`).
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
            step counts by its number of terms. 0.9, or 0.8 for `lr="auto"`.
        factor_batch_fraction: The share, in (0, 1], of a batch's data that Ā, Ḡ and Λ are summed
            over, drawn anew for each backward pass; the estimates stay unbiased. It spares products
            of the factors, not the backward pass of `fisher_type="mc"`.
        factor_update_interval: Steps between updates of Ā and Ḡ. Between them hooks do nothing.
            10, or 1 for `lr="auto"`.
        inverse_update_interval: Steps between updates of the inverses. 50, or 5 for `lr="auto"`.
        kl_clip: κ > 0, about twice the KL divergence by which a step without momentum may move the
            model's predictions; steps are as long as √κ. `None` switches it off.
        separate_weight_and_bias: Give W and b blocks of their own instead of [W | b].
        max_factor_dim: A side of a layer wider than that gets a diagonal factor.
        factor_dtype: The dtype that Ā, Ḡ and Λ are kept in; `None` is the parameters', at least
            float32. Sums and decompositions are computed in at least float32.
        inverse_dtype: The dtype that inverses and bases are kept in; `None` is the factors', at
            least float32. They are multiplied in that, but at least float32.
        fallback_lr: AdamW's learning rate for all other parameters; it follows the ratio of the
            group's current to its initial `lr`. `None`: 0.015 for vectors and embeddings, and
            AdamW's usual 1e-3 for other tensors (of `nn.MultiheadAttention`, recurrent layers,
            positions), and for all with `lr="auto"`.
        loss_func: The loss at the model's output (an `nn` loss), where it is computed in a way
            that is not recognised; the curvature is then taken at the output of the outermost
            module. Its targets are unknown: no class weights, no ignored targets. A factor on it
            is not seen either; a mean is taken over all data since the last step.
        model: The module (or a module that contains all) whose parameters are trained. `None`
            searches the process, once, for the modules that own `params`.
        seed: Seeds the generator that draws labels; ranks under DDP draw labels of their own.
        maximize: Maximise the objective instead; groups may set it.
        foreach: `False` updates parameters one after the other, `True` with one call for each
            operation, `None` with fused ones where torch has them; groups may set it.
        capturable: Only `False`: inverses are checked on the host.
        differentiable: Only `False`.

    A step whose gradients have NaN or infinite entries is skipped as a whole, as a `GradScaler`
    would: it changes neither parameters nor state, is warned of once, and counted by
    `statistics`.

    Raises:
        ValueError: If an argument is out of its range, no module owns the parameters, or layers
            outside of `model` own some.
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

    Deviations from Martens & Grosse (2015): with a number for `lr`, fixed damping and the KL clip
    of Ba et al. (2017) instead of their sections 6 and 7 (for `lr="auto"` see
    `kfacopt.optim.self_tuning`); factored damping without the search for its best split; averages
    are bias-corrected.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Literal["auto"] = 0.07,
        *,
        momentum: float = 0.85,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        damping: float | None = None,
        preconditioner: PreconditionerKind = "kfac",
        damping_method: DampingMethod | None = None,
        fisher_type: FisherType = "mc",
        mc_samples: int = 1,
        kfac_approx: KFACApprox = "expand",
        ema_decay: float | None = None,
        factor_batch_fraction: float = 1.0,
        factor_update_interval: int | None = None,
        inverse_update_interval: int | None = None,
        kl_clip: float | None = 5e-5,
        separate_weight_and_bias: bool = False,
        max_factor_dim: int | None = 8192,
        factor_dtype: torch.dtype | None = None,
        inverse_dtype: torch.dtype | None = None,
        fallback_lr: float | None = None,
        loss_func: nn.Module | None = None,
        model: nn.Module | None = None,
        seed: int = 2147483647,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        listed = isinstance(params, Iterable) and not isinstance(params, nn.Module | Tensor)
        if not (listed or isinstance(params, nn.ParameterList)):
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
            check_kept_dtype(name, dtype)
        check_choice("fisher_type", fisher_type, FISHER_TYPES)
        check_choice("kfac_approx", kfac_approx, KFAC_APPROXES)
        check_count("mc_samples", mc_samples)
        if fisher_type != "mc" and mc_samples != 1:
            raise ValueError(f'mc_samples must be 1 unless fisher_type="mc", got {mc_samples}.')
        tuned = isinstance(lr, str) and lr == "auto"
        defaults = DEFAULTS["auto" if tuned else "fixed"]
        damping = defaults.damping if damping is None else damping
        ema_decay = defaults.ema_decay if ema_decay is None else ema_decay
        if factor_update_interval is None:
            factor_update_interval = defaults.factor_update_interval
        if inverse_update_interval is None:
            inverse_update_interval = defaults.inverse_update_interval
        check_range("ema_decay", ema_decay, 0, 1, upper_open=True)
        check_range("factor_batch_fraction", factor_batch_fraction, 0, 1, lower_open=True)
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
        refuse_flags(capturable=capturable, differentiable=differentiable)
        self._schedule = Schedule(
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
        if tuned:
            if loss_func is not None:
                raise ValueError(
                    'loss_func must be None for lr="auto", which evaluates the loss: compute it '
                    "with one of torch's functions on the model's output, so that it is recognised."
                )
            self._tuning, lr = SelfTuning(), 1.0
        self._curvature = CurvatureOptions(
            fisher_type,
            mc_samples,
            form,
            likelihood,
            corrected=preconditioner == "ekfac",
            recording=self._tuning is not None,
            batch_fraction=factor_batch_fraction,
        )
        self._seed = seed
        self._start_unconnected(model)
        group_defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
            "fallback_lr": fallback_lr,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, group_defaults)
        self._labels = LabelDraws(seed, self._device, self._ddp)
        self._connect()

    # Steps -------------------------------------------------------------------------------------

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
        with numbers_alone(self.param_groups):
            self._check_settings()
            if self._collector.collecting:
                self._refuse_other_parallelism()
            self._follow_moved_parameters()
            if not (self._has_no_gradients() or self._only_initialises()):
                if self._has_finite_gradients():
                    self._step(closure, result)
                self._collector.close_passes()
        return result

    def _step(self, closure: Callable[[], Any] | None, result: Any) -> None:
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
        if self._due(self._schedule.factor_update_interval):
            self._align_ranks()
        if self._labels_before is not None:  # layers that are new leave the others' labels alone
            self._labels.common.set_state(self._labels_before)
        new = self._reconnect_if_frozen()
        for group in self.param_groups:
            group["num_steps"] += 1
        due = self._due(self._schedule.factor_update_interval)
        self._watch(due or new or self._waiting)

    def _check_settings(self) -> None:
        """Raise where a group has a setting by now that it could not have been made with."""
        settings = settings_of(self.param_groups)
        if settings != self._checked_settings:
            for i, group in enumerate(self.param_groups):
                check_group(group, f"param_groups[{i}]: ")
            self._checked_settings = settings

    def _has_no_gradients(self) -> bool:
        """Tell whether there is nothing to step along: as for AdamW, that is no step then."""
        if any(p.grad is not None for p in self._parameters()):
            return False
        self._collector.clear(forward_is_over=False)
        self._reconnect_if_frozen()
        return True

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
        self._warn(
            "skipped",
            f"the step is skipped: gradients have NaN or infinite entries ({', '.join(names)}). "
            "statistics()['skipped_steps'] counts such steps.",
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
        damping = {
            p: as_number(group["damping"]) for group in self.param_groups for p in group["params"]
        }
        for block in self._blocks:
            alone = len(block.layer.blocks) == 1
            name = block.layer.name if alone else self._names[id(block.anchor)]
            steps = self.param_groups[0]["num_steps"]
            values = block_statistics(self.state, block, damping[block.anchor], steps)
            result |= {f"{name}/{key}": value for key, value in values.items()}
        return result

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
            over_ranks = partial(mean_over_ranks, group=self._data_parallel_group())
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
            grads, lrs = [gradients[p] for p in directions], [lr[p] for p in directions]
            values = list(directions.values())
            self._kl_clip_scale = kl_clip_scale(grads, values, lrs, self._schedule.kl_clip)
        scale, factors = self._kl_clip_scale, {}
        for p, d in directions.items():
            key = (lr[p], d.device)
            if key not in factors:
                factors[key] = lr[p] if scale is None else lr[p] * scale.to(d.device)
            d.mul_(factors[key])
        for group in self.param_groups:
            own = [p for p in group["params"] if p in directions]
            if own:
                momentum = group["momentum"]
                buffers = [self._momentum_buffer(p) for p in own] if momentum else []
                apply_step(
                    own,
                    [directions[p] for p in own],
                    buffers,
                    momentum=momentum,
                    nesterov=group["nesterov"],
                    decay=group["lr"] * group["weight_decay"],
                    foreach=group["foreach"],
                )
        self._update_fallback(directions)

    @property
    def _vector_lr(self) -> float:
        return DEFAULTS["fixed" if self._tuning is None else "auto"].fallback_lr

    def _update_fallback(self, directions: dict[Parameter, Tensor]) -> None:
        self._num_fallback = 0
        for group in self.param_groups:
            rest = [p for p in group["params"] if p.grad is not None and p not in directions]
            self._num_fallback += len(rest)
            given = (group["fallback_lr"], self._embeddings, self._vector_lr)
            for lr, own in by_learning_rate(rest, *given).items():
                adamw_step(own, self.state, group, lr)

    def _momentum_buffer(self, p: Parameter) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer
