"""The result of the step-cost benchmark as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import HERE

MEBIBYTE = 2**20
FEW = 6  # rounds: of less no interval holds the median with 95 %


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        header: The columns' names.
        rows: The cells.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _memory(peak: int | None) -> str:
    return "" if peak is None else f"{peak / MEBIBYTE:.0f}"


def _cost(row: dict[str, Any]) -> str:
    text = f"{row['per_forward_backward']:.2f}"
    known = "low" in row and row["low"] < row["high"]  # one round has no interval
    return f"{text} ({row['low']:.2f}…{row['high']:.2f})" if known else text


def _cost_table(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['contestant']} {row['intervals']}".strip(),
            _cost(row),
            f"{row['per_adamw_step']:.2f}",
            f"{row['state_per_parameter_byte']:.1f}",
            _memory(row["peak_memory"]),
        ]
        for row in found["rows"]
    ]
    alone = _memory(found["peak_memory_of_forward_backward"])
    rows.insert(0, ["forward + backward alone", "1.00", "", "0.0", alone])
    header = ["", "/ (forward + backward)", "/ AdamW's step", "state / parameters", "peak MiB"]
    return markdown(header, rows)


def _uncertainty(phase: dict[str, Any]) -> tuple[str, bool]:
    """Return how well a phase is known, and whether it is told from nothing.

    Results of before 27 November 2026, nine rounds, have the span of the quartiles instead of the
    interval for the median.
    """
    if "spread" in phase:
        return f"± {phase['spread']:.2f}", phase["measured"] > phase["spread"]
    if phase["low"] == phase["high"]:
        return "one round", False
    return f"{phase['low']:.2f}…{phase['high']:.2f}", phase["low"] >= 0.005


def _phase_table(found: dict[str, Any]) -> str:
    rows = []
    for name, phases in found["phases"].items():
        for phase, entry in phases.items():
            bare = entry["bare_calls"]
            interval, seen = _uncertainty(entry)
            cells = [name, phase, f"{entry['measured']:.2f}" if seen else "–"]
            cells += [interval, f"{entry['floor']:.2f}"]
            cells.append("" if bare is None else f"{bare:.2f}")
            cells.append(f"{entry['measured'] / entry['floor']:.1f}" if seen else "–")
            rows.append(cells)
    header = ["", "phase", "measured", "uncertainty", "floor", "bare calls", "measured / floor"]
    return markdown(header, rows)


def tables(result: dict[str, Any]) -> str:
    """Return all tables of a result.

    Args:
        result: The content of a result file.
    """
    commit = (result["commit"] or "?")[:9]
    dirty = " with uncommitted changes" if result["uncommitted_changes"] else ""
    parts = [
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, torch "
        f"{result['torch']}, kfacopt {result['version']} at {commit}{dirty}, "
        f"{result['date']}; medians of {result['rounds']} interleaved rounds."
    ]
    if 1 < result["rounds"] < FEW:
        parts.append("With so few rounds intervals are ranges, and hold the median less surely.")
    if "memory_environment" in result:
        where = result["memory_environment"]
        what = "State and peak" if where["peak"] else "State, but not the peak,"
        parts.append(
            f"{what} of K-FAC and EKFAC is of {(where['commit'] or '?')[:9]}, torch "
            f"{where['torch']}, {where['date']}: since the run whose times are shown symmetric "
            "matrices are kept once, and wide convolutions are split."
        )
    if result["missing_packages"]:
        parts.append(f"Not installed, so not measured: {', '.join(result['missing_packages'])}.")
    for name, found in result["workloads"].items():
        rate = found["products_per_second"] / 1e9
        parts.append(
            f"**{name}** ({result['size']}): forward + backward takes "
            f"{found['milliseconds_of_forward_backward']:.1f} ms; the machine multiplies matrices "
            f"at {rate:.0f} GFLOP/s."
        )
        parts += [_cost_table(found), _phase_table(found)]
    return "\n\n".join(parts)


def update_page(path: Path, section: str, text: str) -> None:
    """Replace what stands between a section's two marks in a page.

    Args:
        path: The page.
        section: The name in the marks `<!-- NAME -->` and `<!-- /NAME -->`.
        text: What to put there.
    """
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    before, _, rest = path.read_text().partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} lacks the marks {start} and {end}.")
    path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")


def update_readme(section: str, text: str) -> None:
    """Replace what stands between a section's two marks in README.md."""
    update_page(HERE / "README.md", section, text)
