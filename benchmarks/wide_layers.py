"""What wide layers cost, and learn, with whole factors and with a low rank plus a diagonal.

    python -m benchmarks.wide_layers [--quick] [--page] [--problems NAME ...] [--output FILE]

Networks with sides of 512 to 2,048, trained with the defaults but for `wide_factor`, and by
AdamW at three rates: as many steps for all, with a cosine over them, in CPU seconds of one thread.
The target of a problem is the loss (the mean over 20 steps) that whole factors have after three
quarters of their steps, the median of the seeds. A run is written as it ends and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import choosing
from benchmarks.architectures import LanguageModel, autoencoder, mlp
from benchmarks.environment import HERE, RESULTS, environment, folder_of
from benchmarks.problems import autoencoders, language
from benchmarks.protocol import write_json
from benchmarks.step_tables import markdown, update_page
from kfacopt import KFACOptimizer

FILE = RESULTS / "wide_layers.json"
PAGE = HERE.parent / "docs" / "wide_layers.md"
SEEDS = (0, 1, 2)
WINDOW = 20  # steps whose mean is a loss
TARGET = 0.75  # of the steps with whole factors
RATES = (1e-3, 3e-3, 1e-2)
FULL, LOW = "full", "low rank"
CONTESTANTS: dict[str, Mapping[str, Any]] = {
    FULL: {"wide_factor": "full"},
    LOW: {},
    **{f"AdamW, {lr:g}": {"lr": lr} for lr in RATES},
}

Loss = Callable[[nn.Module, Generator], Tensor]


@dataclass(frozen=True)
class WideProblem:
    """A network and its loss on a batch that a generator draws.

    Attributes:
        words: What it is.
        steps: How many all make.
        make: Makes the network and the loss, from torch's own random state.
    """

    words: str
    steps: int
    make: Callable[[], tuple[nn.Module, Loss]]


class Residual(nn.Module):
    """x + W₂ gelu(W₁ norm(x)), four times as wide within."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.branch = nn.Sequential(nn.LayerNorm(width), *inner)

    def forward(self, x: Tensor) -> Tensor:
        """Return it of `[..., width]`."""
        return x + self.branch(x)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and a residual MLP over channels, Liu et al. (2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        inner = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.branch = nn.Sequential(nn.LayerNorm(width), *inner)

    def forward(self, x: Tensor) -> Tensor:
        """Return it of `[N, width, H, W]`."""
        return x + self.branch(self.depthwise(x).movedim(1, -1)).movedim(-1, 1)


def _moved_digits(model: nn.Module) -> tuple[nn.Module, Loss]:
    """Return a network and the cross entropy on 64 digits, moved by at most a pixel."""
    data = load_digits()
    images = F.pad(torch.tensor(data.images, dtype=torch.float32) / 16, (1, 1, 1, 1))
    places, labels = torch.arange(8), torch.tensor(data.target)

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(1400, (64,), generator=generator)
        shifts = torch.randint(3, (2, 64, 1), generator=generator)
        rows, columns = shifts + places
        x = images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return F.cross_entropy(model(x.unsqueeze(1)), labels[chosen])

    return model, loss


def _residual() -> tuple[nn.Module, Loss]:
    layers = (nn.Linear(64, 512), Residual(512), Residual(512), nn.LayerNorm(512))
    return _moved_digits(nn.Sequential(nn.Flatten(), *layers, nn.Linear(512, 10)))


def _convnext() -> tuple[nn.Module, Loss]:
    layers = (nn.Conv2d(1, 192, 2, 2), ConvNeXtBlock(192), ConvNeXtBlock(192))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10))
    return _moved_digits(nn.Sequential(*layers, *head))


def _drawn(X: Tensor, count: int, generator: Generator, *more: Tensor) -> list[Tensor]:
    chosen = torch.randint(len(X), (count,), generator=generator)
    return [x[chosen] for x in (X, *more)]


def _curves() -> tuple[nn.Module, Loss]:
    X = autoencoders.curves()

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        (x,) = _drawn(X, 256, generator)
        return F.binary_cross_entropy_with_logits(model(x), x)

    return autoencoder((X.shape[1], 1000, 500, 250, 30)), loss


def _characters() -> tuple[nn.Module, Loss]:
    text, _ = language.corpus()

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        starts = torch.randint(len(text) - language.LENGTH, (32, 1), generator=generator)
        windows = text[starts + torch.arange(language.LENGTH + 1)]
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    vocabulary = len(language.ALPHABET) + 1
    return LanguageModel(vocabulary, width=128, layers=2, length=language.LENGTH, heads=4), loss


def _friedman() -> tuple[nn.Module, Loss]:
    X = torch.rand(2000, 10, generator=Generator().manual_seed(5))
    y = 10 * torch.sin(math.pi * X[:, 0] * X[:, 1]) + 20 * (X[:, 2] - 0.5) ** 2
    y = y + 10 * X[:, 3] + 5 * X[:, 4]
    targets = ((y - y.mean()) / y.std()).unsqueeze(1)

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        x, own = _drawn(X, 128, generator, targets)
        return F.mse_loss(model(x), own)

    return mlp((10, 1024, 1024, 1)), loss


