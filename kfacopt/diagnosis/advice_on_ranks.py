"""What follows from factors that lack rank: whether more data fill it, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from kfacopt.diagnosis.findings import Findings
from kfacopt.diagnosis.report import Advice, FactorReport, LayerReport

# More data fill a factor that has so many times the rank of half of them.
FILLED = 1.25
# Zeros are the reason where so much of what is missing is theirs.
MOST = 0.9

Cause = Literal["data", "zeros", "constants", "dependent", "unknown"]

_TITLES = {"input_factor": "A", "grad_output_factor": "G"}


def on_ranks(x: Findings) -> Iterator[Advice]:
    """Say of factors that lack rank why they do, the reasons that can be cured first."""
    found: dict[tuple[str, Cause], dict[str, FactorReport]] = {}
    for side in _TITLES:
        for layer in x.layers:
            shown = factor_of(layer, side)
            if shown.lacks_rank:
                cause = cause_of(getattr(layer, side), x.num_data)
                found.setdefault((side, cause), {})[layer.layer] = shown
    order: list[Cause] = ["data", "unknown", "zeros", "dependent", "constants"]
    for cause in order:
        for side in _TITLES:
            if (side, cause) in found:
                yield _advice(x, side, cause, found[side, cause])


def factor_of(block: LayerReport, side: str) -> FactorReport:
    """Return a factor, of an optimizer the one that it keeps."""
    running = None if block.running is None else getattr(block.running, side)
    found: FactorReport = getattr(block, side) if running is None else running
    return found


def cause_of(own: FactorReport, num_data: int | None) -> Cause:
    """Return why a factor lacks rank.

    Args:
        own: The factor of the sample, whatever the optimizer keeps.
        num_data: How many data were looked at.
    """
    if own.rank is None:
        return "unknown"
    if not own.lacks_rank:  # so much data are enough; the optimizer has seen less
        return "data"
    missing = own.full_rank - own.rank
    if own.blind and missing == 1:
        return "constants"
    if own.rank_of_half is None:
        return "data" if num_data is not None and own.rank <= num_data else "unknown"
    if own.rank >= FILLED * own.rank_of_half:
        return "data"
    return "zeros" if own.zeros >= MOST * missing else "dependent"


def _advice(x: Findings, side: str, cause: Cause, factors: dict[str, FactorReport]) -> Advice:
    def share(name: str) -> float:
        return (factors[name].rank or 0) / factors[name].full_rank

    title, most = _TITLES[side], min(factors, key=share)
    factor, names = factors[most], tuple(factors)
    number = f"{factor.rank} of {factor.full_rank}"
    which = x.which(names, most, number)
    own = next(getattr(b, side) for b in x.layers if b.layer == most)
    zeros = f"; {own.zeros} of them are 0 for all data looked at" if own.zeros else ""
    topic = "dead units" if (title, cause) == ("G", "zeros") else "rank"
    return Advice(
        topic,
        f"{title} {which} {_SENTENCES[title, cause].format(own=own, zeros=zeros)}",
        share(most),
        names,
    )


_ALONE = "In the other directions damping alone decides on the step's length"
_SAME = "Half of the data have nearly the same rank ({own.rank_of_half}, all {own.rank})"
_UNKNOWN = f"lacks rank. {_ALONE}."
_SENTENCES = {
    ("A", "data"): f"lacks rank: there are too few data. {_ALONE}; larger batches fill them.",
    ("G", "data"): f"lacks rank: there are too few data. {_ALONE}; larger batches fill them.",
    ("A", "unknown"): _UNKNOWN,
    ("G", "unknown"): _UNKNOWN,
    ("A", "zeros"): (
        "lacks rank: {own.zeros} of its {own.full_rank} inputs are 0 for all data looked at: empty "
        "features, or dead units of the layer before. Their weights have no gradient, and damping "
        "does not matter to them."
    ),
    ("G", "zeros"): (
        "lacks rank: {own.zeros} of its {own.full_rank} outputs have no gradient for any of the "
        "data looked at: dead units, if ReLUs follow. They do not come back by themselves: a "
        "smaller kl_clip (1e-6) or lr at the start, a normalisation before the ReLUs, or other "
        "activations."
    ),
    ("A", "dependent"): (
        f"lacks rank for good. {_SAME}, so more data hardly fill it: inputs are constant or "
        "collinear (one-hot columns beside the bias, features that are sums of others), or come "
        "out of fewer units{zeros}. That is no fault: steps in the other directions are 0."
    ),
    ("G", "dependent"): (
        f"lacks rank for good. {_SAME}, so more data hardly fill it: gradients of the outputs "
        "depend on each other, as before a narrower layer, a softmax or a normalisation{zeros}. "
        "That is no fault."
    ),
    ("A", "constants"): "lacks one direction: the sum of its inputs is 0. That is no fault.",
    ("G", "constants"): (
        "lacks one direction, that of a number which is added to all outputs: cross entropy does "
        "not see it, so its G has the rank C − 1 whatever the data. That is no fault."
    ),
}
