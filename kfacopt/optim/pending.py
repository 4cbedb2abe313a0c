"""The statistics that wait for a step, taken over all ranks; sums are made in `statistics`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import distributed as dist
from torch.nn import Parameter

from kfacopt.kfac.layers import Layer
from kfacopt.optim.connection import Connection
from kfacopt.optim.distributed import Ranks
from kfacopt.optim.messages import Notices
from kfacopt.optim.reports import (
    report_exchange,
    report_missing,
    report_stale,
    report_uncompiled,
    report_unknown,
)
from kfacopt.optim.settings import Settings
from kfacopt.optim.state.curvature_state import CurvatureState
from kfacopt.optim.statistics.averaging import average_moments
from kfacopt.optim.statistics.moments import Moments
from kfacopt.optim.watch.loss_scale import calling_loss_scale


def take_pending(
    connection: Connection,
    curvature: CurvatureState,
    settings: Settings,
    params: Sequence[Parameter],
    step: int,
    ranks: Ranks,
    notices: Notices,
) -> dict[Layer, Moments]:
    """Return the statistics since the last step, without the loss scale; they are forgotten.

    Args:
        connection: Has the statistics.
        curvature: Tells which layers had statistics before.
        settings: Those of the whole optimizer.
        params: The parameters.
        step: The number of the step.
        ranks: The ranks that average.
        notices: Gives warnings once.

    Raises:
        RuntimeError: If there are gradients but no loss was recognised so far, or the ranks'
            optimizers differ.
    """
    watch, statistics = connection.watch, connection.statistics
    forward_seen, used = watch.forward_seen, watch.used
    unknown, ignored = watch.unknown_losses, watch.unknown_objectives
    reached, exchanged = statistics.reached, statistics.exchange.noticed()
    pending = statistics.finish()
    watch.forget()
    group: dist.ProcessGroup | None = ranks.group(params)
    due, form = settings.schedule.factors_due(step), settings.curvature.form
    report_exchange(notices, exchanged, group is None)
    if group is not None:
        ranks.refuse_different(params, curvature.layers, settings, step)
        pending = average_moments(pending, curvature.layers, form, group)
    if pending and settings.curvature.likelihood is None:
        report_unknown(notices, ignored)
    if pending and due:
        report_stale(notices, curvature, reached, pending)
    if not pending and not statistics.undercounted and (used or not forward_seen):
        report_missing(notices, curvature, forward_seen, unknown)
    if not due:  # here for new layers alone
        pending = {la: m for la, m in pending.items() if not curvature.has_statistics(la)}
    report_uncompiled(notices, watch, settings)
    loss_scale = calling_loss_scale() ** settings.curvature.loss_scale_power
    for moments in pending.values():
        moments.scale_curvature(1 / loss_scale)
    return pending
