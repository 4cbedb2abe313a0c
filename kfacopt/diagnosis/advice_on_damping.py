"""What follows from how far the loss follows the quadratic model: noise, and damping."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kfacopt.diagnosis.findings import Findings
from kfacopt.diagnosis.report import CLIPPED, GRADIENT, KFAC, OPTIMIZER, Advice, StepReport

# The thresholds of Levenberg and Marquardt's rule for a model's reduction ratio.
TOO_FAR, SAFE = 0.25, 0.75

_NAMES = {
    KFAC: "K-FAC's full step (the optimizer's are shorter: kl_clip)",
    OPTIMIZER: "the optimizer's direction, at full length",
    CLIPPED: "the optimizer's clipped step",
}


def on_damping(x: Findings) -> Iterator[Advice]:
    """Say whether steps hold on the sample and on other data, and what damping has to do with it.

    More damping makes the step the gradient's. So it is the cure only where the gradient's own step
    holds better.
    """
    full, gradient = x.step(OPTIMIZER) or x.step(KFAC), x.step(GRADIENT)
    flat = overdamped(x)
    if full is not None and not math.isnan(full.ratio):
        taken = x.step(CLIPPED) or full
        is_flat = _is_flat(x, flat)
        found = None if is_flat else _too_far(x, taken, gradient)
        found = found or _noise(x, taken, gradient)
        found = found or (None if is_flat else _rises(x, taken, gradient)) or _smaller(x, full)
        if found is not None:
            yield found
    if flat:
        most = max(flat, key=flat.__getitem__)
        number = f"{flat[most]:.3g} times the largest eigenvalue"
        yield Advice(
            "damping",
            f"it is above all curvature {x.which(list(flat), most, number)}. There the step is the "
            "gradient's, scaled.",
            flat[most],
            tuple(flat),
        )


def overdamped(x: Findings) -> dict[str, float]:
    """Return by block δ over the largest eigenvalue, where that is above 1."""
    found = {}
    for b in x.layers:
        sides = (b.input_factor.largest, b.grad_output_factor.largest)
        largest = math.prod(s for s in sides if s is not None)
        if None not in sides and 0 < largest < b.damping.damping:
            found[b.layer] = b.damping.damping / largest
    return found


def is_noisy(x: Findings) -> bool:
    """Tell whether what is learned from the sample does not hold for other data."""
    full, gradient = x.step(OPTIMIZER) or x.step(KFAC), x.step(GRADIENT)
    return full is not None and _noise(x, x.step(CLIPPED) or full, gradient) is not None


def _is_flat(x: Findings, flat: dict[str, float]) -> bool:
    """Tell whether most of the gradient is where damping is above all curvature."""
    return sum(b.gradient_share for b in x.layers if b.layer in flat) > 0.5


def _noise(x: Findings, taken: StepReport, gradient: StepReport | None) -> Advice | None:
    held, own = (None if s is None else s.held_out_ratio for s in (gradient, taken))
    if held is None or own is None or not (held < TOO_FAR and own < TOO_FAR):
        return None
    assert gradient is not None
    tuned = x.settings.get("lr") == "auto"
    shorter = "shorter steps (a schedule, a smaller kl_clip)"
    if tuned:
        shorter = 'a number for lr, since lr="auto" is for large or full batches'
    return Advice(
        "noise",
        f"the gradient of {x.data} is mostly of these data alone: along it their loss falls by "
        f"{gradient.ratio:.2f} of what the quadratic model says, that of the data that follow by "
        f"{held:.2f}; along {_NAMES[taken.step]} by {taken.ratio:.2f} and {own:.2f}. The gradient "
        "has no damping, so more of it is no cure. What is learned from one batch does not hold "
        f"for others: larger batches, a longer average of gradients (momentum) or {shorter}.",
        held,
    )


def _too_far(x: Findings, taken: StepReport, gradient: StepReport | None) -> Advice | None:
    if not taken.ratio < TOO_FAR:
        return None
    name = _NAMES[taken.step]
    if gradient is not None and gradient.ratio < TOO_FAR and taken.step != CLIPPED:
        return Advice(
            "step length",
            f"the quadratic model does not hold as far as it likes to go: the loss of {x.data} "
            f"falls by {taken.ratio:.2f} of what it says along {name}, and by "
            f"{gradient.ratio:.2f} along the gradient. Short steps cure that, of kl_clip or of "
            'lr="auto".',
            taken.ratio,
        )
    further = ", or lower kl_clip" if taken.step == CLIPPED else ""
    return Advice(
        "damping",
        f"it is too small for this batch: {name} lowers the loss of {x.data} by "
        f"{taken.ratio:.2f} of what the quadratic model says (below {TOO_FAR}). Raise "
        f"it{further}, or take more data.",
        taken.ratio,
    )


def _rises(x: Findings, taken: StepReport, gradient: StepReport | None) -> Advice | None:
    name = _NAMES[taken.step]
    held = taken.held_out_ratio
    if held is None or held > 0 or gradient is None or not gradient.held_out_ratio:
        return None
    return Advice(
        "damping",
        f"it is too small for this batch: {name} lowers the loss of {x.data} by {taken.ratio:.2f} "
        f"of what the quadratic model says, and raises that of the data that follow ({held:.2f}), "
        f"where the gradient lowers both ({gradient.held_out_ratio:.2f}). Raise it, or take more "
        "data.",
        held,
    )


def _smaller(x: Findings, full: StepReport) -> Advice | None:
    held = full.held_out_ratio
    if full.ratio <= SAFE or (held is not None and held <= SAFE):
        return None
    further = "" if held is None else f", and {held:.2f} on the data that follow"
    return Advice(
        "damping",
        f"a smaller one may do: the loss of {x.data} follows the quadratic model for "
        f"{_NAMES[full.step]}, true change over predicted {full.ratio:.2f}{further} (above "
        f"{SAFE}).",
        full.ratio,
    )
