"""Sentences that follow from the numbers of a report, each with the number; no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kfacopt.diagnosis.advice_on_damping import is_noisy, on_damping
from kfacopt.diagnosis.advice_on_ranks import on_ranks
from kfacopt.diagnosis.findings import Findings
from kfacopt.diagnosis.report import BLOCKS, EKFAC, GRADIENT, KFAC, OPTIMIZER, Advice
from kfacopt.diagnosis.text import listed

# What counts as a difference: of distances, and of cosines.
CLOSER, BETTER = 0.95, 0.03
FAR = 1.0
MUCH_OUTSIDE = 0.5
MUCH_DRIFT = 0.5
MUCH_UNCOVERED, SOME_UNCOVERED = 0.2, 0.05
# Of a step, in those of AdamW; and of a pass, in seconds, below which calls are most of it.
EXPENSIVE, SHORT = 1.2, 5e-4

# By the words in the reason that `coverage` gives: what can be done.
_CURES = {
    "which layers= does not name": (
        "layers=[*kfacopt.default_layers(), {kind}] gives them curvature, and docs/layers.md has "
        "measured whether that gains anything; else tune fallback_lr, at which AdamW trains them"
    ),
    "in no layer": (
        "kfacopt.register_layer makes a layer of yours known, docs/layers.md; else tune fallback_lr"
    ),
    "entry by entry": "else tune fallback_lr, at which AdamW trains them",
    "K-FAC knows nothing": "else tune fallback_lr, at which AdamW trains them",
    "not one of the optimizer's": "give them to KFACOptimizer, if it should train them",
    "in other ways": "use them by calls of their layer alone",
    "tied to a head": "the optimizer looks at them",
    "not used": "other data may use them",
    "shared": "call one module twice instead of sharing its weight",
}


def advice_of(findings: Findings) -> tuple[Advice, ...]:
    """Return what follows, the most important first."""
    rules = (_uncovered, on_damping, _cost, _fallback, _steps, _outside, _far_blocks, _running)
    further = (_closer_blocks, _approximations, on_ranks)
    return tuple(advice for rule in (*rules, *further) for advice in rule(findings))


def _uncovered(x: Findings) -> Iterator[Advice]:
    if x.uncovered_share <= MUCH_UNCOVERED:
        return
    shares = sorted(x.uncovered.items(), key=lambda item: -item[1])
    largest = [(why, share) for why, share in shares if share > SOME_UNCOVERED] or shares[:1]
    parts = []
    for reason, share in largest:
        cure = next((text for words, text in _CURES.items() if words in reason), "")
        cure = cure.format(kind=reason.removeprefix("in ").split(",")[0])
        parts.append(f"{share:.0%} {reason}" + (f" ({cure})" if cure else ""))
    yield Advice(
        "coverage",
        f"{x.uncovered_share:.0%} of the trained parameters are not looked at here, and all that "
        f"follows is of the other {1 - x.uncovered_share:.0%}: {'; '.join(parts)}.",
        x.uncovered_share,
    )


def _cost(x: Findings) -> Iterator[Advice]:
    cost = x.cost
    if cost is None or cost.step < EXPENSIVE * cost.adamw:
        return
    ratio = cost.step / cost.adamw
    sentence = (
        f"a step takes {ratio:.1f} times as long as one of AdamW: K-FAC is faster only where it "
        f"needs {ratio:.1f} times fewer steps."
    )
    if cost.pass_seconds < SHORT:
        sentence += (
            f" A forward and a backward pass take {1000 * cost.pass_seconds:.2g} ms here, most of "
            "the work is in the calls: larger batches make it matter less."
        )
    elif cost.plain is not None and cost.step > EXPENSIVE * cost.plain and not _lags(x):
        sentence += (
            " Steps in which nothing is due take "
            f"{cost.plain / cost.adamw:.1f}: longer factor_update_interval and "
            "inverse_update_interval save the rest."
        )
    yield Advice("cost", sentence, ratio)


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
            f'{kfac.cosine:.2f}. Try preconditioner="ekfac", whose steps cost more.',
            ekfac.cosine - kfac.cosine,
        )


def _closer_blocks(x: Findings) -> Iterator[Advice]:
    exact, kf = x.mean_distance(EKFAC), x.mean_distance(KFAC)
    if exact is not None and kf is not None and exact < CLOSER * kf:
        yield Advice(
            "EKFAC",
            f"its blocks are closer to the exact ones: mean relative distance{x.of_which} "
            f"{exact:.2f}, K-FAC's {kf:.2f}.",
            exact / kf,
        )


def _outside(x: Findings) -> Iterator[Advice]:
    blocks, kfac = x.step(BLOCKS), x.step(KFAC)
    if x.outside is not None and x.outside.share > MUCH_OUTSIDE:
        known = blocks is not None and not math.isnan(blocks.cosine)
        limit = ""
        if blocks is not None and known:
            limit = f" The exact blocks' step has the cosine {blocks.cosine:.2f}."
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
            "K-FAC's block is farther from the exact one than 0 is: that "
            f"{x.which(list(far), worst, f'distance {far[worst]:.2f}')}.",
            far[worst],
            tuple(far),
        )


def _approximations(x: Findings) -> Iterator[Advice]:
    if x.other_approx is None:
        return
    own, other = x.mean_distance(KFAC), x.mean_distance(x.other_approx)
    kfac, step = x.step(KFAC), x.step(x.other_approx)
    if own is None or other is None:
        return
    name = "reduce" if x.approx == "expand" else "expand"
    numbers = f"mean relative distance{x.of_which} {other:.2f} ({name}) and {own:.2f} ({x.approx})"
    known = kfac is not None and step is not None and not math.isnan(step.cosine - kfac.cosine)
    if kfac is not None and step is not None and known:
        numbers += f", cosines of the steps {step.cosine:.2f} and {kfac.cosine:.2f}"
    gain = 0.0
    if kfac is not None and step is not None and known:
        gain = step.cosine - kfac.cosine
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


def _fallback(x: Findings) -> Iterator[Advice]:
    by_rate: dict[float, list[str]] = {}
    for name, rate in x.fallback_lr.items():
        by_rate.setdefault(rate, []).append(name)
    if by_rate:
        parts = [f"{listed(names)} at {rate:g}" for rate, names in by_rate.items()]
        yield Advice(
            "fallback_lr",
            f"AdamW trains {', '.join(parts)}. Steps of K-FAC do not make up for a rate that does "
            "not suit these: try fallback_lr=3e-3 and 0.01, or AdamW's best.",
            max(by_rate),
        )


def _lags(x: Findings) -> bool:
    """Tell whether the optimizer's direction is worse than that of the sample's own factors."""
    own, fresh = x.step(OPTIMIZER), x.step(KFAC)
    return own is not None and fresh is not None and own.cosine < fresh.cosine - BETTER


def _running(x: Findings) -> Iterator[Advice]:
    own, fresh = x.step(OPTIMIZER), x.step(KFAC)
    if own is not None and fresh is not None and _lags(x):
        ages = [b.running.inverse_age for b in x.layers if b.running is not None]
        yield Advice(
            "running factors",
            f"the optimizer's direction has the cosine {own.cosine:.2f}, K-FAC's with factors of "
            f"this sample {fresh.cosine:.2f}; its inverses are up to {max(ages, default=0):.0f} "
            f"steps old. {_following(x)}",
            fresh.cosine - own.cosine,
        )
    drifts = {
        b.layer: b.running.drift
        for b in x.layers
        if b.running is not None and b.running.drift is not None and b.running.drift > MUCH_DRIFT
    }
    if drifts:
        most = max(drifts, key=drifts.__getitem__)
        number = f"relative distance {drifts[most]:.2f}"
        yield Advice(
            "running factors",
            f"those {x.which(list(drifts), most, number)} are far from this sample's: they lag, "
            "the samples are small, or the objective was another one (a factor on the loss).",
            drifts[most],
            tuple(drifts),
        )


def _following(x: Findings) -> str:
    """Say whether factors should follow faster."""
    average = f"They are averages over steps (ema_decay {x.settings.get('ema_decay', 0.9):g})"
    if is_noisy(x):
        return f"{average}, which is as it should be where gradients are noise."
    if x.settings.get("factor_update_interval") == 1 or x.settings.get("lr") == "auto":
        return f"{average}, updated in every one, so that other batches and parameters are in them."
    cost = "" if x.cost is None else f" (one with both costs {x.cost.inverses:.1f} passes)"
    return (
        "Shorter factor_update_interval and inverse_update_interval follow faster, and cost "
        f"time{cost}."
    )