def _signals() -> tuple[nn.Module, Loss]:
    (X, y), _ = choosing.signals()

    def loss(model: nn.Module, generator: Generator) -> Tensor:
        x, own = _drawn(X, 100, generator, y)
        return F.cross_entropy(model(x), own)

    return mlp((X.shape[1], 1024, 1024, 10), nn.ReLU), loss


PROBLEMS = {
    "regression": WideProblem("tanh MLP 10-1024-1024-1, Friedman's function", 400, _friedman),
    "signals": WideProblem("ReLU MLP 40-1024-1024-10, signals", 400, _signals),
    "curves": WideProblem("tanh autoencoder 400-1000-500-250-30", 300, _curves),
    "characters": WideProblem("transformer, d = 128, 512 within", 300, _characters),
    "residual": WideProblem("residual MLP, 512 and 2,048 within, moved digits", 300, _residual),
    "convnext": WideProblem("ConvNeXt blocks of 192, 768 within, moved digits", 300, _convnext),
}

Record = dict[str, Any]


def run(name: str, contestant: str, seed: int, steps: int | None = None) -> Record:
    """Train, and return the losses of all steps and the CPU seconds until their ends."""
    problem = PROBLEMS[name]
    torch.manual_seed(seed)
    model, loss = problem.make()
    generator, count = Generator().manual_seed(seed), steps or problem.steps
    options = CONTESTANTS[contestant]
    optimizer: torch.optim.Optimizer
    if "lr" in options:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, **options)
    else:
        optimizer = KFACOptimizer(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    losses, seconds, clock = [], [], 0.0
    for _ in range(count):
        start = time.process_time()
        optimizer.zero_grad()
        value = loss(model, generator)
        value.backward()
        optimizer.step()
        schedule.step()
        clock += time.process_time() - start
        losses.append(float(f"{value.item():.5g}"))
        seconds.append(round(clock, 4))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    entries = [x for state in optimizer.state.values() for x in state.values()]
    state = sum(x.numel() * x.element_size() for x in entries if isinstance(x, Tensor))
    own = {"problem": name, "contestant": contestant, "seed": seed}
    return own | {"losses": losses, "seconds": seconds, "state": round(state / size, 2)}


def means(losses: Sequence[float]) -> list[float]:
    """Return the mean of the last steps after each."""
    windows = (losses[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def _reached(record: Record, target: float) -> float:
    pairs = zip(means(record["losses"]), record["seconds"], strict=True)
    return next((seconds for mean, seconds in pairs if mean <= target), math.inf)


def _range(values: Sequence[float]) -> str:
    return " to ".join(f"{x:.3g}" for x in sorted({min(values), max(values)}))


def _time(values: Sequence[float]) -> str:
    return ", ".join("never" if math.isinf(x) else f"{x:.1f}" for x in values)


def table(records: Sequence[Record]) -> str:
    """Return the results: of AdamW, the rate with the lowest median of last losses."""
    rows = []
    for name, problem in PROBLEMS.items():
        own = {
            c: [r for r in records if (r["problem"], r["contestant"]) == (name, c)]
            for c in CONTESTANTS
        }
        if not all(own.values()):
            continue
        last = {c: [means(r["losses"])[-1] for r in runs] for c, runs in own.items()}
        after = [means(r["losses"])[int(TARGET * len(r["losses"])) - 1] for r in own[FULL]]
        target = statistics.median(after)
        adamw = min(
            (c for c in own if "lr" in CONTESTANTS[c]), key=lambda c: statistics.median(last[c])
        )
        for i, contestant in enumerate((FULL, LOW, adamw)):
            runs = own[contestant]
            rows.append(
                [
                    problem.words if i == 0 else "",
                    contestant,
                    _range(last[contestant]),
                    _time([_reached(r, target) for r in runs]),
                    f"{statistics.median(r['seconds'][-1] for r in runs):.1f}",
                    f"{runs[0]['state']:.1f}",
                ]
            )
    header = ("network", "", "last loss", "seconds to the target", "seconds in all", "state")
    return markdown(header, rows)


def main() -> None:
    """Run what is missing, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument(
        "--page", action="store_true", help="put the table into docs/wide_layers.md"
    )
    parser.add_argument("--output", type=Path, help="file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    whole = not arguments.quick and set(arguments.problems) == set(PROBLEMS)
    path = arguments.output or folder_of("", whole) / FILE.name
    records: list[Record] = json.loads(path.read_text()) if path.exists() else []
    seeds, steps = (SEEDS[:1], 2) if arguments.quick else (SEEDS, None)
    known = {(r["problem"], r["contestant"], r["seed"]) for r in records}
    todo = [(p, c, s) for p in arguments.problems for s in seeds for c in CONTESTANTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for job in tqdm([job for job in todo if job not in known], mininterval=5):
            records.append(run(*job, steps) | {"environment": environment("cpu")})
            write_json(path, records)
    print(table(records))
    if arguments.page:
        update_page(PAGE, "wide_layers", table(records))


if __name__ == "__main__":
    main()
