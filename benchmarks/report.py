"""The report of a comparison: tables in Markdown, pictures, and a summary as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import draw_curves, draw_profiles, draw_sensitivity
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import Comparison, write_json
from benchmarks.scoring import (
    REFERENCE,
    Outcome,
    outcomes,
    relative_to_best,
    score,
    sensitivity,
)
from benchmarks.step_tables import markdown
from benchmarks.tuning import DEFAULT

Found = Mapping[str, Mapping[str, Outcome]]
KINDS = {"tuned": True, "defaults": False}
MEASURES = {"seconds": "Seconds", "steps": "Steps", "gradients": "Gradient evaluations"}
SIBLINGS = ("EKFAC", "K-FAC auto")
HEADLINES = 3  # the parts of the report before the tables of each kind


def number(value: float, digits: int = 2) -> str:
    """Return a number for a table; a miss is a dash."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _cell(median: float, values: list[float], unit: float) -> str:
    """Return a median and the range over seeds, where they differ."""
    low, high = number(min(values) / unit), number(max(values) / unit)
    text = number(median / unit)
    return text if low == high else f"{text} ({low}…{high})"


def _ratio_table(found: Found, comparison: Comparison, attribute: str) -> str:
    """Return time or steps to target, as ratios to the tuned AdamW's median, with their spread."""
    names = [c.name for c in comparison.contestants]
    rows = []
    reference = outcomes(comparison, tuned=True)
    for problem, row in found.items():
        unit = math.inf
        if REFERENCE in reference[problem]:
            unit = getattr(reference[problem][REFERENCE], f"median_{attribute}")
        absolute = not math.isfinite(unit)
        cells = []
        for name in names:
            if name not in row:
                cells.append("")
                continue
            median, values = (getattr(row[name], key) for key in (f"median_{attribute}", attribute))
            cells.append(_cell(median, values, 1.0 if absolute else unit))
        rows.append([f"{problem}{' *' if absolute else ''}", *cells])
    return markdown(["", *names], rows)


def _metric_table(found: Found, comparison: Comparison) -> str:
    names = [c.name for c in comparison.contestants]
    rows = []
    for problem, row in found.items():
        target = comparison.target(problem)
        goal = ""
        if target is not None:
            trial = "defaults" if target["trial"] == DEFAULT.name else f"trial {target['trial']}"
            goal = f"{target['value']:.3g} ({target['holder']}, {trial})"
        best = [f"{row[n].median_best:.3g}" if n in row else "" for n in names]
        rows.append([problem, PROBLEMS[problem].metric, goal, *best])
    return markdown(["", "metric", "target", *names], rows)


def _times(found: Found) -> dict[str, dict[str, float]]:
    return {p: {n: o.median_seconds for n, o in row.items()} for p, row in found.items() if row}


def _shares(comparison: Comparison) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = {}
    for contestant in comparison.contestants:
        own = {
            p: sensitivity(comparison, p, contestant)
            for p in comparison.options.problems
            if contestant.enters(p)
        }
        known = {p: share for p, share in own.items() if share is not None}
        if known:
            shares[contestant.name] = known
    return shares


def summary(comparison: Comparison) -> dict[str, Any]:
    """Return scores, ratios to the best, and sensitivity."""
    shares = _shares(comparison)
    scores: dict[str, Any] = {}
    for kind, tuned in KINDS.items():
        times = _times(outcomes(comparison, tuned))
        ratios = relative_to_best(times)
        scores[kind] = {name: score(own) for name, own in ratios.items()}
        scores[f"{kind}, ratios to the best"] = ratios
        if tuned:  # each of ours can but lower the others' scores: once more with one of them
            alone = {
                problem: {name: seconds for name, seconds in row.items() if name not in SIBLINGS}
                for problem, row in times.items()
            }
            ratios = relative_to_best(alone)
            scores["tuned, one of ours"] = {name: score(own) for name, own in ratios.items()}
    return {"scores": scores, "sensitivity": shares}


