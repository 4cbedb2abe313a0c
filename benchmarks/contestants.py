"""The optimizers that are compared, each with one search space for all problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import optimizers
from benchmarks.tuning import Choice, Dimension, LogUniform

MOMENTUM = LogUniform(0.02, 0.2, from_one=True)
WEIGHT_DECAY = LogUniform(1e-5, 1e-1)
FULL_DATA_PROBLEMS = ("pinn", "diabetes", "friedman", "robot")


@dataclass(frozen=True)
class Contestant:
    """An optimizer with its search space.

    Attributes:
        name: Its name in tables.
        make: Makes it for a model, with settings from the space; without any, its defaults.
        space: The dimensions by argument; the schedule is added to all.
        all_data: Whether it takes a closure of the loss on all data (and no schedule).
        problems: Prefixes of the problems that it enters; empty for all.
        absent: Problems that it does not enter although they have such a prefix.
    """

    name: str
    make: Callable[..., Any]
    space: Mapping[str, Dimension]
    all_data: bool = False
    problems: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def enters(self, problem: str) -> bool:
        """Tell whether it takes part in a problem."""
        if problem in self.absent:
            return False
        return not self.problems or problem.startswith(self.problems)


ADAM_SPACE: Mapping[str, Dimension] = {
    "lr": LogUniform(3e-4, 3e-2),
    "beta1": MOMENTUM,
    "weight_decay": WEIGHT_DECAY,
}

LBFGS_SPACE: Mapping[str, Dimension] = {
    "max_iter": Choice((5, 10, 20)),
    "history": Choice((10, 30, 100, 300)),
}

# The clip, not the learning rate, sets the length of most steps.
KFAC_SPACE: Mapping[str, Dimension] = {
    "damping": LogUniform(1e-4, 1e-2),
    "kl_clip": LogUniform(1e-5, 3e-4),
    "momentum": LogUniform(0.08, 0.3, from_one=True),
    "fallback_lr": LogUniform(3e-3, 3e-2),
}

AUTO_SPACE: Mapping[str, Dimension] = {
    "damping": LogUniform(1e-5, 1e-1),
    "ema_decay": Choice((0.5, 0.8, 0.95)),
    "inverse_update_interval": Choice((1, 5, 20)),
}

BASELINES = (
    Contestant(
        "SGD",
        optimizers.sgd,
        {"lr": LogUniform(3e-3, 1.0), "momentum": MOMENTUM, "weight_decay": LogUniform(1e-7, 1e-3)},
    ),
    Contestant("AdamW", optimizers.adamw, ADAM_SPACE),
)


def _challengers() -> list[Contestant]:
    found = [
        Contestant(
            "Muon",
            optimizers.muon,
            {"lr": LogUniform(3e-4, 3e-2), "weight_decay": WEIGHT_DECAY},
            absent=("convnet",),  # torch's takes matrices of hidden layers, and there are none
        )
    ]
    if optimizers.has_shampoo_and_soap():
        found.append(Contestant("SOAP", optimizers.soap, ADAM_SPACE))
        found.append(Contestant("Shampoo", optimizers.shampoo, ADAM_SPACE))
    found.append(Contestant("K-FAC", optimizers.kfac, KFAC_SPACE))
    found.append(Contestant("EKFAC", optimizers.ekfac, KFAC_SPACE))
    on_all_data = partial(Contestant, all_data=True, problems=FULL_DATA_PROBLEMS)
    found.append(on_all_data("L-BFGS", optimizers.lbfgs, LBFGS_SPACE))
    found.append(on_all_data("K-FAC auto", optimizers.self_tuned_kfac, AUTO_SPACE))
    return found


def all_contestants() -> dict[str, Contestant]:
    """Return the contestants whose packages are installed, by name."""
    return {c.name: c for c in (*BASELINES, *_challengers())}
