"""The numbers of a report that advice follows from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kfacopt.diagnosis.report import (
    CostReport,
    LayerReport,
    OutsideReport,
    StepReport,
)


@dataclass(frozen=True)
class Findings:
    """What advice follows from.

    Attributes:
        layers: The blocks.
        steps: Directions, if they were compared.
        outside: The share of curvature outside of the blocks, if it was measured.
        other_approx: The name of K-FAC with the other of expand and reduce, if it differs.
        approx: The one in use.
        uncovered_share: The share of trained entries that are not covered.
        num_data: How many data were looked at.
        uncovered: By reason the share of trained entries that are not covered for it.
        settings: Of K-FAC, or of the optimizer.
        cost: What a step costs, if it was measured.
        fallback_lr: At which AdamW trains parameters that are not covered.
    """

    layers: Sequence[LayerReport]
    steps: Sequence[StepReport]
    outside: OutsideReport | None
    other_approx: str | None
    approx: str
    uncovered_share: float
    num_data: int | None
    uncovered: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: CostReport | None = None
    fallback_lr: Mapping[str, float] = field(default_factory=dict)

    def step(self, name: str) -> StepReport | None:
        """Return a direction by its name."""
        return next((x for x in self.steps if x.step == name), None)

    def mean_distance(self, name: str) -> float | None:
        """Return the root of the mean squared relative distance over blocks that have it."""
        known = [x.distance[name] for x in self.layers if name in x.distance]
        known = [d for d in known if math.isfinite(d)]
        return math.sqrt(sum(d * d for d in known) / len(known)) if known else None

    @property
    def of_which(self) -> str:
        """Say of how many blocks distances are, unless they are of all."""
        known = [x for x in self.layers if x.distance]
        if len(known) == len(self.layers):
            return ""
        sizes = [sum(x.size for x in layers) for layers in (known, self.layers)]
        return (
            f" of {len(known)} of {len(self.layers)} blocks ({sizes[0]:,} of {sizes[1]:,} "
            "parameters)"
        )

    @property
    def data(self) -> str:
        """Name the sample."""
        return "the data" if self.num_data is None else f"the {self.num_data} data"

    def count(self, number: int) -> str:
        """Say how many of the blocks."""
        return f"{number} of {len(self.layers)} blocks"

    def which(self, layers: Sequence[str], most: str, number: str) -> str:
        """Say which of the blocks, and of the extreme one a number."""
        if len(self.layers) == 1:
            return f"of the only block ({number})"
        if len(layers) == 1:
            return f"of block {layers[0]} ({number})"
        names = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        return f"of {self.count(len(layers))} ({names}; worst {most}: {number})"
