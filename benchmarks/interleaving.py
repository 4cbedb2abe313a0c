"""Timing contestants side by side, so that a drift of the machine's speed cancels in ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

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


def ratio(times: Sequence[float], unit: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of ratios of times from the same rounds.

    Args:
        times: Of what is measured.
        unit: Of what it is compared with.
    """
    ratios = sorted(t / u for t, u in zip(times, unit, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return {"median": statistics.median(ratios), "low": low, "high": high}
