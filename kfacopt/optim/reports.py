"""What an optimizer says of a step's statistics; the sentences are in `messages`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kfacopt.kfac.layers import Block, Layer
from kfacopt.optim.messages import (
    Notices,
    log_new_layer,
    missing_statistics,
    stale_factors,
    uncompiled_cause,
    unwrapped_averaging,
    without_curvature,
)
from kfacopt.optim.settings import Settings
from kfacopt.optim.state.curvature_state import CurvatureState
from kfacopt.optim.statistics.moments import Moments
from kfacopt.optim.watch.watch import Watch


def report_skipped(notices: Notices, names: Iterable[str]) -> None:
    """Tell of a step that was skipped, as the gradients of parameters are not finite."""
    notices.warn(
        "skipped",
        f"the step is skipped: gradients have NaN or infinite entries ({', '.join(names)}). "
        "statistics()['skipped_steps'] counts such steps.",
    )


def report_exchange(notices: Notices, exchanged: bool, alone: bool) -> None:
    """Tell of gradients that are averaged without a wrapper."""
    if exchanged and alone:
        notices.warn("exchanged", unwrapped_averaging())


def report_unknown(notices: Notices, ignored: set[str]) -> None:
    """Tell of terms of the objective whose curvature is not known."""
    if ignored:
        notices.warn(
            "ignored-loss",
            f"the objective contains {', '.join(sorted(ignored))}, whose curvature is not "
            "known: it counts by its gradient alone.",
        )


def report_missing(
    notices: Notices, curvature: CurvatureState, forward_seen: bool, unknown_losses: set[str]
) -> None:
    """Tell of gradients without statistics.

    Raises:
        RuntimeError: If there were never any.
    """
    owned = [p for layer in curvature.layers for p in (layer.weight, layer.bias)]
    if not any(p is not None and p.grad is not None for p in owned):
        return
    cause = missing_statistics(forward_seen, unknown_losses)
    if not any(curvature.has_statistics(layer) for layer in curvature.layers):
        raise RuntimeError(f"KFACOptimizer: {cause}")
    notices.warn("missing-loss", f"{cause} The step uses the curvature of earlier steps.")


def report_stale(
    notices: Notices,
    curvature: CurvatureState,
    reached: Iterable[Layer],
    pending: Mapping[Layer, Moments],
) -> None:
    """Tell of layers that had statistics before, and have a gradient without any now."""
    for layer in reached:
        if layer not in pending and curvature.has_statistics(layer):
            notices.warn(f"stale {layer.name}", stale_factors(layer))


def report_uncompiled(notices: Notices, watch: Watch, settings: Settings) -> None:
    """Tell where `torch.compile` has no effect at all."""
    interval = 1 if settings.steps.tuned else settings.schedule.factor_update_interval
    kind = watch.uncompiled
    cause = None if kind is None else uncompiled_cause(kind, interval)
    if cause is not None:
        notices.warn("uncompiled", cause)


def report_without_inverse(
    notices: Notices, block: Block, waiting: bool, undercounted: set[Layer]
) -> None:
    """Tell of a block that the fallback trains, though it is in a layer.

    Args:
        notices: Gives warnings once.
        block: The block.
        waiting: Whether its layer is new since the forward pass.
        undercounted: The layers that are used otherwise, too, than by calls of their modules.
    """
    if waiting:
        log_new_layer(block.layer)
    else:
        otherwise = block.layer in undercounted
        notices.warn(f"uncaptured {block.layer.name}", without_curvature(block.layer, otherwise))
