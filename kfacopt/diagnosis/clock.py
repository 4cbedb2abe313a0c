"""How long an examination may go on, and its progress bar; nothing is measured here."""

from __future__ import annotations

import time

from tqdm import tqdm


class Clock:
    """Seconds since it was made, and a bar with one step for each thing that is measured.

    Args:
        max_seconds: When to stop.
        progressbar: Whether to show the bar.

    Attributes:
        cut: What was left out, or ended early, as there was no more time.
    """

    def __init__(self, max_seconds: float, progressbar: bool) -> None:
        self._start, self._max = time.monotonic(), max_seconds
        self._bar = tqdm(desc="diagnose", disable=not progressbar)
        self.cut: list[str] = []

    @property
    def seconds(self) -> float:
        """How many have passed."""
        return time.monotonic() - self._start

    def part(self, fraction: float) -> float:
        """Return the time of the clock at which a fraction of what is left has passed."""
        return self.seconds + fraction * max(self._max - self.seconds, 0.0)

    def is_past(self, deadline: float | None = None) -> bool:
        """Tell whether a deadline, by default the end, has passed."""
        return self.seconds >= (self._max if deadline is None else deadline)

    def expect(self, steps: int) -> None:
        """Say how many steps the bar has."""
        self._bar.total = steps
        self._bar.refresh()

    def begin(self, what: str) -> None:
        """Show what is measured next, as one step of the bar."""
        self._bar.set_description(f"diagnose: {what}")
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
