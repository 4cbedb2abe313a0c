"""An optimizer that knows the modules of its parameters, and keeps its state whole."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from kfacopt.kfac.layers import Block, Layer, find_layers
from kfacopt.optim.distributed import WrapperWatch
from kfacopt.optim.fallback import embeddings
from kfacopt.optim.hooks import remove_hooks
from kfacopt.optim.initial_state import complete_state, state_shapes
from kfacopt.optim.label_draws import LabelDraws
from kfacopt.optim.messages import log_layers, user_stacklevel
from kfacopt.optim.model_search import find_modules, parameter_names
from kfacopt.optim.preconditioner import bases_of, discard_unfitting
from kfacopt.optim.self_tuning import SelfTuning
from kfacopt.optim.serialization import (
    follow_parameters,
    restore_dtypes,
    restore_generator,
    store_generator,
)
from kfacopt.optim.settings import (
    CurvatureOptions,
    Schedule,
    as_number,
    check_group,
    numbers_alone,
)
from kfacopt.optim.sharding import (
    refuse_pipeline_stages,
    refuse_replaced,
    refuse_sharded,
    refuse_shared_optimizer,
)
from kfacopt.optim.state_checks import check_kind_of_steps, check_state_dict
from kfacopt.optim.statistics import StatisticsCollector


class KFACWarning(UserWarning):
    """Something works otherwise than a reader of the training script would expect."""


class ConnectedOptimizer(Optimizer):
    """Finds the layers of its parameters, has hooks on them, and saves and loads its state.

    A base of `KFACOptimizer`, which sets the attributes before it calls the constructor.
    """

    _schedule: Schedule
    _curvature: CurvatureOptions
    _tuning: SelfTuning | None
    _seed: int
    _labels: LabelDraws

    def _start_unconnected(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._layers: list[Layer] = []
        self._blocks: list[Block] = []
        self._names: dict[int, str] = {}
        self._embeddings: set[int] = set()
        self._collector: StatisticsCollector
        self._connected = False
        self._checked_settings: list[tuple[Any, ...]] = []
        self._placement: list[tuple[torch.dtype, torch.device]] = []
        self._warned: set[str] = set()
        self._skipped_steps = self._num_fallback = 0
        self._kl_clip_scale: Tensor | None = None
        self._labels_before: Tensor | None = None
        self._waiting = self._stages_looked_for = False
        self._ddp = WrapperWatch()
        self._ddp_group: Any = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`."""
        if self._tuning is not None and self.param_groups:
            param_group.setdefault("damping", self.param_groups[0]["damping"])
        super().add_param_group(param_group)
        try:
            self._admit(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()  # a refused group leaves no trace
            raise

    def _admit(self, group: dict[str, Any]) -> None:
        """Check the last group, and find its layers."""
        if any(is_lazy(p) for p in group["params"]):
            raise ValueError(
                "params: a parameter is not initialized yet (nn.Lazy...); run a forward pass of "
                "the model before making the optimizer."
            )
        refuse_sharded(group["params"])
        refuse_shared_optimizer()
        if any(p.is_meta for p in group["params"]):
            raise ValueError(
                "params: a parameter is on the meta device, without values; give the model its "
                "values (to_empty, then load or initialize) before making the optimizer, which "
                "would go on with the old parameters."
            )
        group.setdefault("base_lr", as_number(group["lr"]))
        group.setdefault("num_steps", self.param_groups[0].get("num_steps", 0))
        check_group(group)
        self._refuse_maximize(group)
        if self._connected:
            self._connect()

    def _refuse_maximize(self, group: Mapping[str, Any]) -> None:
        if group["maximize"] and self._tuning is not None:
            raise ValueError('maximize must be False for lr="auto", which models the loss it sees.')

    def _reconnect_if_frozen(self) -> bool:
        """Find the layers anew where parameters were frozen or unfrozen since; tell of new ones."""
        if [p.requires_grad for p in self._parameters()] == self._trained:
            return False
        self._connect(self._collector.living_modules())
        return not all(self._has_statistics(layer) for layer in self._layers)

    def _follow_moved_parameters(self) -> None:
        """Convert the state where the model was moved to another dtype or device since."""
        params = self._parameters()
        if [(p.dtype, p.device) for p in params] == self._placement:
            return
        self._placement = [(p.dtype, p.device) for p in params]
        follow_parameters(self.state, self._curvature.form, self._schedule.inverse)
        if self._labels.common.device != self._device:
            self._labels.start(self._seed, self._device)

    def _refuse_other_parallelism(self) -> None:
        """Raise if the model was shared out over ranks since; on all of them, before they talk."""
        modules = self._collector.living_modules()
        refuse_replaced(modules, self._parameters(), self._names)
        if not self._stages_looked_for:
            refuse_pipeline_stages(module for _, module in modules)
            self._stages_looked_for = True

    def _parameters(self) -> list[Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _device(self) -> torch.device:
        """Where labels are drawn: with the first parameter."""
        return next((p.device for p in self._parameters()), torch.device("cpu"))

    def _connect(self, modules: list[tuple[str, nn.Module]] | None = None) -> None:
        """Find the modules of the parameters and put hooks on them."""
        params = self._parameters()
        if modules is None and not params:  # of a group that is empty so far
            modules = []
        if modules is None:
            modules = find_modules(params, None if self._model is None else self._model())
        refuse_pipeline_stages(module for _, module in modules)
        layers = find_layers(modules, params, self._schedule.separate_weight_and_bias)
        if self._connected:
            self._collector.active = False
        self._names = parameter_names(modules, params)
        self._embeddings = embeddings(module for _, module in modules)
        self._trained = [p.requires_grad for p in params]
        self._placement = [(p.dtype, p.device) for p in params]
        self._layers = [layer for layer, _ in layers]
        self._blocks = [block for layer in self._layers for block in layer.blocks]
        for layer in self._layers:
            discard_unfitting(self.state, layer, self._curvature.form)
        settings = (self._curvature, self._labels, self._ddp)
        self._collector = StatisticsCollector(layers, modules, *settings)
        self._connected = True
        self._watch(True)
        covered = {id(p) for layer in self._layers for p in (layer.weight, layer.bias)}
        rest = [self._names[id(p)] for p in params if id(p) not in covered]
        log_layers(self._layers, rest, self._curvature.form)
        if params and not self._layers:
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
            state_dict: What `state_dict` returned, for the same parameters in the same order, once
                the hooks of `register_load_state_dict_pre_hook` have adapted it.

        Raises:
            ValueError: If it is not a KFACOptimizer's, does not fit the layers, has an entry that
                no training leads to, or was saved with lr="auto" where this lr is a number, or
                the reverse. Nothing has been changed then.
        """
        if not isinstance(state_dict, dict):
            self._check_loaded(state_dict)  # raises, before hooks meet it
        checked: list[dict[str, Any]] = []

        def check(_: Optimizer, hooked: dict[str, Any]) -> None:
            self._check_loaded(hooked)
            checked.append(hooked)

        def restore(_: Optimizer) -> None:
            restore_dtypes(self.state, self.param_groups, checked[0])

        # After all hooks that adapt the dictionary, and before those that look at the result.
        own = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            remove_hooks(own)
        self._resume()

    def _check_loaded(self, state_dict: Any) -> None:
        params = self._parameters()
        shapes = state_shapes(params, self._layers, self._curvature.form)
        named_params = [(self._names[id(p)], p) for p in params]
        check_state_dict(state_dict, self.param_groups, named_params, shapes)
        check_kind_of_steps(state_dict["state"], self._tuning is not None)
        for group in state_dict["param_groups"]:
            self._refuse_maximize(group)

    def _complete_state(self) -> None:
        forms = self._curvature.form, self._schedule.inverse
        tuned = self._tuning is not None
        with numbers_alone(self.param_groups):
            complete_state(self.state, self._layers, self.param_groups, *forms, tuned)
        store_generator(self.state, self._layers, self._labels.common)

    def _resume(self) -> None:
        self._collector.clear()
        restore_generator(self.state, self._labels.common)
        new = not all(self._has_statistics(layer) for layer in self._layers)
        self._watch(new or self._due(self._schedule.factor_update_interval))

    def _watch(self, active: bool) -> None:
        """Put hooks on the modules or take them off, and tell the collector of the bases."""
        active = active and bool(self._layers)
        if active and self._schedule.inverse.corrected:
            # Where the next step changes the bases, its second moments wait for the new ones.
            stay = not self._due(self._schedule.inverse_update_interval)
            bases = {b: bases_of(self.state.get(b.anchor, {})) for b in self._blocks if stay}
            self._collector.bases = {b: known for b, known in bases.items() if known is not None}
        self._collector.collecting = active
        self._collector.active = active or (self._tuning is not None and bool(self._layers))
        due = self._due(self._schedule.factor_update_interval)
        self._labels.step = self.param_groups[0]["num_steps"]
        self._labels_before = self._labels.common.get_state() if active and not due else None

    def _has_statistics(self, layer: Layer) -> bool:
        return bool(self.state.get(layer.anchor, {}).get("factor_updates", 0))

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles are made of, the modules included."""
        store_generator(self.state, self._layers, self._labels.common)
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
        self._labels = LabelDraws(self._seed, self._device, self._ddp)
        self._connect(modules)
        self._resume()

    # The training loop -------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and with them the statistics that wait for the next step."""
        if not self._collector.forward_seen:
            self._reconnect_if_frozen()
        self._collector.clear(forward_is_over=False)  # forward, zero_grad, backward is usual, too
        super().zero_grad(set_to_none)

    def _due(self, interval: int) -> bool:
        return bool(self.param_groups[0]["num_steps"] % interval == 0)
