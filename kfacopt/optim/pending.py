"""The statistics that wait for a step, taken over all ranks; sums are made in `statistics`."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import Parameter

from kfacopt.kfac.layers import Layer
from kfacopt.optim import messages
from kfacopt.optim.connection import Connection
from kfacopt.optim.distributed import Ranks
from kfacopt.optim.settings import Settings
from kfacopt.optim.state.curvature_state import CurvatureState
from kfacopt.optim.statistics.averaging import average_moments
from kfacopt.optim.statistics.moments import Moments
from kfacopt.optim.statistics.tied_moments import joined
from kfacopt.optim.watch.loss_scale import calling_loss_scale


def take_pending(
    connection: Connection,
    curvature: CurvatureState,
    settings: Settings,
    params: Sequence[Parameter],
    step: int,
    ranks: Ranks,
    notices: messages.Notices,
) -> dict[Layer, Moments]:
    """Return the statistics since the last step, without the loss scale; they are forgotten.

    Args:
        connection: Has the statistics.
        curvature: Tells which layers had statistics before.
        settings: Those of the whole optimizer.
        params: The parameters.
        step: The number of the step.
        ranks: The ranks that average.
        notices: Tells the user what is lacking.

    Raises:
        RuntimeError: If there are gradients of layers, but never were statistics, or the ranks'
            optimizers differ.
    """
    watch, statistics = connection.watch, connection.statistics
    forward_seen, used, reached = watch.forward_seen, watch.used, statistics.reached
    transformed = watch.transformed
    loss_scale = calling_loss_scale()
    exchanged, group = statistics.exchange.noticed(), ranks.group(params)
    pending = statistics.finish(loss_scale)
    watch.forget()
    if group is not None:
        ranks.refuse_different(params, curvature.layers, settings, step)
        parts = [part for layer in curvature.layers for part in layer.collected]
        pending = average_moments(pending, parts, settings.curvature.form, group)
    elif exchanged:
        notices.warn("exchanged", messages.unwrapped_averaging())
    pending = joined(pending, curvature.layers, settings.curvature.form)
    if transformed and not pending:  # else it may have been an evaluation
        notices.warn("transformed", messages.transformed())
    if statistics.objectives.partial:
        notices.warn("derivatives", messages.derivatives_left_out())
    due = settings.schedule.factors_due(step)
    for layer in reached if pending and due else ():
        if layer not in pending and curvature.has_statistics(layer):
            notices.warn(f"stale {layer.name}", messages.stale_factors(layer))
    told = transformed or bool(statistics.undercounted)
    if not pending and not told and (used or not forward_seen):
        cause = messages.missing_statistics(forward_seen, bool(reached))
        _report_missing(curvature, cause, notices)
    if not due:  # here for new layers alone
        pending = {la: m for la, m in pending.items() if not curvature.has_statistics(la)}
    interval = 1 if settings.steps.tuned else settings.schedule.factor_update_interval
    uncompiled = messages.uncompiled_cause(watch.uncompiled, interval)
    if uncompiled is not None:
        notices.warn("uncompiled", uncompiled)
    factor = loss_scale**settings.curvature.loss_scale_power
    for moments in pending.values():
        moments.scale_curvature(1 / factor)
    return pending


def _report_missing(curvature: CurvatureState, cause: str, notices: messages.Notices) -> None:
    """Tell of gradients without statistics; raise if there were never any."""
    owned = [p for layer in curvature.layers for p in (layer.weight, layer.bias)]
    if not any(p is not None and p.grad is not None for p in owned):
        return
    if not any(curvature.has_statistics(layer) for layer in curvature.layers):
        raise RuntimeError(f"KFACOptimizer: {cause}")
    notices.warn("missing-loss", f"{cause} The step uses the curvature of earlier steps.")
