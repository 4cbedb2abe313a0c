"""The results of the comparison of losses as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.step_tables import markdown

RunRecord = dict[str, Any]
OBJECTIVE, METRIC = 2, 3  # columns of a curve


def runs_of(
    runs: Sequence[RunRecord], contestant: str, schedule: str, lr: float | None = None
) -> list[RunRecord]:
    """Return a contestant's runs at a rate, one per seed."""
    whose = {"contestant": contestant, "schedule": schedule, "lr": lr}
    return [r for r in runs if all(r[key] == value for key, value in whose.items())]


def at_end(runs: Sequence[RunRecord], column: int = OBJECTIVE) -> list[float]:
    """Return what stands in a column at the end of each run; infinite where it failed."""
    return [r["curve"][-1][column] if r["outcome"] == "finished" else math.inf for r in runs]


def median_at_end(runs: Sequence[RunRecord], column: int = OBJECTIVE) -> float:
    """Return the median over the seeds of what stands in a column at the end."""
    return statistics.median(at_end(runs, column))


def seconds_to(runs: Sequence[RunRecord], target: float) -> float:
    """Return the median over the seeds of the seconds until the objective is the target or less.

    A run that failed later did not reach it.
    """
    rows = [r["curve"][1:] if r["outcome"] == "finished" else [] for r in runs]
    return statistics.median(
        next((row[1] for row in own if row[OBJECTIVE] <= target), math.inf) for own in rows
    )


def best_rate(runs: Sequence[RunRecord], schedule: str, key: Callable[[Any], float]) -> float:
    """Return AdamW's rate whose runs have the lowest key."""
    own = {r["lr"] for r in runs if r["contestant"] == "AdamW" and r["schedule"] == schedule}
    return min(sorted(own), key=lambda lr: key(runs_of(runs, "AdamW", schedule, lr)))


def _cells(pair: Sequence[Sequence[RunRecord]], column: int) -> tuple[list[str], int]:
    """Return medians with ranges, and who is ahead: its range is wholly below the other's."""
    values = [sorted(at_end(runs, column)) for runs in pair]
    ahead = [values[i][-1] < values[1 - i][0] for i in (0, 1)]
    cells = []
    for i, (own, runs) in enumerate(zip(values, pair, strict=True)):
        median = statistics.median(own)
        if math.isinf(median):
            cells.append(
                next(r["outcome"].split(":")[0] for r in runs if r["outcome"] != "finished")
            )
            continue
        text = f"{median:.3g}"
        text = f"**{text}**" if ahead[i] else text
        cells.append(text if len(own) == 1 else f"{text} ({own[0]:.3g}…{own[-1]:.3g})")
    return cells, ahead[1] - ahead[0]


def _seconds(value: float) -> str:
    return "–" if math.isinf(value) else f"{value:.2g}"


def row(content: dict[str, Any], schedule: str) -> tuple[list[str], int, int]:
    """Return a problem's row, and who is ahead in objective and metric: 1 is K-FAC, −1 AdamW."""
    runs, problem = content["runs"], content["problem"]
    ours = runs_of(runs, "K-FAC", schedule)
    rates = [
        best_rate(runs, schedule, lambda r, c=c: median_at_end(r, c)) for c in (OBJECTIVE, METRIC)
    ]
    theirs = [runs_of(runs, "AdamW", schedule, lr) for lr in rates]
    target = median_at_end(theirs[0])
    fastest = runs_of(
        runs, "AdamW", schedule, best_rate(runs, schedule, lambda r: seconds_to(r, target))
    )
    losses, first = _cells((theirs[0], ours), OBJECTIVE)
    metrics, second = _cells((theirs[1], ours), METRIC)
    times = [_seconds(seconds_to(r, target)) for r in (fastest, ours)]
    cells = [problem["name"], problem["objective"], losses[0], f"{rates[0]:g}", losses[1], *times]
    return [*cells, problem["metric"], *metrics], first, second


def _count(verdicts: Sequence[int]) -> str:
    ahead, even, behind = (verdicts.count(v) for v in (1, 0, -1))
    return f"K-FAC is lower in {ahead}, AdamW in {behind}, and the seeds overlap in {even}"


def remarks(contents: Sequence[dict[str, Any]]) -> list[str]:
    """Return what went wrong and what was warned of, each with the problems where it was."""
    found: dict[str, dict[str, None]] = {}
    for content in contents:
        for r in content["runs"]:
            said = [r["outcome"]] if r["outcome"] != "finished" else []
            for text in (*said, *(f"warning: {w}" for w in r["warnings"])):
                rate = "" if r["lr"] is None else f" at {r['lr']:g}"
                line = " ".join(f"{r['contestant']}{rate}: {text}".split())
                found.setdefault(line, {})[content["problem"]["name"]] = None
    return [f"- {line} ({', '.join(names)})" for line, names in found.items()]


def problem_table(contents: Sequence[dict[str, Any]]) -> str:
    """Return what the problems are."""
    problems = [content["problem"] for content in contents]
    rows = [[p["name"], p["loss"], p["description"]] for p in problems]
    return markdown(["", "loss", "model and data"], rows)


def time_taken(contents: Sequence[dict[str, Any]]) -> str:
    """Return a sentence on whether the cost of an iteration was what the runs took."""
    ratios = []
    for content in contents:
        mean = {
            name: [r["thread_seconds"] for r in content["runs"] if r["contestant"] == name]
            for name in ("AdamW", "K-FAC")
            if all(r["outcome"] == "finished" for r in content["runs"] if r["contestant"] == name)
        }
        if len(mean) == 2:
            ratios.append(statistics.median(mean["K-FAC"]) / statistics.median(mean["AdamW"]))
    if not ratios:
        return ""
    return (
        f" K-FAC's runs took {statistics.median(ratios):.2f} times the thread time of AdamW's "
        f"({min(ratios):.2f}…{max(ratios):.2f}; medians of a problem's runs)."
    )


def tables(contents: Sequence[dict[str, Any]]) -> str:
    """Return a table for each schedule, and what went wrong.

    Args:
        contents: Of the problems' files.
    """
    last = contents[-1]
    every = [r for content in contents for r in content["runs"]]
    commits = ", ".join(sorted({(r["commit"] or "?")[:9] for r in every}))
    budgets = sorted({content["budget"] for content in contents})
    parts = [
        f"{last['device']}, {last['threads']} thread, torch {last['torch']}, kfacopt "
        f"{last['version']} at {commits}, {last['date']}; {len({r['seed'] for r in every})} seeds, "
        f"{'…'.join(f'{s:g}' for s in dict.fromkeys((budgets[0], budgets[-1])))} CPU seconds a run."
        f"{time_taken(contents)}",
        problem_table(contents),
    ]
    header = ["", "objective", "AdamW", "its rate", "K-FAC", "s to AdamW's: AdamW", "K-FAC"]
    header += ["metric", "AdamW", "K-FAC"]
    for schedule in dict.fromkeys(r["schedule"] for r in every):
        rows, first, second = zip(*(row(c, schedule) for c in contents), strict=True)
        parts.append(
            f"**{schedule.capitalize()} rate.** Objective: {_count(first)}; metric: "
            f"{_count(second)}."
        )
        parts.append(markdown(header, rows))
    said = remarks(contents)
    return "\n\n".join(parts + (["\n".join(said)] if said else []))
