"""The results of the comparison in equal time as tables, counts and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.problems.problem import Problem
from benchmarks.step_tables import markdown, update_page

Record = dict[str, Any]
REFERENCE = "AdamW"
RIVALS = ("SGD", "SOAP", "Muon")
HALF, THIRD, MOST = 0.5, 1 / 3, 0.8  # the aims
MISS = "–"


def last_loss(record: Record) -> float:
    """Return the training loss at the end of a run; infinite where it failed or diverged."""
    return record["curve"][-1][2] if record["outcome"] == "finished" else math.inf


def last_metric(record: Record) -> float:
    """Return the metric at the end of a run; infinite where it failed, or is not a number."""
    found = record["metric"] if record["outcome"] == "finished" else math.inf
    return math.inf if math.isnan(found) else found


def time_to(record: Record, target: float) -> float:
    """Return the share of its time until a run has a loss, between evaluations on a line.

    A run that failed later did not reach it.
    """
    if record["outcome"] != "finished":
        return math.inf
    before = None
    for _, seconds, loss in record["curve"]:
        if loss <= target:
            if before is not None:
                start, high = before
                seconds = start + (seconds - start) * (high - target) / (high - loss)
            return seconds / record["seconds"]
        before = seconds, loss
    return math.inf


def mean_loss(runs: Sequence[Record]) -> float:
    """Return the mean over the seeds of the loss at the end."""
    return statistics.fmean(map(last_loss, runs))


def mean_metric(runs: Sequence[Record]) -> float:
    """Return the mean over the seeds of the metric at the end."""
    return statistics.fmean(map(last_metric, runs))


def median_time(runs: Sequence[Record], target: float) -> float:
    """Return the median over the seeds of the share of time to a loss."""
    return statistics.median(time_to(r, target) for r in runs)


@dataclass(frozen=True)
class Row:
    """The runs of a problem with a schedule: by contestant and rate, a run for each seed."""

    problem: str
    runs: Mapping[str, Mapping[float | None, Sequence[Record]]]

    def best(self, name: str, key: Callable[[Sequence[Record]], Any]) -> float | None:
        """Return a contestant's rate whose runs have the lowest key."""
        return min(self.runs[name], key=lambda lr: key(self.runs[name][lr]))

    def lowest(self, name: str, key: Callable[[Sequence[Record]], Any]) -> Sequence[Record]:
        """Return the runs of that rate."""
        return self.runs[name][self.best(name, key)]

    @property
    def target(self) -> float:
        """AdamW's best loss."""
        return mean_loss(self.lowest(REFERENCE, mean_loss))

    def speed(self, name: str) -> tuple[float, float]:
        """Return a contestant's time to the target and its loss, at the rate of the lowest such."""
        target = self.target
        pairs = [(median_time(r, target), mean_loss(r)) for r in self.runs[name].values()]
        return min(pairs)

    def is_as_good(self, name: str) -> bool:
        """Tell whether a contestant's metric is AdamW's best, by overlap of seeds, or better."""
        ours = map(last_metric, self.lowest(name, mean_metric))
        return min(ours) <= max(map(last_metric, self.lowest(REFERENCE, mean_metric)))


def rows(
    records: Sequence[Record], schedule: str, problems: Mapping[str, Problem]
) -> tuple[list[Row], list[str]]:
    """Return the problems that AdamW has runs of, and the names of all contestants, ours last."""
    found: dict[str, dict[str, dict[float | None, list[Record]]]] = {}
    for record in records:
        if record["schedule"] == schedule:
            own = found.setdefault(record["problem"], {}).setdefault(record["contestant"], {})
            own.setdefault(record["lr"], []).append(record)
    given = [Row(name, found[name]) for name in problems if REFERENCE in found.get(name, {})]
    others = sorted({name for row in given for name in row.runs} - {REFERENCE, *RIVALS, "K-FAC"})
    names = [*RIVALS[:1], REFERENCE, *RIVALS[1:], "K-FAC", *others]
    return given, [name for name in names if any(name in row.runs for row in given)]


