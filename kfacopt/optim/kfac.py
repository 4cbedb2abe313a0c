"""The K-FAC optimizer: the order of a step, and which are skipped (NaN); the rest is in rooms."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer

from kfacopt.kfac.data_axes import DataAxes
from kfacopt.kfac.factor_forms import Factors
from kfacopt.kfac.layers import Block, ConvFactor, KFACApprox, Kind, Layer, WideFactor
from kfacopt.kfac.matrix_layouts import MatrixLayout
from kfacopt.likelihoods import FisherType
from kfacopt.linalg.kronecker import DampingMethod
from kfacopt.optim.connection import Connection, connect
from kfacopt.optim.description import Description, describe
from kfacopt.optim.distributed import Ranks, mean_over_ranks
from kfacopt.optim.foreign_arguments import refuse_foreign
from kfacopt.optim.group_settings import check_group, numbers_alone, settings_of
from kfacopt.optim.messages import (
    Notices,
    hidden_by_checkpointing,
    log_new_layer,
    skipped_step,
    used_otherwise,
    without_curvature,
    without_layers,
)
from kfacopt.optim.monitoring import Scalars, all_block_statistics
from kfacopt.optim.pending import take_pending
from kfacopt.optim.rates import RateWatch, relative_rate
from kfacopt.optim.settings import (
    SETTINGS,
    PreconditionerKind,
    as_number,
    read_settings,
)
from kfacopt.optim.state.checks import check_state_dict
from kfacopt.optim.state.conversions import restore_generator, store_generator
from kfacopt.optim.state.curvature_state import CurvatureState
from kfacopt.optim.state.initial import is_initialisation
from kfacopt.optim.state.loading import load_checked
from kfacopt.optim.state.matrices import (
    agreed_layouts,
    keep_layouts,
    kept_layouts,
    shapes_to_load,
)
from kfacopt.optim.statistics.collector import Statistics
from kfacopt.optim.statistics.label_draws import LabelDraws
from kfacopt.optim.statistics.moments import Moments
from kfacopt.optim.steps.clipped_step import ClippedStep
from kfacopt.optim.steps.fallback import fallback_step, rate_of
from kfacopt.optim.steps.objective import Objective, objective_of
from kfacopt.optim.steps.preconditioning import gradients_of, preconditioned
from kfacopt.optim.steps.self_tuning import SelfTuning
from kfacopt.optim.steps.trust_region import FIRST_KL_CLIP
from kfacopt.optim.steps.update import are_finite
from kfacopt.optim.watch.admission import check_iterable, check_parameters
from kfacopt.optim.watch.loss_scale import calling_loss_scale
from kfacopt.optim.watch.modules import find_modules
from kfacopt.optim.watch.recorded_calls import Term
from kfacopt.optim.watch.watch import Watch


class KFACOptimizer(Optimizer):
    r"""Steps along F⁻¹ ∇L, with the Fisher/GGN F approximated by K-FAC.

        optimizer = KFACOptimizer(model.parameters())
        for X, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), y)
            loss.backward()
            optimizer.step()

    For every `nn.Linear`, `nn.Conv1d` to `nn.Conv3d` and `nn.ConvTranspose1d` to `3d` with inputs a
    and output gradients g, F ≈ G ⊗ A (see `kfacopt.KFACLinearOperator`); with Ā and Ḡ their running
    averages and ∇ the layer's gradient,

        Δ = ν (Ḡ + √δ/π I)⁻¹ ∇ (Ā + π√δ I)⁻¹,   m ← μ m + lr Δ,   θ ← (1 − c lr λ) θ − (lr Δ + μ m),

    with the damping δ, Nesterov's momentum μ, weight decay λ, c = 0.015 and ν = min(1, √(κ / (lr₀²
    Σ⟨Δ, ∇⟩))) of the unscaled Δ and the initial lr₀, where κ follows the data (`kl_clip`). All
    other parameters are trained by AdamW with `fallback_lr`, and decay alike.

    The objective is whatever scalar is differentiated, and F its Fisher or GGN: of `loss / k`, of a
    weighted sum of losses, of a sum divided by a number. `cross_entropy`, `mse_loss`,
    `binary_cross_entropy_with_logits` and `nll_loss` are known by their calls, on the model's
    output, on functions of it, or inside the model. Of anything else that is computed from the
    outputs, the positive part of the second derivative at the outputs is found
    (`kfacopt.likelihoods.structure`), or the empirical Fisher where it has none; a penalty on
    parameters counts by its gradient alone. `describe` tells what was used. Matrices that are
    multiplied without a call of their module are layers, too (`kfacopt.kfac.matrix_uses`).

    Args:
        params: Parameters, named parameters or groups, as for any `torch.optim` optimizer. Groups
            may set `lr`, `momentum`, `nesterov`, `weight_decay`, `damping`, `fallback_lr`,
            `maximize` and `foreach`. A joint block [W | b] takes W's damping.
        lr: The learning rate, in units of a natural-gradient step: 1 is a full one; a number, or
            a tensor of one, as for AdamW (the other settings of groups, too). The step's length
            is proportional to it, clipped or not; where the clip is active (ν < 1), a step at the
            initial rate is as long as κ says. So leave the initial rate, and let a schedule do the
            rest. `"auto"` chooses step size, momentum and damping
            in every step, for large or full batches: see `kfacopt.optim.steps.self_tuning`. The
            groups' `lr` is then 1, and what schedulers make of it multiplies the steps;
            `momentum=0` leaves momentum out, `damping` is where the adaptation starts,
            `weight_decay` counts per step of size 1, and |α| times where that is shorter, and
            `kl_clip` is not used; AdamW's part is outside of what is undone. An objective with
            terms that are not recognised needs `step(closure)`.
        momentum: μ in [0, 1), on the preconditioned step.
        nesterov: Take Nesterov's step; `False` is θ ← (1 − c lr λ) θ − m. Without momentum, and for
            `lr="auto"`, it has no effect.
        weight_decay: λ ≥ 0, decoupled, as for AdamW: all parameters decay by 0.015 lr λ in a step,
            which at lr = 0.2 is what AdamW at a rate of 3e-3 takes. Those that AdamW trains decay
            alike, whatever `fallback_lr`; not at all where that is 0.
        damping: δ > 0, in units of F; 1e-3 (for `lr="auto"` where it starts).
        preconditioner: `"kfac"` (above) or `"ekfac"`: Q_G ((Q_Gᵀ ∇ Q_A) / (Λ + δ)) Q_Aᵀ with Ḡ's
            and Ā's eigenbases Q and the running averages Λ of the second moments of single data's
            gradients in them (see `kfacopt.EKFACLinearOperator`). Λ is updated with the factors,
            the bases, where they do not fit any more, with the inverses; a step that does
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
        factor_update_interval: Steps between updates of Ā and Ḡ. Between them there are no hooks.
            10, or 1 for `lr="auto"`; as long as the loss is not known by its call, so that its
            curvature is looked for in each update, steps 1, 2, 5, 10, 20, and each 30th.
        inverse_update_interval: Steps between updates of the inverses. 50, or 5 for `lr="auto"`, or
            60 for losses whose curvature is looked for; before the first of them is over, each
            update of the factors is followed by one of the inverses.
        kl_clip: κ > 0, about twice the KL divergence by which a step without momentum may move the
            model's predictions at the initial lr; such steps are as long as √κ. `"auto"` starts
            with 5e-5 and follows the data: every 40 steps the loss of the same batch is evaluated
            again at both ends of the step, and κ is doubled or halved, between 1e-8 and 1e-3 (see
            `kfacopt.optim.steps.trust_region`). With `loss_func=` it stays at 5e-5. `None`
            switches the clip off.
        separate_weight_and_bias: Give W and b blocks of their own instead of [W | b].
        layers: Which kinds of modules are preconditioned, as a list of classes, of those in
            docs/layers.md and those given to `kfacopt.register_layer`; AdamW trains what is in
            others. `None`: `kfacopt.default_layers()`. With `nn.Linear` and `nn.Embedding` an
            embedding that is tied to the head is a layer (not for EKFAC); `nn.LSTM` and the like
            name the products in them; `nn.Parameter` names what multiplies or is added past
            modules.
        max_factor_dim: A side of a layer wider than that gets a diagonal factor.
        conv_factor: How A of convolutions is kept: `"full"`; `"channels"`, by channels C and
            positions K of the kernel, which takes (K + 1) C² / 2 numbers with its inverse instead
            of (K C)² (see `kfacopt.linalg.split_factors`); `"auto"`, so where K C is above
            512 and C at least K.
        wide_factor: How a side of a layer that is d wide is kept: `"full"`; `"low_rank"`, as a
            rank of d/8 plus a diagonal, d/16 where it is at least twice as wide as the other side,
            and at least 64 (see `kfacopt.linalg.low_rank`); `"auto"`, so from 512 on, unless
            eigenbases are kept (`damping_method="exact"`, EKFAC).
        factor_dtype: The dtype that Ā, Ḡ and Λ are kept in; `None` is the parameters', at least
            float32. Sums and decompositions are computed in at least float32.
        inverse_dtype: The dtype that inverses and bases are kept in; `None` is the factors', at
            least float32. They are multiplied in that, but at least float32.
        fallback_lr: AdamW's learning rate for all other parameters; it follows the ratio of the
            group's current to its initial `lr`. `None`: 0.015 for vectors, embeddings,
            recurrent modules and what is added to data or multiplies it entry by entry
            (positions, class tokens), and AdamW's usual 1e-3 for other tensors (matrices that are
            scaled), and for all with `lr="auto"`.
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
        TypeError: If an argument is another optimizer's (`betas`, `eps`, `fused`, `amsgrad`).
        ValueError: If an argument is out of its range, no module owns the parameters, or layers
            outside of `model` own some.
        RuntimeError: In `step`, if no backward pass from the outputs was ever seen.

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
    `kfacopt.optim.steps.self_tuning`); factored damping without the search for its best split;
    averages are bias-corrected.
    """

    @refuse_foreign
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | Literal["auto"] = 0.2,
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
        kl_clip: float | Literal["auto"] | None = "auto",
        separate_weight_and_bias: bool = False,
        layers: Collection[Kind] | None = None,
        max_factor_dim: int | None = 8192,
        conv_factor: ConvFactor = "auto",
        wide_factor: WideFactor = "auto",
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
        given = {name: value for name, value in locals().items() if name in SETTINGS}
        check_iterable(params)
        self._settings, defaults = read_settings(given)
        self._start(model)
        super().__init__(params, defaults)
        self._curvature.entries = self.state
        self._labels = LabelDraws(seed, self._device, self._ranks.wrappers)
        self._connect()

    def _start(self, model: nn.Module | None) -> None:
        """Make what an optimizer has before it knows its parameters."""
        self._model = None if model is None else weakref.ref(model)
        steps = self._settings.steps
        self._rule = SelfTuning() if steps.tuned else ClippedStep(steps.kl_clip)
        self._curvature = CurvatureState(self._settings)
        self._ranks, self._notices, self._rates = Ranks(), Notices(), RateWatch()
        self._connection: Connection
        self._connected = False
        self._checked_settings: list[tuple[Any, ...]] = []
        self._skipped_steps = self._num_fallback = 0
        self._matrices: dict[Parameter, MatrixLayout] = {}
        self._axes = DataAxes()
        self._labels_before: Tensor | None = None

    # Steps -------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or `None`.

        Raises:
            RuntimeError: If there are gradients but no backward pass from outputs was seen so far.
            DecompositionError: If a layer's factors cannot be inverted (repeatedly).
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        with numbers_alone(self.param_groups):
            self._check_settings()
            params = self._parameters()
            if self._statistics.collecting:
                self._connection.refuse_other_parallelism(params)
            if self._connection.has_moved(params):
                self._curvature.follow_parameters()
                self._labels.move(self._device)
            if not (self._has_no_gradients() or self._only_initialises()):
                if self._has_finite_gradients():
                    self._step(closure, result)
                self._watch.close_passes()
        return result

    def _step(self, closure: Callable[[], Any] | None, loss: Any) -> None:
        """Collect, fold, invert, precondition, clip and move."""
        self._rates.look(self.param_groups, self._notices, self._settings.steps.tuned)
        number, collecting = self._num_steps, self._statistics.collecting
        due = self._settings.schedule.factors_due(number)
        recorded = self._watch.recording
        terms = self._statistics.objective() if recorded else []
        # Layers that became new after the forward pass have to wait for the next one.
        waiting = collecting and not (due or self._watch.forward_seen)
        late: dict[Layer, Moments] = {}
        if collecting and not waiting:  # at an interval's start, or for new layers
            late = self._collect_and_fold()
        else:
            self._connection.forget()
        blocks = self._curvature.due_inverses(number)
        if blocks:
            self._curvature.invert(blocks, self.param_groups, number, self._group)
        if late:  # EKFAC's second moments, in bases that are there only now
            self._curvature.fold_late(late, self._group)
        gradients = gradients_of(self.param_groups)
        without_inverse = partial(self._report_without_inverse, waiting)
        directions = preconditioned(self._curvature, gradients, self.param_groups, without_inverse)
        self._clip_and_move(gradients, directions, terms if recorded else None, closure, loss)
        if due:
            self._ranks.align(self.state, self._parameters(), self._curvature.blocks)
        self._look_ahead(waiting)

    def _collect_and_fold(self) -> dict[Layer, Moments]:
        """Move the running factors to include the statistics; return what still lacks a basis."""
        bases, step = self._statistics.bases, self._num_steps
        searched = self._statistics.searched
        pending = take_pending(
            self._connection,
            self._curvature,
            self._settings,
            self._parameters(),
            step,
            self._ranks,
            self._notices,
        )
        if pending and self._settings.schedule.factors_due(step):
            self._follow_loss(searched)
        return self._curvature.fold(pending, bases, step, self._group)

    def _follow_loss(self, searched: bool) -> None:
        """Take the intervals for a loss whose curvature was looked for, or for a known one."""
        schedule = self._settings.schedule
        if schedule.known == schedule.searched:
            return
        own = torch.tensor(float(searched), device=self._device)
        searched = bool(mean_over_ranks(own, self._group) > 0)
        for group in self.param_groups:
            group["searched"] = searched
        self._set_schedule()

    def _set_schedule(self) -> None:
        schedule = replace(self._settings.schedule, is_searched=self.param_groups[0]["searched"])
        self._settings = replace(self._settings, schedule=schedule)
        self._curvature.schedule = schedule

    def _report_without_inverse(self, waiting: bool, block: Block) -> None:
        if waiting or block.layer.weight in self._statistics.others.found:
            log_new_layer(block.layer)
            return
        otherwise = self._statistics.undercounted
        if block.layer in otherwise:  # all at once
            message = used_otherwise(otherwise)
            self._notices.warn(message, message)
        else:
            self._notices.warn(f"uncaptured {block.layer.name}", without_curvature(block.layer))

    def _clip_and_move(
        self,
        gradients: dict[Parameter, Tensor],
        directions: dict[Parameter, Tensor],
        terms: list[Term] | None,
        closure: Callable[[], Any] | None,
        loss: Any,
    ) -> None:
        """Move parameters with a direction by the step rule, and all others by AdamW."""

        def objective() -> Objective:
            over_ranks = partial(mean_over_ranks, group=self._group)
            if not self._settings.steps.tuned:
                return Objective(terms or [], None, calling_loss_scale(), over_ranks)
            return objective_of(terms or [], closure, loss, self._parameters(), over_ranks)

        measured = None if terms is None else objective
        own = (self.state, self.param_groups, gradients, directions)
        moved = self._rule.step(*own, measured)
        if self._rule.trouble:
            self._notices.log("unmeasured", self._rule.trouble)
        if moved:  # a self-tuned step that found nothing to gain moves nothing
            vectors = self._connection.vectors
            others = (vectors, self._settings.steps.vector_lr, self._rule.size)
            self._num_fallback = fallback_step(self.state, self.param_groups, directions, *others)

    def _look_ahead(self, waiting: bool) -> None:
        """Get ready for the next step."""
        if self._labels_before is not None:  # layers that are new leave the others' labels alone
            self._labels.common.set_state(self._labels_before)
        new = self._adopt_products() or self._reconnect_if_frozen()
        for group in self.param_groups:
            group["num_steps"] += 1
        self._set_watching(self._settings.schedule.factors_due(self._num_steps) or new or waiting)

    def _check_settings(self) -> None:
        """Raise where a group has a setting by now that it could not have been made with."""
        settings = settings_of(self.param_groups)
        if settings != self._checked_settings:
            for i, group in enumerate(self.param_groups):
                check_group(group, f"param_groups[{i}]: ", self._settings.steps.tuned)
            self._checked_settings = settings

    def _has_no_gradients(self) -> bool:
        """Tell whether there is nothing to step along: as for AdamW, that is no step then."""
        params = self._parameters()
        if any(p.grad is not None for p in params):
            return False
        self._connection.refuse_other_parallelism(params)  # they may be none of the model's now
        self._connection.forget(forward_is_over=False)
        self._reconnect_if_frozen()
        return True

    def _only_initialises(self) -> bool:
        """Make the state, and nothing else, in a step that checkpoint tools take for that."""
        if self.state or self._watch.forward_seen or not is_initialisation(self.param_groups):
            return False
        self._complete_state()
        return True

    def _has_finite_gradients(self) -> bool:
        """Tell whether the step can be made; else nothing of it may leave a trace."""
        names = self._connection.names
        grads = {p: p.grad for p in self._parameters() if p.grad is not None}
        for p, grad in grads.items():
            if grad.is_sparse:
                raise RuntimeError(f"{names[id(p)]}: sparse gradients are unsupported.")
        if are_finite(list(grads.values())):
            return True
        strange = [names[id(p)] for p, grad in grads.items() if not bool(grad.isfinite().all())]
        self._skipped_steps += 1
        self._connection.forget()
        self._notices.warn("skipped", skipped_step(strange))
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and with them the statistics that wait for the next step."""
        if not self._watch.forward_seen:
            self._reconnect_if_frozen()
        # forward, zero_grad, backward is usual, too
        self._connection.forget(forward_is_over=False)
        super().zero_grad(set_to_none)

    # Parameters and modules --------------------------------------------------------------------

    @property
    def _watch(self) -> Watch:
        return self._connection.watch

    @property
    def _statistics(self) -> Statistics:
        return self._connection.statistics

    @property
    def _num_steps(self) -> int:
        steps: int = self.param_groups[0]["num_steps"]
        return steps

    @property
    def _group(self) -> Any:
        """The process group of the ranks that train the model, if there is one."""
        return self._ranks.group(self._parameters())

    @property
    def _device(self) -> torch.device:
        """Where labels are drawn: with the first parameter."""
        return next((p.device for p in self._parameters()), torch.device("cpu"))

    def _parameters(self) -> list[Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`."""
        tuned = self._settings.steps.tuned
        if tuned and self.param_groups:
            param_group.setdefault("damping", self.param_groups[0]["damping"])
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_parameters(group["params"])
            group.setdefault("base_lr", as_number(group["lr"]))
            group.setdefault(
                "trust_region", self.param_groups[0].get("trust_region", FIRST_KL_CLIP)
            )
            group.setdefault("searched", self.param_groups[0].get("searched", False))
            group.setdefault("num_steps", self.param_groups[0].get("num_steps", 0))
            check_group(group, tuned=tuned)
            if self._connected:
                self._connect()
        except Exception:
            self.param_groups.pop()  # a refused group leaves no trace
            raise

    def _connect(self, modules: list[tuple[str, nn.Module]] | None = None) -> None:
        """Find the modules of the parameters and put hooks on them."""
        params = self._parameters()
        if modules is None:  # of a group that is empty so far there are none
            model = None if self._model is None else self._model()
            modules = find_modules(params, model) if params else []
        given = (self._settings, self._curvature, self._labels, self._ranks)
        connection = connect(params, modules, *given, self._matrices, self._axes)
        if self._connected:
            self._watch.active = False
        self._connection, self._connected = connection, True
        self._set_watching(True)
        if params and not self._statistics.others.looks_on:
            self._warn_without_layers()

    def _warn_without_layers(self) -> None:
        if not self._curvature.layers:
            self._notices.warn("no-layers", without_layers(self._settings.layers))

    def _reconnect_if_frozen(self) -> bool:
        """Find the layers anew where parameters were frozen or unfrozen since; tell of new ones."""
        if [p.requires_grad for p in self._parameters()] == self._connection.trained:
            return False
        before = self._curvature.layers
        self._connect(self._watch.living_modules())
        self._curvature.forget_missed(before, self._num_steps)
        self._set_watching(True)
        return not self._curvature.is_complete()

    def _adopt_products(self) -> bool:
        """Make layers of matrices that products past modules' calls were found to use."""
        if not self._statistics.collecting:
            return False
        others, params = self._statistics.others, self._parameters()
        own = others.by_entries | others.found
        found = agreed_layouts(own, others.candidates, params, self._group)
        tables = {p: la for p, la in found.items() if others.is_table(la)}
        found = {p: layout for p, layout in found.items() if p not in tables}
        self._matrices |= found | tables
        keep_layouts(self.state, found, params)
        keep_layouts(self.state, tables, params, are_layers=False)
        self._connection.vectors |= {id(p) for p in tables}
        hidden = [p for p in params if p in others.hidden and p.grad is not None]
        if hidden:
            names = [self._connection.names[id(p)] for p in hidden]
            self._notices.warn("hidden", hidden_by_checkpointing(names))
        elif not found:
            self._warn_without_layers()
        if not found:
            return False
        self._connect(self._watch.living_modules())
        self._curvature.complete(self.param_groups)  # checkpoints are loaded into what is there
        return True

    def _set_watching(self, active: bool) -> None:
        """Get the hooks ready for the next step."""
        step = self._num_steps
        groups = [group for group in self.param_groups if group["maximize"]]
        self._statistics.maximised = {id(p) for group in groups for p in group["params"]}
        self._connection.watch_step(step, active, self._settings, self._curvature)
        self._labels.step, late = step, not self._settings.schedule.factors_due(step)
        drawn = self._statistics.collecting and late
        self._labels_before = self._labels.common.get_state() if drawn else None

    # What is kept ------------------------------------------------------------------------------

    def factors(self, key: str | Parameter) -> Factors:
        """Return the running averages of a layer's Kronecker factors.

        Args:
            key: The layer's name, a parameter's name, or a parameter.

        Raises:
            KeyError: If there is no such layer, or no statistics of it yet.
        """
        return self._curvature.named_factors(key, self._connection.names)

    def statistics(self) -> Scalars:
        """Return numbers for logging: plain floats, one for each name.

        `skipped_steps` (as gradients were not finite), `kl_clip_scale` (ν of the last step; 1
        without a clip), with `kl_clip="auto"` `trust_region` (κ) and what the last measurement
        gave (NaN before one), `gain_ratio`, `slope` and `change` (see `TrustStatistics`),
        `fallback_parameters` (tensors that the last step gave to AdamW), `relative_lr` (the largest
        lr as a share of the one its group was made with: steps are in proportion), and for
        every layer `<layer>/damping`, `condition`, `factor_age`, `inverse_age`,
        `skipped_factor_updates` and `inverse_failures`; see `block_statistics`. Where weight and
        bias have blocks of their own, `<parameter>/...` instead. It costs an eigendecomposition
        per inverse; a step costs nothing more for it. With `lr="auto"` the quantities of
        `TuningStatistics` are among them.

        Example:
            for name, value in optimizer.statistics().items():
                writer.add_scalar(name, value, step)  # TensorBoard; or wandb.log(the whole)
        """
        counts = {
            "skipped_steps": float(self._skipped_steps),
            "fallback_parameters": float(self._num_fallback),
            "relative_lr": max(relative_rate(group) for group in self.param_groups),
        }
        own = (self._curvature, self.param_groups, self._connection.names)
        return counts | self._rule.scalars(self.param_groups) | all_block_statistics(*own)

    def describe(self) -> Description:
        """Return what is done with each objective and each parameter, to be printed or logged.

        Example:
            print(optimizer.describe())  # after a step
        """
        own = (self._parameters(), self._connection.names, self._curvature)
        seen = self._statistics
        left_out = self._connection.left_out
        groups = self.param_groups
        kinds = (self._connection.vectors, self._settings.steps.vector_lr)
        rates = {p: as_number(rate_of(p, g, *kinds)) for g in groups for p in g["params"]}
        found, reasons = seen.objectives.curvature, seen.others.reasons
        return describe(*own, found, seen.undercounted, left_out, reasons, rates)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: per parameter tensors and numbers; see `torch.optim.Optimizer`.

        A run that is resumed from it between two steps goes on bit by bit as it would have.
        """
        self._complete_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; factors keep their own dtype.

        Args:
            state_dict: What `state_dict` returned, for the same parameters in the same order, once
                the hooks of `register_load_state_dict_pre_hook` have adapted it.

        Raises:
            ValueError: If it is not a KFACOptimizer's, does not fit the layers, has an entry that
                no training leads to, or was saved with lr="auto" where this lr is a number, or
                the reverse. Nothing has been changed then.
        """
        params, tuned = self._parameters(), self._settings.steps.tuned
        named = [(self._connection.names[id(p)], p) for p in params]
        shapes, form = self._curvature.shapes(params), self._settings.curvature.form
        shapes_of = partial(shapes_to_load, shapes=shapes, form=form)

        def check(state: Any) -> None:
            check_state_dict(state, self.param_groups, named, shapes_of, tuned)

        load_checked(self, super().load_state_dict, state_dict, check)
        self._resume()

    def _complete_state(self) -> None:
        with numbers_alone(self.param_groups):
            self._curvature.complete(self.param_groups)
        store_generator(self.state, self._curvature.layers, self._labels.common)

    def _resume(self) -> None:
        for group in self.param_groups:
            group.setdefault("searched", False)  # states of development versions had none
        self._set_schedule()
        self._matrices |= kept_layouts(self.state, self._parameters())
        if self._matrices:
            self._connect(self._watch.living_modules())
        else:
            self._curvature.set_layers(self._curvature.layers)
        self._connection.forget()
        restore_generator(self.state, self._labels.common)
        due = self._settings.schedule.factors_due(self._num_steps)
        self._set_watching(due or not self._curvature.is_complete())

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles are made of, the modules included."""
        store_generator(self.state, self._curvature.layers, self._labels.common)
        own = {name: getattr(self, name) for name in ("_settings", "_rule", "_matrices")}
        return super().__getstate__() | own | {"_modules": self._watch.living_modules()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy that works on copies of the modules."""
        modules = state.pop("_modules", None)
        if modules is None:  # Optimizer.load_state_dict comes here with state and groups alone
            super().__setstate__(state)
            self._curvature.entries = self.state
            return
        rule, matrices = state["_rule"], state["_matrices"]
        self._settings = state["_settings"]
        self._start(None)
        super().__setstate__(state)
        self._rule, self._curvature.entries, self._matrices = rule, self.state, matrices
        self._labels = LabelDraws(self._settings.seed, self._device, self._ranks.wrappers)
        self._connect(modules)
        self._resume()
