"""Which kinds of layers are worth their curvature: each kind with it, and trained by the fallback.

    python -m benchmarks.kinds [--quick] [--problems ...] [--page]

Contestants are `KFACOptimizer` with and without a kind of layers; what is without is trained by
AdamW, with the rates of the fallback. All get the same CPU seconds of one thread: what an iteration
costs is measured first, as in `benchmarks.losses`, and gives the number of iterations. The rate is
a cosine over them. `fallback_lr` is tuned first, then `kl_clip`, which says how long K-FAC's steps
are (where the clip is active, which it mostly is here, `lr` changes nothing), on a seed of its own;
the setting with the lowest objective, and that with the lowest metric, are run on the seeds that
are shown.

A problem's runs are in one file, written after each run; a run that exists is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import losses
from benchmarks.environment import HERE, RESULTS, environment
from benchmarks.kind_tables import COMPARISONS, TUNING_SEED, lowest, tables
from benchmarks.loss_tables import METRIC, OBJECTIVE
from benchmarks.optimizers import Joint
from benchmarks.problems.kinds_of_layers import PROBLEMS as ALL
from benchmarks.protocol import write_json
from benchmarks.step_tables import update_page
from kfacopt import KFACOptimizer

PROBLEMS = {problem.name: problem for problem in ALL}
PAGE = HERE.parent / "docs" / "layers.md"
LR = 0.07
KL_CLIPS = (3e-4, 5e-5, 2e-3)
FALLBACK_RATES = (None, 3e-3, 1e-2, 3e-2)
EVALUATIONS = 8
BASE = (nn.Linear, nn.Conv2d, nn.Conv1d)
LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "base": BASE,
    "embeddings": (*BASE, nn.Embedding),
    "norms": (*BASE, nn.LayerNorm, nn.BatchNorm1d),
    "recurrent": (*BASE, nn.LSTM),
    "no convolutions": (nn.Linear, nn.Conv2d),
    "no products": BASE,
}
PAST_MODULES = ("self_attn.", "graph_")  # parameters whose layers are found as products


class Fallback(torch.optim.AdamW):
    """What the fallback does, for parameters that no `KFACOptimizer` is to know of.

    Products are found in the graph, and no argument leaves them out.

    Args:
        params: The parameters.
        lr: `KFACOptimizer`'s `fallback_lr`.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float | None) -> None:
        groups = [
            {"params": [p for p in params if (p.ndim > 1) == matrix], "lr": lr or usual}
            for matrix, usual in ((True, 1e-3), (False, 0.015))
        ]
        own = [group for group in groups if group["params"]]
        super().__init__(own, weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class Setting(losses.Setting):
    """Whose run it is, and how.

    Attributes:
        contestant: A key of `LAYERS`.
        fallback_lr: AdamW's learning rate.
        kl_clip: K-FAC's.
    """

    fallback_lr: float | None = None
    kl_clip: float = KL_CLIPS[0]

    def optimizer(self, model: nn.Module) -> Any:
        """Return the optimizer of a model."""
        named = list(model.named_parameters())
        rest: list[nn.Parameter] = []
        if self.contestant == "no products":
            rest = [p for name, p in named if any(part in name for part in PAST_MODULES)]
        left = {id(p) for p in rest}
        optimizer = KFACOptimizer(
            [p for _, p in named if id(p) not in left],
            lr=self.lr,
            layers=LAYERS[self.contestant],
            fallback_lr=self.fallback_lr,
            kl_clip=self.kl_clip,
        )
        return Joint(optimizer, Fallback(rest, self.fallback_lr)) if rest else optimizer


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        folder: Of the results.
        seeds: Those that are shown.
        kl_clips: Those that are tried; the first with all of `fallback_rates`.
        fallback_rates: Those of `fallback_lr`.
        rounds: How often the cost of an iteration is measured.
        iterations: Of the loop; `None` for as many as the budget has.
    """

    folder: Path
    seeds: tuple[int, ...] = (0, 1)
    kl_clips: tuple[float, ...] = KL_CLIPS
    fallback_rates: tuple[float | None, ...] = FALLBACK_RATES
    rounds: int = 4
    iterations: int | None = None


@dataclass
class Runs:
    """A problem's runs, and their file.

    Attributes:
        plan: What is run.
        name: The problem's name.
        found: The runs.
        costs: Seconds of an iteration of each contestant.
    """

    plan: Plan
    name: str
    found: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            known = json.loads(self.path.read_text())
            self.found, self.costs = known["runs"], known["costs"]

    @property
    def path(self) -> Path:
        """The file."""
        return self.plan.folder / f"{self.name}.json"

    @property
    def contestants(self) -> list[str]:
        """Who is compared on the problem."""
        own = [c for c in COMPARISONS if c.problem == self.name]
        return list(dict.fromkeys(name for c in own for name in (c.without, c.with_kind)))

    def write(self) -> None:
        """Write the file."""
        problem = PROBLEMS[self.name]
        content = {"problem": {k: v for k, v in asdict(problem).items() if k != "make"}}
        content |= {"costs": self.costs, "runs": self.found}
        write_json(self.path, environment("cpu") | content)

    def run(self, setting: Setting) -> None:
        """Make a run that does not exist."""
        problem, cost = PROBLEMS[self.name], self.costs.get(setting.contestant)
        count = self.plan.iterations
        if count is None:  # a contestant without a cost has failed, and `losses.run` says how
            count = round(problem.budget / cost) if cost else 1
        wanted = asdict(setting) | {"iterations": count}
        if not any(all(r[k] == v for k, v in wanted.items()) for r in self.found):
            self.found.append(losses.run(problem, setting, count, cost or 1.0, EVALUATIONS))
            self.write()

    def calibrate(self) -> None:
        """Measure what an iteration costs."""
        if self.plan.iterations is None and not self.costs:
            settings = {n: Setting(n, LR, "cosine", TUNING_SEED) for n in self.contestants}
            self.costs = losses.costs(PROBLEMS[self.name], self.plan.rounds, settings)

    def complete(self) -> None:
        """Make all runs, contestants in turn."""
        self.calibrate()
        for fallback_lr in self.plan.fallback_rates:
            for name in self.contestants:
                setting = Setting(name, LR, "cosine", TUNING_SEED, fallback_lr)
                self.run(replace(setting, kl_clip=self.plan.kl_clips[0]))
        for kl_clip in self.plan.kl_clips[1:]:
            for name in self.contestants:
                fallback_lr, _ = lowest(self.found, name, OBJECTIVE)
                self.run(Setting(name, LR, "cosine", TUNING_SEED, fallback_lr, kl_clip))
        for name in self.contestants:
            best = [lowest(self.found, name, column) for column in (OBJECTIVE, METRIC)]
            for rates in dict.fromkeys(best):
                setting = Setting(name, LR, "cosine", TUNING_SEED, *rates)
                for seed in self.plan.seeds:
                    self.run(replace(setting, seed=seed))


def parsed() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--report-only", action="store_true", help="make no runs")
    parser.add_argument("--page", action="store_true", help="put the table into docs/layers.md")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds: two steps")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    plan = Plan(arguments.output or RESULTS / ("kinds_quick" if arguments.quick else "kinds"))
    if arguments.quick:
        plan = Plan(plan.folder, (0,), KL_CLIPS[:1], (None,), iterations=2)
    if not arguments.report_only:
        for name in tqdm(arguments.problems, mininterval=5):
            Runs(plan, name).complete()
    paths = [plan.folder / f"{name}.json" for name in PROBLEMS]
    text = tables([json.loads(path.read_text()) for path in paths if path.exists()])
    print(text)
    if arguments.page:
        update_page(PAGE, "kinds", text)


if __name__ == "__main__":
    main()
