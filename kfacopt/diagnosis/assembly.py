"""From measurements to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from kfacopt.diagnosis import exact
from kfacopt.diagnosis.advice import advice_of
from kfacopt.diagnosis.candidates import Candidate
from kfacopt.diagnosis.distances import product_distance
from kfacopt.diagnosis.findings import Findings
from kfacopt.diagnosis.measurement import (
    Blocks,
    Parts,
    Solved,
    candidates_of,
    compare_directions,
    directions_of,
    exact_step,
    measure_blocks,
    measure_outside,
    whole_matrix,
)
from kfacopt.diagnosis.ranks import with_ranks_of_half
from kfacopt.diagnosis.report import (
    CLIPPED,
    KFAC,
    CostReport,
    Diagnosis,
    LayerReport,
    RunningReport,
    SampleReport,
    SolveReport,
    StepReport,
)
from kfacopt.diagnosis.spectra import describe_damping
from kfacopt.diagnosis.steps import cosine
from kfacopt.diagnosis.subject import Subject
from kfacopt.diagnosis.text import listed, two_digits
from kfacopt.linalg.kronecker import KroneckerProduct

# What is measured beside the blocks: steps of the progress bar.
OTHER_STEPS = 7
# Iterations that did not reach the tolerance are no matter where this was the cosine halfway.
SETTLED = 0.999

WITHOUT_CURVATURE = (
    "The exact GGN times the gradient is 0: the loss has no curvature in the model's predictions. "
    "K-FAC has the empirical Fisher, which is none, and there is nothing to compare it with."
)


def report_of(subject: Subject, changed: Sequence[str]) -> Diagnosis:
    """Measure, and return what was found, so far without cost and advice; see `complete`.

    Args:
        subject: What is examined.
        changed: What evaluation mode changed of what the model computes.
    """
    clock, own = subject.clock, subject.partition
    clock.expect(len(own.blocks) + OTHER_STEPS)
    clock.begin("gradient")
    ggn = subject.ggn(own.params, check=True)
    gradients, loss = ggn.gradient_and_loss()
    gradient = torch.cat([g.flatten() for g in gradients])
    if not bool(gradient.isfinite().all()):
        raise ValueError(
            f"model: at its parameters the gradient for data has NaN or infinite entries (loss "
            f"{float(loss)}), so that there is nothing to compare."
        )
    candidates = candidates_of(subject)
    clock.begin("exact step")
    matrix = whole_matrix(subject, ggn)
    has_curvature = bool((ggn @ gradient).any()) or not bool(gradient.any())
    solved = exact_step(subject, ggn, matrix, gradient, candidates[0]) if has_curvature else None
    if not has_curvature:
        subject.notes.append(WITHOUT_CURVATURE)
    blocks = measure_blocks(subject, candidates, own.split(gradient), matrix)
    clock.begin("outside of blocks")
    outside = measure_outside(subject, ggn, matrix, blocks)
    clock.begin("comparison")
    steps = directions_of(subject, candidates, blocks, gradient)
    compared: tuple[StepReport, ...] = ()
    best = solved[0] if solved is not None and solved[1].is_near else None
    if solved is not None and bool(gradient.any()):
        compared = compare_directions(subject, steps, best, gradient, ggn)
    layers = _layers(subject, candidates[0], blocks, steps, best, gradient)
    layers = with_ranks_of_half(subject, layers)
    trained = sum(p.numel() for p in subject.model.parameters() if p.requires_grad)
    return Diagnosis(
        float(loss),
        float(gradient.norm()),
        subject.plan.shown,
        _sample(subject),
        _solve(None if solved is None else solved[1]),
        compared,
        layers,
        outside,
        subject.coverage.uncovered,
        1 - sum(own.sizes) / trained,
        tuple(_notes(subject, changed, solved, blocks, bool(gradient.any()))),
        (),
        clock.seconds,
        fallback_lr=_fallback(subject),
    )


def _fallback(subject: Subject) -> dict[str, float]:
    """Return at which rates AdamW trains what is not covered."""
    seen, named = subject.plan.inspection, dict(subject.model.named_parameters())
    rates = {} if seen is None else seen.fallback_lr
    uncovered = subject.coverage.uncovered
    return {name: rates[named[name]] for name in uncovered if named[name] in rates}


def complete(
    report: Diagnosis, subject: Subject, cost: CostReport | None, no_cost: str | None
) -> Diagnosis:
    """Return a report with what a step costs, or why not, and the advice that follows from all."""
    names = [name for layer in report.layers for name in layer.distance]
    names += [step.step for step in report.steps]
    findings = Findings(
        report.layers,
        report.steps,
        report.outside,
        next((name for name in names if name.startswith(f"{KFAC} ")), None),
        subject.options.approx,
        report.uncovered_share,
        report.sample.num_data,
        _by_reason(subject),
        report.settings,
        cost,
        report.fallback_lr,
    )
    notes, seconds = report.notes + (() if no_cost is None else (no_cost,)), subject.clock.seconds
    advice = advice_of(findings)
    return replace(report, cost=cost, notes=notes, advice=advice, seconds=seconds)


def _by_reason(subject: Subject) -> dict[str, float]:
    """Return by reason the share of trained entries that are not covered for it."""
    sizes = {name: p.numel() for name, p in subject.model.named_parameters() if p.requires_grad}
    shares: dict[str, float] = {}
    for name, reason in subject.coverage.uncovered.items():
        shares[reason] = shares.get(reason, 0.0) + sizes[name] / sum(sizes.values())
    return shares


def _solve(solve: exact.Solve | None) -> SolveReport | None:
    return None if solve is None else SolveReport(**asdict(solve))


def _layers(
    subject: Subject,
    kfac: Candidate,
    found: Blocks,
    steps: Parts,
    exact_step: Tensor | None,
    gradient: Tensor,
) -> tuple[LayerReport, ...]:
    own, squared = subject.partition, float(gradient.double().square().sum())
    best = None if exact_step is None or not squared else own.split(exact_step)
    layers = []
    for i, (name, g) in enumerate(zip(own.names, own.split(gradient), strict=True)):
        matrix = kfac.matrices[i]
        assert isinstance(matrix, KroneckerProduct)
        A, G, damping = describe_damping(matrix, own.damping[i], subject.options.method)
        cosines = {}
        for step, parts in steps.items():
            part = parts[i]
            if best is not None and part is not None and step != CLIPPED:
                cosines[step] = cosine(part, best[i])
        layer = LayerReport(
            name,
            own.sizes[i],
            found.estimator[i],
            {c: x[0] for c, x in found.distance[i].items()},
            {c: x[1] for c, x in found.distance[i].items()},
            cosines,
            float(g.double().square().sum()) / squared if squared else float("nan"),
            _solve(found.solve[i]),
            A,
            G,
            damping,
            _running(subject, i, matrix),
        )
        layers.append(layer)
    return tuple(layers)


def _running(subject: Subject, index: int, fresh: KroneckerProduct) -> RunningReport | None:
    seen, block = subject.plan.inspection, subject.partition.blocks[index]
    kept = None if seen is None else seen.blocks.get(tuple(map(id, block.parameters)))
    if kept is None:
        return None
    drift = A = G = None
    if isinstance(kept.matrix, KroneckerProduct):
        drift = product_distance(kept.matrix, fresh)
        damping, method = subject.partition.damping[index], subject.options.method
        A, G, _ = describe_damping(kept.matrix, damping, method)
    ages = kept.scalars["factor_age"], kept.scalars["inverse_age"]
    return RunningReport(drift, kept.scalars["condition"], *ages, A, G)


def _sample(subject: Subject) -> SampleReport:
    sample, options = subject.sample, subject.options.operator
    return SampleReport(
        len(sample.batches),
        sample.num_data,
        bool(sample.held_out),
        subject.coverage.operations,
        options["fisher_type"],
        options["mc_samples"],
        subject.limits.seed,
        sum(subject.partition.sizes),
    )


def _notes(
    subject: Subject,
    changed: Sequence[str],
    solved: Solved | None,
    blocks: Blocks,
    has_gradient: bool,
) -> list[str]:
    notes = list(subject.notes)
    if subject.clock.cut:
        seconds, what = subject.limits.max_seconds, listed(subject.clock.cut)
        notes.append(f"Time ran out (max_seconds={seconds:g}); not measured: {what}.")
    if changed:
        notes.append(
            f"The model was in training mode; it is looked at in evaluation mode: "
            f"{' and '.join(changed)}."
        )
    if solved is None and WITHOUT_CURVATURE not in notes:
        notes.append(
            "There is no exact step: the loss is not convex in the predictions, so that the "
            "damped GGN is not positive definite; K-FAC has the positive part."
        )
    elif solved is not None and not solved[1].converged and solved[1].halfway < SETTLED:
        notes.append(_of_exact_step(solved[1], subject.limits.max_seconds))
    notes += _of_blocks(blocks.solve)
    if not has_gradient:
        notes.append("The gradient is 0: there are no steps to compare.")
    return notes


def _of_exact_step(solve: exact.Solve, max_seconds: float) -> str:
    """Say how far the iterations came, and what helps."""
    cure = "More damping or fewer data help."
    if solve.enough_seconds is not None:
        enough = two_digits(solve.enough_seconds)
        cure = f"Time was too short (max_seconds={max_seconds:g}): max_seconds={enough} is enough "
        cure += "for all iterations that are allowed; more damping or fewer data help, too."
    count = "1 iteration" if solve.iterations == 1 else f"{solve.iterations} iterations"
    begin = f"Conjugate gradients stopped at the relative residual {solve.residual:.1e}"
    if not solve.is_near:
        return (
            f"{begin} after {count}, so that the exact step is not known, and nothing is "
            f"compared with it. {cure}"
        )
    return (
        f"{begin}. Cosines are to where they came, to which the iterate at about half the "
        f"iterations has the cosine {solve.halfway:.2f}. {cure}"
    )


def _of_blocks(solves: Sequence[exact.Solve | None]) -> list[str]:
    """Say how far the iterations on blocks came."""
    known = [x for x in solves if x is not None]
    shown = [x for x in known if x.is_near]
    notes = []
    if len(shown) < len(known):
        notes.append(
            f"The steps of {len(known) - len(shown)} exact blocks are not shown: their relative "
            f"residuals stayed above {exact.LARGEST_RESIDUAL}, and the iterates after half of the "
            f"iterations have cosines below {exact.SMALLEST_COSINE} to the last ones."
        )
    worst = max((x.residual for x in shown), default=0.0)
    if worst > 10 * exact.TOLERANCE:
        halfway = min(x.halfway for x in shown)
        notes.append(
            f"The exact blocks' steps that are shown have relative residuals of up to {worst:.1e}, "
            f"and cosines of at least {halfway:.2f} to the iterates after half of the iterations."
        )
    return notes
