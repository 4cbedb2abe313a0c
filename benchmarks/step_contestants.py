"""Whose steps are timed, and how their cost per step follows from the kinds of step they take.

An optimizer with intervals takes steps of several kinds. Each kind is timed by itself, on an
optimizer that takes no other (intervals of 1 and of `NEVER`), and a step costs on average

    t_plain + Σ_k (t_k − t_{k−1}) / interval_k,

where kind k does all that kind k − 1 does and what is due every interval_k steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from benchmarks import optimizers
from kfacopt.optim.settings import DEFAULTS

NEVER = 10**9
LEARNING_RATE = 1e-5  # the cost does not depend on it, and nothing diverges

Make = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class StepContestant:
    """An optimizer by the kinds of its steps.

    Attributes:
        name: What tables call it.
        kinds: Makers of optimizers all of whose steps (but the first) are of one kind, from the
            cheapest on.
        intervals: For each reported setting the interval of every kind but the first.
        reduce: Whether K-FAC averages positions.
        ekfac: Whether it is EKFAC.
    """

    name: str
    kinds: Mapping[str, Make]
    intervals: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"": ()})
    reduce: bool = False
    ekfac: bool = False

    @property
    def is_kfac(self) -> bool:
        """Whether it has the phases of K-FAC."""
        return "factors" in self.kinds


def amortised(costs: Sequence[float], intervals: Sequence[int]) -> float:
    """Return the mean cost of a step from the costs of its kinds.

    Args:
        costs: t_k, from the plain step on.
        intervals: For each kind after the first, every how many steps it is due.
    """
    extra = [b - a for a, b in pairwise(costs)]
    return costs[0] + sum(e / n for e, n in zip(extra, intervals, strict=True))


def _plain(make: Any, **settings: Any) -> Mapping[str, Make]:
    return {"plain": partial(make, lr=LEARNING_RATE, **settings)}


def _periodic(make: Any, name: str, **settings: Any) -> Mapping[str, Make]:
    settings["lr"] = LEARNING_RATE
    return {
        "plain": partial(make, **{name: NEVER}, **settings),
        "refresh": partial(make, **{name: 1}, **settings),
    }


def _kfac_kinds(make: Any, **settings: Any) -> Mapping[str, Make]:
    make = partial(make, lr=LEARNING_RATE, **settings)
    intervals = {"plain": (NEVER, NEVER), "factors": (1, NEVER), "inverses": (1, 1)}
    return {
        kind: partial(make, factor_update_interval=f, inverse_update_interval=i)
        for kind, (f, i) in intervals.items()
    }


def default_intervals() -> tuple[int, int]:
    """Return the intervals that `KFACOptimizer` has by default."""
    defaults = DEFAULTS["fixed"]
    return defaults.factor_update_interval, defaults.inverse_update_interval


def contestants(workload: str, terms: str) -> list[StepContestant]:
    """Return all contestants whose packages are installed.

    Args:
        workload: The workload's name: reduce is timed on the CNN.
        terms: Over what the loss averages, for SINGD.
    """
    found = [
        StepContestant("SGD", _plain(optimizers.sgd)),
        StepContestant("AdamW", _plain(optimizers.adamw)),
        StepContestant("Muon", _plain(optimizers.muon)),
    ]
    if optimizers.has_shampoo_and_soap():
        soap = _periodic(optimizers.soap, "precondition_frequency")
        found.append(StepContestant("SOAP", soap, {"10": (10,)}))
        shampoo = _periodic(optimizers.shampoo, "interval")
        found.append(StepContestant("Shampoo", shampoo, {"10": (10,), "100": (100,)}))
    if optimizers.has_singd():
        singd = _periodic(optimizers.singd, "interval", terms=terms)
        found.append(StepContestant("SINGD", singd, {"10": (10,)}))
    factors, inverses = default_intervals()
    settings = {
        f"default ({factors}, {inverses})": (factors, inverses),
        "(1, 1)": (1, 1),
        "(1, 10)": (1, 10),
        "(10, 100)": (10, 100),
    }
    makers = {"K-FAC": optimizers.kfac, "EKFAC": optimizers.ekfac}
    for name, make in makers.items():
        for approx in ("expand", "reduce") if workload == "cnn" else ("expand",):
            label = f"{name} {approx}" if workload == "cnn" else name
            kinds = _kfac_kinds(make, kfac_approx=approx)
            flags = (approx == "reduce", name == "EKFAC")
            found.append(StepContestant(label, kinds, settings, *flags))
    return found
