"""The results of the comparison of kinds of layers as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.loss_tables import METRIC, OBJECTIVE, RunRecord, at_end
from benchmarks.step_tables import markdown

TUNING_SEED = 1000


@dataclass(frozen=True)
class Comparison:
    """A kind of layers on a problem.

    Attributes:
        kind: What is compared, in words.
        problem: The problem's name.
        with_kind: The contestant that has the kind's curvature.
        without: The one that has not.
    """

    kind: str
    problem: str
    with_kind: str
    without: str


COMPARISONS = (
    Comparison("`nn.Embedding`", "clicks", "embeddings", "base"),
    Comparison("`nn.Embedding`", "words", "embeddings", "base"),
    Comparison("`nn.Embedding`", "characters", "embeddings", "base"),
    Comparison("embedding as head", "tied words", "embeddings", "base"),
    Comparison("`nn.LayerNorm`", "words", "norms", "base"),
    Comparison("`nn.LayerNorm`", "digits", "norms", "base"),
    Comparison("`nn.BatchNorm1d`", "signals", "norms", "base"),
    Comparison("`nn.Conv1d`", "signals", "base", "no convolutions"),
    Comparison("`nn.MultiheadAttention`", "digits", "base", "no products"),
    Comparison("`nn.LSTM`", "characters", "recurrent", "base"),
    Comparison("`A @ (x @ W)`", "graphs", "base", "no products"),
)

Rates = tuple["float | None", float]


def _rates(run: RunRecord) -> Rates:
    return run["fallback_lr"], run["kl_clip"]


def lowest(runs: Sequence[RunRecord], contestant: str, column: int) -> Rates:
    """Return `fallback_lr` and `kl_clip` of a contestant's lowest run on the tuning seed.

    Args:
        runs: A problem's.
        contestant: The name.
        column: Of the curve.
    """
    own = [r for r in runs if r["contestant"] == contestant and r["seed"] == TUNING_SEED]
    return _rates(min(own, key=lambda r: at_end([r], column)[0]))


def chosen(runs: Sequence[RunRecord], contestant: str, column: int) -> list[RunRecord]:
    """Return a contestant's runs, at the setting chosen by a column, on the seeds shown."""
    rates = lowest(runs, contestant, column)
    own = [r for r in runs if r["contestant"] == contestant and r["seed"] != TUNING_SEED]
    return [r for r in own if _rates(r) == rates]


def _cell(values: Sequence[float], ahead: bool, rates: Rates) -> str:
    median = statistics.median(values)
    if math.isinf(median):
        return "failed"
    text = f"{median:.4g}"
    text = f"**{text}**" if ahead else text
    spread = "" if len(values) == 1 else f" ({min(values):.4g}…{max(values):.4g})"
    fallback = "default" if rates[0] is None else f"{rates[0]:g}"
    return f"{text}{spread} at {rates[1]:g}, {fallback}"


def row(comparison: Comparison, content: dict[str, Any]) -> tuple[list[str], list[int]] | None:
    """Return cells, and who is ahead in objective and metric: 1 with the kind, −1 without.

    Args:
        comparison: What is compared.
        content: Of the problem's file.

    Returns:
        `None` where runs are missing.
    """
    names = (comparison.with_kind, comparison.without)
    known = {r["contestant"] for r in content["runs"] if r["seed"] != TUNING_SEED}
    if not known >= {*names}:
        return None
    cells = [comparison.kind, comparison.problem]
    costs = [content["costs"].get(name) for name in names]
    cells.append(f"{costs[0] / costs[1]:.2f}" if all(costs) else "–")
    verdicts = []
    for column in (OBJECTIVE, METRIC):
        values = [at_end(chosen(content["runs"], name, column), column) for name in names]
        ahead = [max(values[i]) < min(values[1 - i]) for i in (0, 1)]
        for i, name in enumerate(names):
            cells.append(_cell(values[i], ahead[i], lowest(content["runs"], name, column)))
        verdicts.append(ahead[0] - ahead[1])
    return cells, verdicts


def tables(contents: Sequence[dict[str, Any]]) -> str:
    """Return the problems, and the table.

    Args:
        contents: Of the problems' files.
    """
    last, every = contents[-1], [r for content in contents for r in content["runs"]]
    commits = ", ".join(sorted({(r["commit"] or "?")[:9] for r in every}))
    seeds = len({r["seed"] for r in every} - {TUNING_SEED})
    budgets = sorted({content["problem"]["budget"] for content in contents})
    head = (
        f"{last['device']}, {last['threads']} thread, torch {last['torch']}, kfacopt "
        f"{last['version']} at {commits}, {last['date']}; {seeds} seeds, "
        f"{'…'.join(f'{s:g}' for s in dict.fromkeys((budgets[0], budgets[-1])))} CPU seconds a run."
    )
    by_name = {content["problem"]["name"]: content for content in contents}
    made = [(c, row(c, by_name[c.problem])) for c in COMPARISONS if c.problem in by_name]
    header = ["kind", "problem", "cost", "training: with", "without", "held out: with", "without"]
    parts = [head, markdown(header, [found[0] for _, found in made if found is not None])]
    missing = [f"{c.kind} on {c.problem}" for c in COMPARISONS if (c.problem not in by_name)]
    missing += [f"{c.kind} on {c.problem}" for c, found in made if found is None]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    problems = [content["problem"] for content in contents]
    rows = [[p["name"], p["loss"], p["description"]] for p in problems]
    parts.append(markdown(["", "loss", "model and data"], rows))
    failed = sorted(
        {f"{r['contestant']}: {r['outcome']}" for r in every if r["outcome"] != "finished"}
    )
    said = failed + sorted({f"{r['contestant']}: {w}" for r in every for w in r["warnings"]})
    return "\n\n".join(parts + (["\n".join(f"- {line}" for line in said)] if said else []))
