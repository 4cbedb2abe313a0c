"""Sentences that follow from the numbers of a report, each with the number; no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kfacopt.diagnosis.report import (
    BLOCKS,
    EKFAC,
    GRADIENT,
    KFAC,
    OPTIMIZER,
    Advice,
    FactorReport,
    LayerReport,
    OutsideReport,
    StepReport,
)
from kfacopt.diagnosis.text import listed

# The thresholds of Levenberg and Marquardt's rule for a model's reduction ratio.
TOO_FAR, SAFE = 0.25, 0.75
# What counts as a difference: of distances, and of cosines.
CLOSER, BETTER = 0.95, 0.03
FAR = 1.0
MUCH_OUTSIDE = 0.5
MUCH_DRIFT = 0.5
MUCH_UNCOVERED = 0.2
# Softmax takes one direction of a last layer's G, which is no matter of the data.
FULL = 0.9


@dataclass(frozen=True)
class Findings:
    """What advice follows from.

    Attributes:
        layers: The blocks.
        steps: Directions, if they were compared.
        outside: The share of curvature outside of the blocks, if it was measured.
        other_approx: The name of K-FAC with the other of expand and reduce, if it differs.
        approx: The one in use.
        uncovered_share: The share of trained entries that are not covered.
        num_data: How many data were looked at.
    """

    layers: Sequence[LayerReport]
    steps: Sequence[StepReport]
    outside: OutsideReport | None
    other_approx: str | None
    approx: str
    uncovered_share: float
    num_data: int | None

    def step(self, name: str) -> StepReport | None:
        """Return a direction by its name."""
        return next((x for x in self.steps if x.step == name), None)

    def mean_distance(self, name: str) -> float | None:
        """Return the root of the mean squared relative distance over blocks that have it."""
        known = [x.distance[name] for x in self.layers if name in x.distance]
        known = [d for d in known if math.isfinite(d)]
        return math.sqrt(sum(d * d for d in known) / len(known)) if known else None


def advice_of(findings: Findings) -> tuple[Advice, ...]:
    """Return what follows, the most urgent first."""
    rules = (_damping, _steps, _outside, _far_blocks, _ranks, _overdamped)
    further = (_approximations, _running, _uncovered)
    return tuple(advice for rule in (*rules, *further) for advice in rule(findings))


def _damping(x: Findings) -> Iterator[Advice]:
    step = x.step(OPTIMIZER) or x.step(KFAC)
    if step is None or math.isnan(step.ratio):
        return
    data = "the data" if x.num_data is None else f"the {x.num_data} data"
    name = "K-FAC's step" if step.step == KFAC else "the optimizer's direction"
    if step.ratio < TOO_FAR:
        yield Advice(
            "damping",
            f"it is too small for this batch: {name}, at the length that the quadratic model likes "
            f"best, changes the loss of {data} by {step.ratio:.2f} of what the model says (below "
            f"{TOO_FAR}). Raise it, or take more data.",
            step.ratio,
        )
    elif step.held_out_ratio is not None and step.held_out_ratio <= 0:
        yield Advice(
            "damping",
            f"it is too small for this batch: {name} lowers the loss of {data} by {step.ratio:.2f} "
            f"of what the model says, and raises that of the data that follow "
            f"({step.held_out_ratio:.2f}). Raise it, or take more data.",
            step.held_out_ratio,
        )
    elif step.ratio > SAFE and (step.held_out_ratio is None or step.held_out_ratio > SAFE):
        held = step.held_out_ratio
        further = "" if held is None else f", and {held:.2f} on the data that follow"
        yield Advice(
            "damping",
            f"a smaller one may do: the loss of {data} follows the model for {name}, true change "
            f"over predicted {step.ratio:.2f}{further} (above {SAFE}).",
            step.ratio,
        )


def _steps(x: Findings) -> Iterator[Advice]:
    kfac, gradient, ekfac = x.step(KFAC), x.step(GRADIENT), x.step(EKFAC)
    if kfac is None or gradient is None:
        return
    if kfac.cosine <= gradient.cosine:
        yield Advice(
            "K-FAC or the gradient",
            f"K-FAC's step is no closer to the exact one than the gradient: cosine "
            f"{kfac.cosine:.2f} against {gradient.cosine:.2f}.",
            kfac.cosine - gradient.cosine,
        )
    if ekfac is not None and ekfac.cosine > kfac.cosine + BETTER:
        yield Advice(
            "EKFAC",
            f"its step is closer to the exact one: cosine {ekfac.cosine:.2f}, K-FAC's "
            f'{kfac.cosine:.2f}. Try preconditioner="ekfac".',
            ekfac.cosine - kfac.cosine,
        )
    exact, kf = x.mean_distance(EKFAC), x.mean_distance(KFAC)
    if exact is not None and kf is not None and exact < CLOSER * kf:
        yield Advice(
            "EKFAC",
            f"its blocks are closer to the exact ones: mean relative distance {exact:.2f}, K-FAC's "
            f"{kf:.2f}.",
            exact / kf,
        )


def _outside(x: Findings) -> Iterator[Advice]:
    blocks, kfac = x.step(BLOCKS), x.step(KFAC)
    if x.outside is not None and x.outside.share > MUCH_OUTSIDE:
        limit = (
            "" if blocks is None else f" The exact blocks' step has the cosine {blocks.cosine:.2f}."
        )
        yield Advice(
            "between layers",
            f"{x.outside.share:.0%} of the squared curvature is outside of the diagonal blocks, "
            f"where no block-diagonal method sees it.{limit}",
            x.outside.share,
        )
    if blocks is None or kfac is None:
        return
    if kfac.cosine > blocks.cosine - BETTER:
        yield Advice(
            "blocks",
            f"K-FAC's step is as good as that of the exact blocks, cosine {kfac.cosine:.2f} "
            f"against {blocks.cosine:.2f}: better factors gain nothing here.",
            kfac.cosine - blocks.cosine,
        )


def _far_blocks(x: Findings) -> Iterator[Advice]:
    far = {b.layer: b.distance[KFAC] for b in x.layers if b.distance.get(KFAC, 0.0) > FAR}
    if far:
        worst = max(far, key=far.__getitem__)
        yield Advice(
            "K-FAC's blocks",
            f"of {_count(len(far), x)} K-FAC's block is farther from the exact one than 0 is, the "
            f"farthest {worst} ({far[worst]:.2f}): {listed(list(far))}.",
            far[worst],
            tuple(far),
        )


def _factor(block: LayerReport, side: str) -> FactorReport:
    """Return a factor, of an optimizer the one that it keeps."""
    running = None if block.running is None else getattr(block.running, side)
    found: FactorReport = getattr(block, side) if running is None else running
    return found


def _ranks(x: Findings) -> Iterator[Advice]:
    for side in ("input_factor", "grad_output_factor"):
        low = [
            (b.layer, f.rank, f.full_rank)
            for b in x.layers
            if (f := _factor(b, side)).rank is not None and f.rank < FULL * f.full_rank
        ]
        if not low:
            continue
        name, rank, full = min(low, key=lambda entry: entry[1] / entry[2])
        kept = "" if x.num_data is None else f" ({x.num_data} data)"
        if any(b.running is not None for b in x.layers):
            kept = " (running factors)"
        title = "A" if side == "input_factor" else "G"
        yield Advice(
            "rank",
            f"{title} of {_count(len(low), x)} is rank deficient, {name} the most ({rank} of "
            f"{full}): {listed([entry[0] for entry in low])}. In the other directions damping "
            f"alone decides on the step's length{kept}; more data, or a longer average, fill them.",
            rank / full,
            tuple(entry[0] for entry in low),
        )


def _overdamped(x: Findings) -> Iterator[Advice]:
    def largest(b: LayerReport) -> float:
        sides = (b.input_factor.largest, b.grad_output_factor.largest)
        return math.inf if None in sides else math.prod(s for s in sides if s is not None)

    flat = {b.layer: b.damping.damping / largest(b) for b in x.layers if largest(b) > 0}
    flat = {name: ratio for name, ratio in flat.items() if ratio > 1}
    if flat:
        most = max(flat, key=flat.__getitem__)
        yield Advice(
            "damping",
            f"it is above all curvature of {_count(len(flat), x)}, {flat[most]:.3g} times the "
            f"largest eigenvalue in {most}: {listed(list(flat))}. There the step is the "
            "gradient's, scaled.",
            flat[most],
            tuple(flat),
        )


def _approximations(x: Findings) -> Iterator[Advice]:
    if x.other_approx is None:
        return
    own, other = x.mean_distance(KFAC), x.mean_distance(x.other_approx)
    kfac, step = x.step(KFAC), x.step(x.other_approx)
    if own is None or other is None:
        return
    name = "reduce" if x.approx == "expand" else "expand"
    numbers = f"mean relative distance {other:.2f} ({name}) and {own:.2f} ({x.approx})"
    if kfac is not None and step is not None:
        numbers += f", cosines of the steps {step.cosine:.2f} and {kfac.cosine:.2f}"
    gain = step.cosine - kfac.cosine if kfac is not None and step is not None else 0.0
    if other < CLOSER * own:
        further = f'Try kfac_approx="{name}".' if gain > -BETTER else "Its step is farther, though."
        sentence = f"{name}'s blocks are closer than those of {x.approx}: {numbers}. {further}"
    elif own < CLOSER * other:
        further = " Its step is farther, though." if gain > BETTER else ""
        sentence = f"{x.approx}'s blocks are closer than those of {name}: {numbers}.{further}"
    elif name == "reduce":
        sentence = f"reduce is as good as expand here, and costs less: {numbers}."
    else:
        sentence = f"expand is as good as reduce here, and costs more: {numbers}."
    yield Advice("expand or reduce", sentence, other / own if own else math.nan)


def _running(x: Findings) -> Iterator[Advice]:
    own, fresh = x.step(OPTIMIZER), x.step(KFAC)
    if own is not None and fresh is not None and own.cosine < fresh.cosine - BETTER:
        ages = [b.running.inverse_age for b in x.layers if b.running is not None]
        yield Advice(
            "running factors",
            f"the optimizer's direction has the cosine {own.cosine:.2f}, K-FAC's with factors of "
            f"this sample {fresh.cosine:.2f}; its inverses are up to {max(ages, default=0):.0f} "
            "steps old. Shorter factor_update_interval and inverse_update_interval, or a smaller "
            "ema_decay, follow faster.",
            fresh.cosine - own.cosine,
        )
    drifts = {
        b.layer: b.running.drift
        for b in x.layers
        if b.running is not None and b.running.drift is not None and b.running.drift > MUCH_DRIFT
    }
    if drifts:
        most = max(drifts, key=drifts.__getitem__)
        yield Advice(
            "running factors",
            f"those of {_count(len(drifts), x)} are far from this sample's, {most} the farthest "
            f"(relative distance {drifts[most]:.2f}): they lag, the samples are small, or the "
            "objective was another one (a factor on the loss).",
            drifts[most],
            tuple(drifts),
        )


def _uncovered(x: Findings) -> Iterator[Advice]:
    if x.uncovered_share > MUCH_UNCOVERED:
        yield Advice(
            "coverage",
            f"{x.uncovered_share:.0%} of the trained parameters have no curvature and are not "
            "looked at here; layers= adds embeddings and normalisations.",
            x.uncovered_share,
        )


def _count(number: int, x: Findings) -> str:
    return f"{number} of {len(x.layers)} blocks"
