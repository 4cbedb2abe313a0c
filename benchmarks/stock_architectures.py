"""Train stock architectures with `KFACOptimizer` as it comes, and say what it does with them.

    python -m benchmarks.stock_architectures [--quick] [--packages ...] [--names ...] [--page]

Each tiny network makes 30 steps on 64 data in four batches, beside AdamW at two learning rates
for orientation. The losses are means over the four batches before the first and after the last
step, in training mode. What a package's models need is installed by `pip install .[stock]`; the
rows of packages that are missing keep their last result.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from benchmarks.environment import HERE, RESULTS, environment, installed
from benchmarks.protocol import write_json
from benchmarks.step_tables import update_page
from benchmarks.stock import (
    graphs,
    timm_images,
    torch_others,
    torch_sequences,
    transformers_other,
    transformers_text,
)
from benchmarks.stock.architecture import Architecture, Training
from benchmarks.stock_tables import tables
from kfacopt import KFACOptimizer, KFACWarning

ARCHITECTURES: list[Architecture] = [
    *torch_sequences.ARCHITECTURES,
    *torch_others.ARCHITECTURES,
    *transformers_text.ARCHITECTURES,
    *transformers_other.ARCHITECTURES,
    *timm_images.ARCHITECTURES,
    *graphs.ARCHITECTURES,
]
STEPS = 30
RATES = (1e-3, 1e-2)
OUTPUT = RESULTS / "stock_architectures.json"
PAGE = HERE.parent / "docs" / "architectures.md"


@dataclass
class Result:
    """What became of one architecture.

    Attributes:
        name: The architecture's.
        package: Whose it is.
        parameters: How many numbers it learns.
        first: The loss before training.
        last: That after K-FAC's steps.
        adamw: Those after AdamW's, at each of the rates.
        share: Of the entries of matrices, those preconditioned.
        left: The matrices that are not: names, entries, reason.
        state: Bytes of state per byte of parameters.
        warnings: Of kfacopt.
        error: What was raised, or `""`.
        seconds: All runs together.
    """

    name: str
    package: str
    parameters: int = 0
    first: float = math.nan
    last: float = math.nan
    adamw: list[float] = field(default_factory=list)
    share: float = 0.0
    left: list[tuple[str, int, str]] = field(default_factory=list)
    state: float = 0.0
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """Return what tells it from all others."""
        return f"{self.package}/{self.name}"


def _mean_loss(training: Training) -> float:
    with torch.no_grad():
        return sum(float(training.loss(batch)) for batch in training.batches) / len(
            training.batches
        )


def train(
    architecture: Architecture, make: Callable[[Iterable[Any]], Optimizer], steps: int
) -> tuple[Training, Optimizer, float, float]:
    """Train in the plain loop.

    Args:
        architecture: What.
        make: Makes an optimizer of parameters.
        steps: How long.

    Returns:
        Model and data, the optimizer, and the loss before and after.
    """
    torch.manual_seed(0)
    training = architecture.make()
    optimizer = make(training.model.parameters())
    torch.manual_seed(1)
    first = _mean_loss(training)
    for step in range(steps):
        optimizer.zero_grad()
        training.loss(training.batches[step % len(training.batches)]).backward()
        optimizer.step()
    torch.manual_seed(1)
    return training, optimizer, first, _mean_loss(training)


def measure(architecture: Architecture, steps: int = STEPS) -> Result:
    """Train an architecture with each optimizer."""
    result = Result(architecture.name, architecture.package)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _, optimizer, result.first, result.last = train(architecture, KFACOptimizer, steps)
            _describe(result, optimizer)
        except Exception as error:
            result.error = f"{type(error).__name__}: {error}"
    ours = [str(w.message) for w in said if issubclass(w.category, KFACWarning)]
    result.warnings = [text.partition(" (Shown once")[0] for text in ours]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for lr in () if result.error else RATES:
            last = train(architecture, lambda params, lr=lr: AdamW(params, lr=lr), steps)[-1]
            result.adamw.append(last)
    result.seconds = time.perf_counter() - start
    gc.collect()
    return result


def _describe(result: Result, optimizer: KFACOptimizer) -> None:
    description = optimizer.describe()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    result.parameters = sum(p.numel() for p in trained)
    result.share = description.preconditioned_share
    result.left = [
        (row.parameter, math.prod(row.shape), row.curvature.removeprefix("AdamW: "))
        for row in description.parameters
        if len(row.shape) > 1 and not row.preconditioned and "frozen" not in row.curvature
    ]
    result.state = description.state_bytes / description.parameter_bytes


def available(package: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two steps, nothing is written")
    parser.add_argument("--packages", nargs="*")
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--page", action="store_true", help="put the tables into the docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"results": {}}
    for architecture in ARCHITECTURES:
        if arguments.packages is not None and architecture.package not in arguments.packages:
            continue
        if arguments.names is not None and architecture.name not in arguments.names:
            continue
        if not available(architecture.package):
            print(f"{architecture.package} is not installed: {architecture.name}")
            continue
        result = measure(architecture, 2 if arguments.quick else STEPS)
        print(
            f"{result.key}: {result.first:.3g} → {result.last:.3g} (AdamW "
            f"{', '.join(f'{x:.3g}' for x in result.adamw)}), {100 * result.share:.1f} %, state "
            f"{result.state:.1f}, {result.seconds:.1f} s {result.error}",
            *(f"\n    warning: {text}" for text in result.warnings),
            *(f"\n    {name} ({count}): {why}" for name, count, why in result.left),
            flush=True,
        )
        content["results"][result.key] = asdict(result)
        content["environment"] = environment("cpu") | {
            "packages": {p: installed(p) for p in ("transformers", "timm", "torch-geometric", "peft")}
        }
    if not arguments.quick:
        write_json(OUTPUT, content)
        if arguments.page:
            update_page(PAGE, "architectures", tables(content))


if __name__ == "__main__":
    main()
