"""Rates of a schedule beside those that an optimizer was made with; nothing is changed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kfacopt.optim.messages import Notices, short_rates
from kfacopt.optim.settings import as_number

# A peak of AdamW's usual rate, 3e-3, is 0.015 of the default lr; no schedule's peak is so low.
LOW = 0.05
STEPS = 100


class RateWatch:
    """Says once that steps are short, where the loop sets rates that are meant for another rule.

    Steps are proportional to lr / base_lr, so that AdamW's rates make them about 70 times too short
    without a word. It is said when for `STEPS` steps no group's rate rose above `LOW` of the one it
    was made with, nor above what it was before: a warm-up rises. A scheduler that multiplies the
    group's own rate (`initial_lr`), or will go higher (`max_lr`), is believed; a rate of 0
    throughout is a choice. A resumed run was looked at before, and may be at its schedule's end.
    """

    def __init__(self) -> None:
        self._done, self._steps, self._highest = False, 0, -1.0

    def look(self, groups: Sequence[Mapping[str, Any]], notices: Notices, tuned: bool) -> None:
        """Look at the rates of a step that is made."""
        if self._done:
            return
        if self._highest < 0 and groups[0]["num_steps"] > 0:  # resumed
            self._done = True
            return
        share, base = max((_promised(group), group["base_lr"]) for group in groups)
        self._steps = 1 if share > self._highest else self._steps + 1
        self._highest = max(share, self._highest)
        self._done = share > LOW or self._steps >= STEPS
        if self._done and 0 < share <= LOW:
            notices.warn("short-rates", short_rates(self._highest, STEPS, base, tuned))


def relative_rate(group: Mapping[str, Any], name: str = "lr") -> float:
    """Return a group's rate as a share of the one that it was made with."""
    lr, base = as_number(group.get(name, 0.0)), group["base_lr"]
    return float(lr / base) if base else float(lr > 0)


def _promised(group: Mapping[str, Any]) -> float:
    """Return the largest share that a group's rate has, or that a scheduler's keys tell of."""
    return max(relative_rate(group, name) for name in ("lr", "initial_lr", "max_lr"))
