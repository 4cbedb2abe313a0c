"""A report as aligned tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfacopt.diagnosis.report import CostReport, Diagnosis, FactorReport, LayerReport

WIDTH = 100


def of(report: Diagnosis) -> str:
    """Return the whole text."""
    parts = [_head(report), _steps(report), _distances(report)]
    parts += [_cosines(report)] if any(layer.cosine for layer in report.layers) else []
    parts += [_factors(report)]
    parts += [] if report.cost is None else [_cost(report.cost)]
    if any(layer.running is not None for layer in report.layers):
        parts.append(_running(report))
    if report.uncovered:
        parts.append(_uncovered(report))
    if report.notes:
        parts.append("\n".join(_bullet(note) for note in report.notes))
    if report.advice:
        lines = [_bullet(f"{a.topic}: {a.sentence}") for a in report.advice]
        parts.append("What follows:\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _uncovered(report: Diagnosis) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.uncovered.items():
        by_reason.setdefault(reason, []).append(name)
    rows = [(listed(names), reason) for reason, names in by_reason.items()]
    title = f"Not covered, {report.uncovered_share:.1%} of the trained parameters:"
    return f"{title}\n{table(('parameters', 'why'), rows, left=2)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return an aligned table.

    Args:
        head: The titles of the columns.
        rows: The cells.
        left: How many columns are text; the others are numbers.
    """
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(x: float | None, digits: int = 3) -> str:
    """Return a number with some digits, or a dash."""
    if x is None or math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞"
    return f"{x:.{digits}g}"


def fixed(x: float | None) -> str:
    """Return a number with three decimals, or a dash."""
    return "–" if x is None or math.isnan(x) else f"{x:.3f}"


def title_of(layer: str) -> str:
    """Return what a table calls a block; the model itself has no name."""
    return layer or "(model)"