def _score_table(found: Mapping[str, Any], comparison: Comparison) -> str:
    rows = []
    for name in (c.name for c in comparison.contestants):
        own = found["scores"]["tuned, ratios to the best"].get(name, {})
        shares = found["sensitivity"].get(name, {})
        entered = len(own) / len(comparison.options.problems)
        scores = [number(found["scores"][kind].get(name, math.inf)) for kind in KINDS]
        worst = number(max(own.values(), default=math.inf), 1)
        missed = sum(not math.isfinite(ratio) for ratio in own.values())
        overall = number(entered * found["scores"]["tuned"].get(name, math.inf))
        alone = number(found["scores"]["tuned, one of ours"].get(name, math.inf))
        share = number(sum(shares.values()) / len(shares)) if shares else ""
        rows.append([name, str(len(own)), *scores, overall, alone, worst, str(missed), share])
    header = ["", "problems", "score, tuned", "score, defaults", "tuned, on all problems"]
    header += ["tuned, one K-FAC", "worst / best", "missed"]
    return markdown([*header, "trials that reach the target"], rows)


def _protocol_lines(sessions: list[dict[str, Any]]) -> str:
    last = sessions[-1]
    options = last["options"]
    commits = sorted({(s["commit"] or "?")[:9] for s in sessions})
    return (
        f"{last['device']}, {last['threads']} thread and one core a run, {last['workers']} runs at "
        f"a time, torch {last['torch']}, kfacopt {last['version']} at {', '.join(commits)}, "
        f"{last['date']}; {options['trials']} trials, {options['seeds']} seeds, budgets × "
        f"{options['scale']:g}: "
        + ", ".join(
            f"{name} {options['scale'] * PROBLEMS[name].budget:g} s" for name in options["problems"]
        )
        + "."
    )


def write_report(comparison: Comparison) -> str:
    """Write tables, pictures and summary into the folder of results.

    Returns:
        What README.md shows: the protocol, the scores, and the tables of tuned contestants.

    Args:
        comparison: With all runs made; what is missing is left out.
    """
    folder = comparison.options.folder
    found = {kind: outcomes(comparison, tuned) for kind, tuned in KINDS.items()}
    figures = summary(comparison)
    sessions = json.loads((folder / "sessions.json").read_text())
    parts = [
        _protocol_lines(sessions),
        "**Score**: mean of ρ(τ) over τ in [1, 4], time to target against the best contestant's, "
        "over the problems that a contestant enters; *on all problems*: those that it does not "
        "enter count as missed; *one K-FAC*: EKFAC and K-FAC auto do not take part.",
        _score_table(figures, comparison),
    ]
    for kind, rows in found.items():
        for attribute, what in MEASURES.items():
            parts.append(
                f"**{what} to target, {kind}**, as ratio to tuned AdamW's: median of seeds "
                "(range); – misses the target. Where AdamW does (\\*), absolute values stand."
            )
            parts.append(_ratio_table(rows, comparison, attribute))
        parts += [
            f"**Best metric in the budget, {kind}**, median.",
            _metric_table(rows, comparison),
        ]
    text = "\n\n".join(parts)
    (folder / "report.md").write_text(text + "\n")
    write_json(folder / "summary.json", _without_infinity(figures))
    _draw(comparison, found, figures, folder)
    tuned = 2 * (len(MEASURES) + 1)
    return "\n\n".join(parts[: HEADLINES + tuned])


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _draw(
    comparison: Comparison, found: Mapping[str, Found], figures: dict[str, Any], folder: Path
) -> None:
    targets = {p: comparison.target(p) for p in comparison.options.problems}
    goals = {p: target["value"] for p, target in targets.items() if target is not None}
    for kind, rows in found.items():
        drawn = {p: row for p, row in rows.items() if p in goals and row}
        if drawn:
            draw_curves(drawn, goals, folder / f"curves_{kind}.png")
    ratios = {kind: figures["scores"][f"{kind}, ratios to the best"] for kind in KINDS}
    draw_profiles(ratios, folder / "profiles.png")
    draw_sensitivity(figures["sensitivity"], folder / "sensitivity.png")
