"""Timing contestants side by side, so that a drift of the machine's speed cancels in ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from scipy.stats import binom
from tqdm import tqdm

from benchmarks.environment import seconds


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    device: str,
    rounds: int,
    progress: str = "",
) -> dict[str, list[float]]:
    """Time functions in turn, each once in every round.

    In a round a function is called twice and the second call is timed: the first brings back to
    the caches what the others displaced. A first round warms up and is left out.

    Args:
        functions: What to time.
        device: Where they run.
        rounds: How often each is timed.
        progress: What a progress bar says; empty for none.

    Returns:
        For each function its times in seconds, one per round.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for count in tqdm(range(rounds + 1), desc=progress, disable=not progress):
        for name, function in functions.items():
            function()
            found = seconds(function, device)
            if count:
                times[name].append(found)
    return times


def median_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and between which of the values it lies with a probability of 95 %.

    Of n independent values, the median of their distribution lies between the j-th lowest and the
    j-th highest unless fewer than j fall on one side of it, which is binomial, whatever the
    distribution. Of less than 6 values it is the least and the most, and the probability is lower.

    Args:
        values: At least one.
    """
    ordered = sorted(values)
    outside = max(0, int(binom.ppf(0.025, len(ordered), 0.5)) - 1)
    low, high = ordered[outside], ordered[-1 - outside]
    return {"median": statistics.median(ordered), "low": low, "high": high}