def two_digits(seconds: float) -> str:
    """Return a number of seconds, rounded up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(max(seconds, 1e-9))) - 1)
    return f"{max(math.ceil(seconds / unit) * unit, 1):.6g}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of several."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _bullet(sentence: str) -> str:
    return fill(
        sentence, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
    )


def _head(report: Diagnosis) -> str:
    s = report.sample
    data = "data that are not counted" if s.num_data is None else f"{s.num_data} data"
    batches = "1 batch" if s.num_batches == 1 else f"{s.num_batches} batches"
    fisher = s.fisher_type
    if fisher == "mc":
        fisher += f" with {s.mc_samples} label{'s' if s.mc_samples > 1 else ''} a datum"
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    return "\n".join(
        [
            f"K-FAC beside the exact GGN: {s.num_parameters:,} parameters, {data} of {batches}, "
            f"loss {report.loss:.4g}, gradient {report.gradient_norm:.3g}",
            f"Fisher of K-FAC: {fisher} (seed {s.seed}); {settings}; {report.seconds:.0f} s",
        ]
    )


def _steps(report: Diagnosis) -> str:
    if report.solve is None:
        return "No step is compared: see below."
    is_known = any(not math.isnan(x.cosine) for x in report.steps)
    rows = []
    for x in report.steps:
        to_exact = (fixed(x.cosine), _share(x.decrease)) if is_known else ()
        name = x.step if x.step != "clipped step" else f"{x.step} ({number(x.length, 2)} of it)"
        rows.append((name, *to_exact, fixed(x.ratio), fixed(x.held_out_ratio)))
    how = report.solve
    way = "a dense matrix" if how.method == "solved" else f"{how.iterations} iterations of CG"
    closing = "" if how.converged else f", not converged, halfway {how.halfway:.2f}"
    title = f"Steps beside the exact (F + δI)⁻¹ g ({way}, residual {how.residual:.1e}{closing}):"
    if not is_known:
        title = f"Steps; the exact one was not found ({way}, residual {how.residual:.1e}):"
    to_exact = ("cosine", "best decrease") if is_known else ()
    head = ("step", *to_exact, "true / model", "on held-out data")
    text = f"{title}\n{table(head, rows)}"
    if report.outside is not None:
        outside = report.outside
        error = f" ± {outside.error:.1%}" if outside.error else ""
        text += f"\n{outside.share:.1%}{error} of ‖F‖² is outside of the layers' diagonal blocks."
    return text


def _share(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.1%}"


def _cost(x: CostReport) -> str:
    kinds = {"nothing due": x.plain, "factors due": x.factors, "inverses due, too": x.inverses}
    due = ", ".join(f"{name} {value:.1f}" for name, value in kinds.items() if value is not None)
    return (
        f"A step takes {x.step:.1f} forward and backward passes ({due}),\none of AdamW "
        f"{x.adamw:.1f}; a pass takes {1000 * x.pass_seconds:.3g} ms on the first batch."
    )


def _with_error(layer: LayerReport, name: str) -> str:
    error = layer.distance_error.get(name)
    return fixed(layer.distance.get(name)) + (f" ± {error:.2f}" if error else "")


def _distances(report: Diagnosis) -> str:
    names = list(dict.fromkeys(n for layer in report.layers for n in layer.distance))
    rows = [
        (
            title_of(layer.layer),
            layer.estimator,
            f"{layer.size:,}",
            *(_with_error(layer, name) for name in names),
        )
        for layer in report.layers
    ]
    title = "Relative Frobenius distance of blocks to the exact ones, ‖M − F‖ / ‖F‖:"
    return f"{title}\n{table(('block', 'measured', 'parameters', *names), rows, left=2)}"


def _cosines(report: Diagnosis) -> str:
    names = list(dict.fromkeys(n for layer in report.layers for n in layer.cosine))
    rows = [
        (
            title_of(layer.layer),
            f"{layer.gradient_share:.1%}",
            *(fixed(layer.cosine.get(name)) for name in names),
        )
        for layer in report.layers
    ]
    title = "Cosine of the steps' parts to the exact step's, and the share of ‖g‖²:"
    return f"{title}\n{table(('block', 'of ‖g‖²', *names), rows)}"


def _factors(report: Diagnosis) -> str:
    rows = [
        (
            title_of(layer.layer),
            *_factor(layer.input_factor),
            *_factor(layer.grad_output_factor),
            number(layer.damping.damping),
            number(layer.damping.pi),
            number(layer.damping.relative),
            "–" if math.isnan(layer.damping.share_below) else f"{layer.damping.share_below:.0%}",
        )
        for layer in report.layers
    ]
    sides = [f"{title} {side}" for side in "AG" for title in ("rank", "cond", "damped")]
    head = ("block", *sides, "δ", "π", "δ / mean", "below δ")
    title = (
        "Factors A and G: rank of side, condition without and with damping; δ beside G ⊗ A, its "
        "mean\neigenvalue, and the share of its eigenvalues below δ:"
    )
    return f"{title}\n{table(head, rows)}"


def _factor(x: FactorReport) -> tuple[str, str, str]:
    full = x.full_rank
    rank = f"diag {full}" if x.rank is None and x.diagonal else f"{number(x.rank, 6)}/{full}"
    return rank, number(x.condition, 2), number(x.damped_condition, 2)


def _running(report: Diagnosis) -> str:
    rows = []
    for layer in report.layers:
        x = layer.running
        if x is not None:
            sides = (x.input_factor, x.grad_output_factor)
            ranks = ("–" if side is None else _factor(side)[0] for side in sides)
            ages = (number(x.factor_age), number(x.inverse_age))
            rows.append((title_of(layer.layer), fixed(x.drift), *ranks, number(x.condition), *ages))
    head = ("block", "drift", "rank A", "rank G", "damped cond", "factor age", "inverse age")
    return f"The optimizer's running factors, beside those of the sample:\n{table(head, rows)}"
