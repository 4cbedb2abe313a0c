"""Connect an optimizer to the model whose parameters it was given; what follows is in its rooms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter

from kfacopt.kfac.choice import Choice
from kfacopt.kfac.data_axes import DataAxes
from kfacopt.kfac.layers import Layer, default_kinds, find_layers, split
from kfacopt.kfac.layers.entries import ENTRIES
from kfacopt.kfac.matrix_layouts import MatrixLayout
from kfacopt.optim.distributed import Ranks
from kfacopt.optim.messages import log_layers
from kfacopt.optim.settings import Settings
from kfacopt.optim.state.curvature_state import CurvatureState
from kfacopt.optim.statistics.collector import Statistics
from kfacopt.optim.statistics.label_draws import LabelDraws
from kfacopt.optim.statistics.other_uses import OtherUses
from kfacopt.optim.steps.fallback import at_rate_of_vectors
from kfacopt.optim.watch.gradient_exchange import ExchangeWatch
from kfacopt.optim.watch.modules import parameter_names
from kfacopt.optim.watch.recurrence import RecurrenceWatch
from kfacopt.optim.watch.sharding import refuse_pipeline_stages, refuse_replaced
from kfacopt.optim.watch.watch import Watch


@dataclass
class Connection:
    """What is known of the modules of an optimizer's parameters.

    Attributes:
        watch: The hooks on them.
        statistics: What the hooks tell.
        names: The parameters' names by their `id`.
        left_out: Kinds of modules that are not among `layers=`, by the `id`s of their parameters.
        vectors: The `id`s of what AdamW trains at the rate of vectors.
        trained: Which parameters required gradients.
        placement: The parameters' dtypes and devices.
        stages_looked_for: Whether the modules were looked for in pipelines since.
    """

    watch: Watch
    statistics: Statistics
    names: dict[int, str]
    left_out: dict[int, str]
    vectors: set[int]
    trained: list[bool]
    placement: list[tuple[torch.dtype, torch.device]]
    stages_looked_for: bool = False

    def forget(self, forward_is_over: bool = True) -> None:
        """Forget all since the last step, and take back the labels drawn for it.

        Args:
            forward_is_over: Whether no backward pass of an earlier forward pass will come.
        """
        self.statistics.clear()
        self.watch.forget(forward_is_over)

    def refuse_other_parallelism(self, params: Sequence[Parameter]) -> None:
        """Raise if the model was shared out over ranks since; on all of them, before they talk."""
        modules = self.watch.living_modules()
        refuse_replaced(modules, params, self.names)
        if not self.stages_looked_for:
            refuse_pipeline_stages(module for _, module in modules)
            self.stages_looked_for = True

    def has_moved(self, params: Sequence[Parameter]) -> bool:
        """Tell whether parameters are of another dtype or on another device than before."""
        before, self.placement = self.placement, placement_of(params)
        return self.placement != before

    def watch_step(
        self, step: int, active: bool, settings: Settings, state: CurvatureState
    ) -> None:
        """Put hooks on the modules or take them off, and tell the statistics of the bases."""
        layers = bool(state.layers) or self.statistics.others.looks_on
        active = active and layers
        if active and settings.inverse.corrected:
            # Where the next step changes the bases, its second moments wait for the new ones.
            stay = not settings.schedule.inverses_due(step)
            self.statistics.bases = state.bases() if stay else {}
        self.statistics.collecting = active
        self.watch.active = active or (settings.steps.tuned and layers)
        measured = settings.steps.measured and settings.schedule.measurement_due(step)
        self.watch.recording = settings.curvature.recording or (active and measured)


def placement_of(params: Sequence[Parameter]) -> list[tuple[torch.dtype, torch.device]]:
    """Return the dtypes and devices of parameters."""
    return [(p.dtype, p.device) for p in params]


def connect(
    params: Sequence[Parameter],
    modules: list[tuple[str, nn.Module]],
    settings: Settings,
    curvature: CurvatureState,
    labels: LabelDraws,
    ranks: Ranks,
    matrices: Mapping[Parameter, MatrixLayout],
    axes: DataAxes,
) -> Connection:
    """Find the layers of parameters, give them to the state, and put hooks on their modules.

    Args:
        params: The parameters.
        modules: All modules that contain any of them, with their names.
        settings: Those of the whole optimizer.
        curvature: Keeps the layers' curvature.
        labels: Says what labels are drawn from.
        ranks: Is told when a forward pass reaches a layer.
        matrices: Matrices that are multiplied without a module's call, and how.
        axes: What was found of uses entry by entry.
    """
    refuse_pipeline_stages(module for _, module in modules)
    kinds = default_kinds() if settings.layers is None else settings.layers
    own_modules = [module for _, module in modules]
    choice = Choice.of(own_modules, kinds, settings.inverse.corrected)
    # In the parameters' order, whatever was found first: sums over layers depend on it. A state may
    # have been saved with other settings.
    ordered = {p: matrices[p] for p in params if p in matrices}
    by_entries = {id(p) for p, layout in ordered.items() if layout.roles == ENTRIES}
    matrices = {p: layout for p, layout in ordered.items() if choice.makes_layer(p, layout)}
    untied = [p for p in params if p not in matrices or not matrices[p].is_tied]
    layers = find_layers(modules, untied, settings.separate_weight_and_bias, kinds)
    names = parameter_names(modules, params)
    layers += _product_layers(matrices, layers, names, settings.separate_weight_and_bias)
    form = settings.curvature.form
    layers = split(layers, settings.conv_factor, settings.wide_factor, form.max_factor_dim)
    curvature.set_layers(layer for layer, _ in layers)
    exchange = ExchangeWatch(ranks.wrappers)
    others = OtherUses(curvature.layers, params, choice, axes)
    statistics = Statistics(curvature.layers, others, settings.curvature, labels, exchange)
    recurrence = RecurrenceWatch(statistics, kinds, settings.curvature.recording)
    own = (settings.curvature, statistics, ranks.wrappers, recurrence)
    watch = Watch(layers, modules, *own)
    covered = {id(p) for layer in curvature.layers for p in (layer.weight, layer.bias)}
    rest = [names[id(p)] for p in params if id(p) not in covered]
    log_layers(curvature.layers, rest, form)
    trained, placement = [p.requires_grad for p in params], placement_of(params)
    vectors = at_rate_of_vectors(own_modules) | by_entries
    return Connection(watch, statistics, names, choice.left_out, vectors, trained, placement)


def _product_layers(
    matrices: Mapping[Parameter, MatrixLayout],
    layers: Sequence[tuple[Layer, list[nn.Module]]],
    names: Mapping[int, str],
    separate: bool,
) -> list[tuple[Layer, list[nn.Module]]]:
    """Return layers that no module has, for matrices that are still trained and in no other."""
    taken = {p for layer, _ in layers for p in (layer.weight, layer.bias)}
    found: list[tuple[Layer, list[nn.Module]]] = []
    for p, layout in matrices.items():
        if p.requires_grad and p not in taken:
            bias = layout.bias
            usable = bias is not None and bias.requires_grad and id(bias) in names
            layer = layout.layer(names[id(p)], p, usable and bias not in taken, separate)
            taken |= {p, layer.bias}
            found.append((layer, []))
    return found
