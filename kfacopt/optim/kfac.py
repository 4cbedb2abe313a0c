"""The K-FAC optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    data_parallel_group,
)
from kfacopt.optim.fallback import adamw_step
from kfacopt.optim.loss_scale import calling_loss_scale
from kfacopt.optim.messages import log_layers, missing_statistics
from kfacopt.optim.model_search import find_modules, parameter_names
from kfacopt.optim.preconditioner import (
    PRECONDITIONERS,
    InverseForm,
    PreconditionerKind,
    bases_of,
    discard_unfitting,
    factor_shapes,
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
    check_groups,
    check_shapes,
    restore_dtypes,
    restore_generator,
    store_generator,
)
from kfacopt.optim.statistics import CurvatureOptions, Moments, StatisticsCollector
from kfacopt.optim.step_rules import apply_step, kl_clip_scale


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


def _check_kept_dtype(name: str, dtype: torch.dtype | None) -> None:
    allowed = (None, torch.bfloat16, torch.float32, torch.float64)
    if dtype not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {dtype!r}.")


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

        Δ = (Ḡ + √δ/π I)⁻¹ ∇ (Ā + π√δ I)⁻¹,    m ← μ m + lr ν Δ,    θ ← (1 − lr λ) θ − m,

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
        damping: δ > 0, in units of F.
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
            step counts by its number of terms.
        factor_batch_fraction: The share, in (0, 1], of a batch's data that Ā, Ḡ and Λ are summed
            over, drawn anew for each backward pass; the estimates stay unbiased. It spares products
            of the factors, not the backward pass of `fisher_type="mc"`.
        factor_update_interval: Steps between updates of Ā and Ḡ. Between them hooks do nothing.
        inverse_update_interval: Steps between updates of the inverses.
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
        damping: float = 0.03,
        preconditioner: PreconditionerKind = "kfac",
        damping_method: DampingMethod | None = None,
        fisher_type: FisherType = "mc",
        mc_samples: int = 1,
        kfac_approx: KFACApprox = "expand",
        ema_decay: float = 0.95,
        factor_batch_fraction: float = 1.0,
        factor_update_interval: int = 5,
        inverse_update_interval: int = 10,
        kl_clip: float | None = 3e-4,
        separate_weight_and_bias: bool = False,
        max_factor_dim: int | None = 8192,
        factor_dtype: torch.dtype | None = None,
        inverse_dtype: torch.dtype | None = None,
        fallback_lr: float = 1e-3,
        loss_func: nn.Module | None = None,
        model: nn.Module | None = None,
        seed: int = 2147483647,
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
            batch_fraction=factor_batch_fraction,
        )
        self._seed = seed
        self._start_unconnected(model)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "fallback_lr": fallback_lr,
        }
        super().__init__(params, defaults)
        self._generator = Generator(self._parameters()[0].device).manual_seed(seed)
        self._connect()

    def _start_unconnected(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._layers: list[Layer] = []
        self._blocks: list[Block] = []
        self._names: dict[int, str] = {}
        self._warned: set[str] = set()
        self._ddp_known = False
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
        check_range("lr", group["lr"], 0)
        check_range("momentum", group["momentum"], 0, 1, upper_open=True)
        check_range("weight_decay", group["weight_decay"], 0)
        check_range("damping", group["damping"], 0, lower_open=True)
        check_range("fallback_lr", group["fallback_lr"], 0)
        group.setdefault("base_lr", group["lr"])
        group.setdefault("num_steps", self.param_groups[0].get("num_steps", 0))
        if self._names:
            self._collector.active = False
            self._connect()

    def _reconnect_if_frozen(self) -> None:
        """Find the layers anew where parameters were frozen or unfrozen since."""
        if [p.requires_grad for p in self._parameters()] != self._trained:
            modules = self._collector.living_modules()
            self._collector.active = False
            self._connect(modules)

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
                stacklevel=4,
            )

    # State -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state: per parameter tensors and numbers; see `torch.optim.Optimizer`.

        A run that is resumed from it between two steps goes on bit by bit as it would have.
        """
        store_generator(self.state, self._layers, self._generator)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; factors keep their own dtype.

        Args:
            state_dict: What `state_dict` returned, for the same parameters in the same order.

        Raises:
            ValueError: If it is not a KFACOptimizer's or does not fit the layers.
        """
        check_groups(state_dict)
        super().load_state_dict(state_dict)
        restore_dtypes(self.state, self.param_groups, state_dict)
        form = self._curvature.form
        check_shapes(self.state, [(la, factor_shapes(la, form)) for la in self._layers])
        self._resume()

    def _resume(self) -> None:
        restore_generator(self.state, self._generator)
        self._collector.clear()
        new = any("factor_weight" not in self.state[layer.anchor] for layer in self._layers)
        self._watch(new or self._due(self._schedule.factor_update_interval))

    def _watch(self, active: bool) -> None:
        """Put hooks on the modules or take them off, and tell the collector of the bases."""
        if active and self._schedule.inverse.corrected:
            bases = {block: bases_of(self.state[block.anchor]) for block in self._blocks}
            self._collector.bases = {b: known for b, known in bases.items() if known is not None}
        self._collector.collecting = active
        self._collector.active = active or self._tuning is not None

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
        self._reconnect_if_frozen()
        self._collector.clear()
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
        terms = self._collector.objective() if self._tuning is not None else []
        first: dict[Layer, Moments] = {}
        if self._collector.collecting:  # at an interval's start, and when layers are new
            first = self._update_factors()
        else:
            self._collector.clear()
        if self._due(self._schedule.inverse_update_interval):
            self._update_inverses(self._blocks)
        else:
            fresh = [b for b in self._blocks if not has_inverse(self.state[b.anchor])]
            self._update_inverses(fresh)
        self._start_second_moments(first)
        if self._tuning is None:
            self._update_parameters(self._directions())
        else:
            self._tuned_update(terms, closure, result)
        self._reconnect_if_frozen()
        for group in self.param_groups:
            group["num_steps"] += 1
        self._watch(self._due(self._schedule.factor_update_interval))
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
        if owners and "factor_weight" in self.state[owners[0].anchor]:
            state = self.state[owners[0].anchor]
            return Factors.of(owners[0], state["input_factor"], state["grad_output_factor"])
        known = [layer.name for layer in self._layers]
        raise KeyError(f"{key!r}: no such layer or parameter, or no step yet; layers: {known}.")

    def _update_factors(self) -> dict[Layer, Moments]:
        """Fold the statistics since the last step; return what has no eigenbases yet."""
        if not self._ddp_known:
            self._ddp_group, self._ddp_known = data_parallel_group(self._parameters()), True
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
        loss_scale = calling_loss_scale() ** self._curvature.loss_scale_power
        for layer, moments in pending.items():
            state = self.state[layer.anchor]
            moments.scale_curvature(1 / loss_scale)
            fold_factors(state, layer, moments, form, self._schedule.ema_decay)
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

    def _report_missing_loss(self, forward_seen: bool, unknown_losses: set[str]) -> None:
        owned = [p for layer in self._layers for p in (layer.weight, layer.bias)]
        if not any(p is not None and p.grad is not None for p in owned):
            return
        cause = missing_statistics(forward_seen, unknown_losses)
        if any("factor_weight" in self.state[layer.anchor] for layer in self._layers):
            self._warn("missing-loss", f"{cause} The step uses the curvature of earlier steps.")
        else:
            raise RuntimeError(f"KFACOptimizer: {cause}")

    def _update_inverses(self, blocks: Iterable[Block]) -> None:
        damping = {id(p): g["damping"] for g in self.param_groups for p in g["params"]}
        for block in blocks:
            layer_state, state = self.state[block.layer.anchor], self.state[block.anchor]
            form = self._schedule.inverse
            refresh_inverse(state, layer_state, block, damping[id(block.anchor)], form)

    def _directions(self) -> dict[Parameter, Tensor]:
        """Return the preconditioned gradients of the parameters in layers."""
        directions: dict[Parameter, Tensor] = {}
        damping = {p: group["damping"] for group in self.param_groups for p in group["params"]}
        for block in self._blocks:
            grads = [p.grad for p in block.parameters]
            if all(g is None for g in grads):
                continue
            inverse = inverse_of(self.state[block.anchor], damping[block.anchor])
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
            directions.update({p: d for p, d in with_grad if p.grad is not None})
        return directions

    def _tuned_update(
        self, terms: list[ObjectiveTerm], closure: Callable[[], Any] | None, loss: Any
    ) -> None:
        """Take a step whose size, momentum and damping follow from the quadratic model."""
        assert self._tuning is not None
        directions = self._directions()
        taken = True
        if directions:
            if not terms:
                raise RuntimeError(f"KFACOptimizer: {missing_statistics(True, set())}")
            again = None
            if closure is not None:
                again = ClosureLoss(float(loss), self._reevaluation(terms, closure))
            groups, scale = self.param_groups, calling_loss_scale()
            taken = self._tuning.step(self.state, groups, directions, terms, again, scale)
        if taken:
            self._update_fallback(directions)

    def _reevaluation(
        self, terms: list[ObjectiveTerm], closure: Callable[[], Any]
    ) -> Callable[[], float]:
        """Make a function that evaluates a closure again, and leaves the gradients alone."""

        def evaluate() -> float:
            grads = [(p, p.grad) for p in self._parameters()]
            for p, _ in grads:
                p.grad = None
            try:
                with undisturbed(terms), torch.enable_grad():
                    return float(closure())
            finally:
                for p, grad in grads:
                    p.grad = grad

        return evaluate

    def _update_parameters(self, directions: dict[Parameter, Tensor]) -> None:
        lr = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        if directions and self._schedule.kl_clip is not None:
            grads = [p.grad for p in directions if p.grad is not None]
            lrs = [lr[p] for p in directions]
            values = list(directions.values())
            scale = kl_clip_scale(grads, values, lrs, self._schedule.kl_clip)
            for d in directions.values():
                d.mul_(scale.to(d.device, d.dtype))
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
                )
        self._update_fallback(directions)

    def _update_fallback(self, directions: dict[Parameter, Tensor]) -> None:
        for group in self.param_groups:
            rest = [p for p in group["params"] if p.grad is not None and p not in directions]
            for p in rest:
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(f"{self._names[id(p)]}: sparse gradients are unsupported.")
            adamw_step(rest, self.state, group)

    def _momentum_buffer(self, p: Parameter) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer
