"""Train stock architectures with `KFACOptimizer` as it comes, and say what it does with them.

    python -m benchmarks.stock_architectures [--quick] [--packages ...] [--names ...] [--page]

Each tiny network makes 30 steps on 64 data in four batches, beside AdamW at two learning rates
for orientation. The losses are means over the four batches before the first and after the last
step, in training mode. What a package's models need is installed by `pip install .[stock]`. Each
row has its own environment, so that those that are not run keep their last result and its commit.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
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
from benchmarks.stock.reasons import FROZEN, reason
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
PACKAGES = ("transformers", "timm", "torch-geometric", "peft")
OUTPUT = RESULTS / "stock_architectures.json"
PAGE = HERE.parent / "docs" / "architectures.md"


def _mean_loss(training: Training) -> float:
    with torch.no_grad():
        losses = [float(training.loss(batch)) for batch in training.batches]
    return sum(losses) / len(losses)


def train(
    architecture: Architecture, make: Callable[[Iterable[Any]], Optimizer], steps: int
) -> tuple[Training, Any, float, float]:
    """Train in the plain loop.

    Args:
        architecture: What.
        make: Makes an optimizer of parameters.
        steps: How many.

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


def kfac_run(architecture: Architecture, steps: int = STEPS) -> dict[str, Any]:
    """Train with `KFACOptimizer` as it comes, and return what became of it.

    Returns:
        Name and package; the loss before (`first`) and after (`last`); how many parameters are
        trained; the preconditioned share of the entries of matrices; `left`: the entries of the
        others by the reason; bytes of state per byte of parameters; warnings of kfacopt; `error`:
        what was raised.
    """
    result: dict[str, Any] = {"name": architecture.name, "package": architecture.package}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            training, optimizer, first, last = train(architecture, KFACOptimizer, steps)
        except Exception as error:
            return result | {"error": f"{type(error).__name__}: {error}"}
    ours = [str(w.message) for w in said if issubclass(w.category, KFACWarning)]
    description = optimizer.describe()
    trained = [p for p in training.model.parameters() if p.requires_grad]
    left: dict[str, int] = {}
    for row in description.parameters:
        if len(row.shape) > 1 and not row.preconditioned and row.curvature != FROZEN:
            why = reason(architecture, training.model, row)
            left[why] = left.get(why, 0) + math.prod(row.shape)
    return result | {
        "first": first,
        "last": last,
        "parameters": sum(p.numel() for p in trained),
        "matrices": sum(p.numel() for p in trained if p.ndim > 1),
        "share": description.preconditioned_share,
        "left": left,
        "state": description.state_bytes / description.parameter_bytes,
        "warnings": [text.partition(" (Shown once")[0] for text in ours],
        "error": "",
    }


def adamw_losses(architecture: Architecture, steps: int = STEPS) -> list[float]:
    """Return the loss after AdamW's steps at each of the rates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [train(architecture, partial(AdamW, lr=lr), steps)[-1] for lr in RATES]


def available(package: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two steps, nothing is written")
    parser.add_argument("--packages", nargs="*")
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--page", action="store_true", help="put the tables into the docs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    where = environment("cpu") | {"packages": {package: installed(package) for package in PACKAGES}}
    for architecture in ARCHITECTURES:
        if arguments.packages is not None and architecture.package not in arguments.packages:
            continue
        if arguments.names is not None and architecture.name not in arguments.names:
            continue
        if not available(architecture.package):
            print(f"{architecture.package} is not installed: {architecture.name}")
            continue
        steps = 2 if arguments.quick else STEPS
        result = kfac_run(architecture, steps) | {"adamw": adamw_losses(architecture, steps)}
        gc.collect()
        print(json.dumps(result), flush=True)
        results[architecture.key] = result | {"environment": where}
        if not arguments.quick:
            known = {a.key: results.get(a.key) for a in ARCHITECTURES}
            results = {key: r for key, r in known.items() if r is not None}
            write_json(path, {"results": results})
    if arguments.page:
        update_page(PAGE, "architectures", tables({"results": results}))


if __name__ == "__main__":
    main()