# Cells -------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return MISS if math.isinf(value) else f"{value:.3g}"


def _at(text: str, lr: float | None) -> str:
    return text if lr is None or text == MISS else f"{text} at {lr:g}"


def _range(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if math.isinf(mean) or len(values) == 1:
        return _number(mean)
    return f"{mean:.3g} ({min(values):.3g}…{max(values):.3g})"


def time_table(given: Sequence[Row], names: Sequence[str]) -> str:
    """Return the share of time in which each has AdamW's best loss."""
    others = [name for name in names if name != REFERENCE]
    cells = []
    for row in given:
        rate = row.best(REFERENCE, mean_loss)
        own = [row.problem, _at(_number(row.target), rate)]
        for name in others:
            share = row.speed(name)[0] if name in row.runs else None
            own.append("" if share is None else MISS if math.isinf(share) else f"{share:.2f}")
        cells.append(own)
    return markdown(["", "AdamW's best loss", *others], cells)


def loss_table(given: Sequence[Row], names: Sequence[str]) -> str:
    """Return the losses at the end at the best rates."""
    cells = []
    for row in given:
        own = [row.problem]
        for name in names:
            if name not in row.runs:
                own.append("")
                continue
            rate = row.best(name, mean_loss)
            own.append(_at(_number(mean_loss(row.runs[name][rate])), rate))
        cells.append(own)
    return markdown(["", *names], cells)


def steps_table(given: Sequence[Row], names: Sequence[str]) -> str:
    """Return how many steps each makes, the median over all its runs that finished."""
    cells = []
    for row in given:
        own = [row.problem]
        for name in names:
            runs = [r for of_rate in row.runs.get(name, {}).values() for r in of_rate]
            steps = [r["curve"][-1][0] for r in runs if r["outcome"] == "finished"]
            own.append(f"{statistics.median(steps):.0f}" if steps else "")
        cells.append(own)
    return markdown(["", *names], cells)


def metric_table(
    given: Sequence[Row], names: Sequence[str], problems: Mapping[str, Problem]
) -> str:
    """Return the metrics at the rates where they are best, with the seeds' range."""
    cells = []
    for row in given:
        own = [row.problem, problems[row.problem].metric]
        for name in names:
            known = name in row.runs
            values = map(last_metric, row.lowest(name, mean_metric)) if known else ()
            own.append(_range(list(values)) if known else "")
        cells.append(own)
    return markdown(["", "metric", *names], cells)


# Counts ------------------------------------------------------------------------------------------


def counts(given: Sequence[Row], name: str) -> str:
    """Return a sentence on how far one of ours is from the aims."""
    own = [row for row in given if name in row.runs]
    shares = [row.speed(name)[0] for row in own]
    half = sum(share <= HALF for share in shares)
    reached = sum(math.isfinite(share) for share in shares)
    parts = [
        f"AdamW's best loss is reached on {reached} of {len(own)} problems, in at most half of the "
        f"time on {half} (aim: all), in the median in {_number(statistics.median(shares))} (aim: "
        f"{THIRD:.2f})"
    ]
    for rival in RIVALS[1:]:
        both = [row for row in own if rival in row.runs]
        if both:
            ahead = [row for row in both if row.speed(name) < row.speed(rival)]
            by_loss = sum(math.isinf(row.speed(name)[0]) for row in ahead)
            said = f", {by_loss} of them by the loss alone" if by_loss else ""
            aim = math.ceil(MOST * len(both))
            parts.append(
                f"ahead of {rival}'s best on {len(ahead)} of {len(both)} (aim: {aim}){said}"
            )
    good = sum(row.is_as_good(name) for row in own)
    aim = math.ceil(MOST * len(own))
    parts.append(f"metric at least AdamW's best on {good} of {len(own)} (aim: {aim})")
    return f"**{name}**: {'; '.join(parts)}."


AHEAD = (
    "*Ahead* is who reaches AdamW's best loss in less time, each at the rate where it does so "
    "first; where neither reaches it, who has the lower loss at the end."
)


def reaches(given: Sequence[Row], names: Sequence[str]) -> str:
    """Return a sentence on how many problems each reaches AdamW's best loss."""
    parts = []
    for name in names:
        own = [row for row in given if name in row.runs]
        count = sum(math.isfinite(row.speed(name)[0]) for row in own)
        parts.append(f"{name} on {count} of {len(own)}")
    return f"AdamW's best loss is reached by {', '.join(parts)}."


def failures(records: Sequence[Record]) -> list[str]:
    """Return what failed, diverged or was warned of, each with the problems where it was."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        said = [f"warning: {text}" for text in record["warnings"]]
        said += [record["outcome"]] if record["outcome"] != "finished" else []
        for text in said:
            line = " ".join(f"{_at(record['contestant'], record['lr'])}: {text}".split())
            where = found.setdefault(line, {})
            where[record["problem"]] = where.get(record["problem"], 0) + 1
    return [
        f"- {line} ({', '.join(f'{name}: {n} runs' for name, n in where.items())})"
        for line, where in sorted(found.items())
    ]


def machine(records: Sequence[Record]) -> str:
    """Return a sentence on where and of what the runs are."""
    last = records[-1]["environment"]
    commits = sorted({(r["environment"]["commit"] or "?")[:9] for r in records})
    seconds = sorted({r["seconds"] for r in records})
    used = sum(r["curve"][-1][1] for r in records if r["curve"])
    return (
        f"{last['device']}, one thread, torch {last['torch']}, kfacopt {last['version']} at "
        f"{', '.join(commits)}, {last['date']}; {'…'.join(f'{s:g}' for s in seconds)} CPU seconds "
        f"a run, {len(records)} runs, {used:.0f} seconds in all."
    )


def text_of(records: Sequence[Record], problems: Mapping[str, Problem]) -> str:
    """Return all tables.

    Args:
        records: The runs.
        problems: Those of the set, by name.
    """
    described = markdown(
        ["", "model, data and loss"], [[p.name, p.description] for p in problems.values()]
    )
    parts = [machine(records), described]
    for schedule in dict.fromkeys(r["schedule"] for r in records):
        given, names = rows(records, schedule, problems)
        if not given:
            continue
        parts.append(f"### {schedule.capitalize()} rate")
        ours = [name for name in names if name not in (REFERENCE, *RIVALS)]
        parts += [counts(given, name) for name in ours]
        parts += [AHEAD, reaches(given, [name for name in names if name != REFERENCE])]
        parts += ["Share of the time until AdamW's best loss:", time_table(given, names)]
        parts += ["Training loss at the end:", loss_table(given, names)]
        parts += ["Metric at the end:", metric_table(given, names, problems)]
        parts += ["Steps:", steps_table(given, names)]
    said = failures(records)
    if said:
        parts += ["### What failed or was warned of", "\n".join(said)]
    return "\n\n".join(parts)


def report(
    records: Sequence[Record],
    problems: Mapping[str, Problem],
    folder: Path,
    page: Path | None = None,
    section: str = "held-out",
) -> None:
    """Print the tables, and write them and a picture of the curves.

    Args:
        records: The runs.
        problems: Those of the set.
        folder: Where tables and picture go.
        page: The page with marks for the tables.
        section: The name in its marks.
    """
    from benchmarks.equal_time_figure import draw

    text = text_of(records, problems)
    print(text)
    (folder / "tables.md").write_text(text + "\n")
    for schedule in dict.fromkeys(r["schedule"] for r in records):
        given, names = rows(records, schedule, problems)
        if given:
            draw(given, names, folder / f"curves_{schedule}.png")
    if page is not None:
        place = Path("..") / folder.relative_to(page.parent.parent)
        text += "\n\n### Curves\n\nThe run of the median loss at the best rate, with the cosine."
        update_page(page, section, f"{text}\n\n![training losses]({place}/curves_cosine.png)")
