"""What an optimizer's step costs, in units of a forward and backward pass.

    python -m benchmarks.step_cost [--size stated|large|quick] [--device cpu|cuda] [--quick]

Claim: see README.md. All contestants are timed in one run, interleaved; each kind of step by
itself (`step_contestants`). The phases of K-FAC stand beside what they must cost (`floors`).
Results go to `results/step_cost_SIZE_DEVICE.json`, those of some workloads or of other rounds to
`results/part`, and as tables to the standard output; `--readme` puts the tables of a result into
README.md. `--memory FILE` measures K-FAC's bytes of a result anew, and leaves its times; with
`--no-memory` those of its state alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, folder_of
from benchmarks.floors import (
    GEMM_SIDE,
    PHASES,
    bare_calls,
    layer_shapes,
    square_product,
    total_operations,
)
from benchmarks.interleaving import interleaved, median_with_interval
from benchmarks.optimizers import missing_packages, state_bytes
from benchmarks.peak_memory import measured_apart
from benchmarks.step_contestants import StepContestant, amortised, contestants
from benchmarks.step_tables import tables, update_readme
from benchmarks.workloads import SIZES, WORKLOADS, Workload, make_workload

ROUNDS = 25
UNIT, PRODUCT = "forward + backward", "square product"


def training_step(workload: Workload, make: Any) -> tuple[Callable[[], None], Any]:
    """Return a function that performs one step on a copy of the model, and the optimizer.

    Args:
        workload: What is trained.
        make: Makes the optimizer; `None` leaves its part out.
    """
    model = copy.deepcopy(workload.model)
    optimizer = None if make is None else make(model)
    owner = model if optimizer is None else optimizer

    def step() -> None:
        owner.zero_grad()
        workload.loss(model).backward()
        if optimizer is not None:
            optimizer.step()

    return step, optimizer


Series = dict[str, list[float]]  # of each function, one value per round


def _phases(
    found: list[StepContestant], ratios: Series, work: Workload, rate: float, unit: float
) -> dict[str, Any]:
    """Return for each K-FAC contestant its phases, the floor, and the bare calls.

    A phase is the difference of two kinds of step in the same round.
    """
    shapes, phases = layer_shapes(work.model, work.X), {}
    for contestant in (c for c in found if c.is_kfac):
        plain, factors, inverses = (ratios[f"{contestant.name}/{k}"] for k in contestant.kinds)
        counts = total_operations(shapes, contestant.reduce, contestant.ekfac)
        pairs = ((factors, plain), (inverses, factors), (plain, [1.0] * len(plain)))
        form = "reduce" if contestant.reduce else "expand"
        phases[contestant.name] = {}
        for phase, (more, less) in zip(PHASES, pairs, strict=True):
            extra = median_with_interval([a - b for a, b in zip(more, less, strict=True)])
            bare = None if contestant.ekfac else ratios[f"bare {form}/{phase}"]
            phases[contestant.name][phase] = {
                "measured": extra["median"],
                "low": extra["low"],
                "high": extra["high"],
                "floor": counts[phase] / rate / unit,
                "bare_calls": None if bare is None else statistics.median(bare),
                "operations": counts[phase],
            }
    return phases


def _rows(
    found: list[StepContestant], ratios: Series, sizes: dict[str, float], peaks: dict[str, int]
) -> list[dict[str, Any]]:
    rows = []
    for contestant in found:
        rounds = list(
            zip(*(ratios[f"{contestant.name}/{k}"] for k in contestant.kinds), strict=True)
        )
        for label, intervals in contestant.intervals.items():
            costs = [amortised(kinds, intervals) for kinds in rounds]
            cost = median_with_interval(costs)
            per_adamw = [c / a for c, a in zip(costs, ratios["AdamW/plain"], strict=True)]
            rows.append(
                {
                    "contestant": contestant.name,
                    "intervals": label,
                    "per_forward_backward": cost["median"],
                    "low": cost["low"],
                    "high": cost["high"],
                    "per_adamw_step": statistics.median(per_adamw),
                    "state_per_parameter_byte": sizes[contestant.name],
                    "peak_memory": peaks.get(contestant.name),
                }
            )
    return rows


def measure(name: str, size: str, device: str, rounds: int, memory: bool) -> dict[str, Any]:
    """Measure all contestants on a workload.

    Args:
        name: The workload's name.
        size: Its size.
        device: Where to run.
        rounds: How often each kind of step is timed.
        memory: Whether to measure peak memory, too.

    Returns:
        What is written to the result file for this workload.
    """
    work = make_workload(name, size, device)
    found = contestants(name, work.terms)
    functions: dict[str, Callable[[], object]] = {PRODUCT: square_product(device)}
    shapes = layer_shapes(work.model, work.X)
    for form in ("expand", "reduce") if name == "cnn" else ("expand",):
        calls = bare_calls(shapes, form == "reduce", device)
        functions |= {f"bare {form}/{phase}": call for phase, call in calls.items()}
    made, forward_backward = {}, training_step(work, None)[0]
    for contestant in found:
        functions[f"{UNIT}, before {contestant.name}"] = forward_backward
        for kind, make in contestant.kinds.items():
            functions[f"{contestant.name}/{kind}"], made[contestant.name] = training_step(
                work, make
            )
    times = interleaved(functions, device, rounds, progress=name)
    # Over a whole round, so that its noise is less than that of what is divided by it.
    alone = [value for key, value in times.items() if key.startswith(UNIT)]
    units = [statistics.median(of_round) for of_round in zip(*alone, strict=True)]
    ratios = {
        key: [t / u for t, u in zip(value, units, strict=True)] for key, value in times.items()
    }
    unit = statistics.median(units)
    rate = 2 * GEMM_SIDE**3 / statistics.median(times[PRODUCT])
    total = sum(p.numel() * p.element_size() for p in work.model.parameters())
    sizes = {key: state_bytes(optimizer) / total for key, optimizer in made.items()}
    peaks: dict[str, int] = {}
    if memory:
        peaks[UNIT] = measured_apart(name, size, device)
        for c in found:
            peaks[c.name] = measured_apart(name, size, device, c.name, list(c.kinds)[-1])
    return {
        "milliseconds_of_forward_backward": 1e3 * unit,
        "products_per_second": rate,
        "parameter_bytes": total,
        "peak_memory_of_forward_backward": peaks.get(UNIT),
        "rows": _rows(found, ratios, sizes, peaks),
        "phases": _phases(found, ratios, work, rate, unit),
        "kinds_of_step": {
            key: median_with_interval(r) for key, r in ratios.items() if key != PRODUCT
        },
    }


def remember(path: Path, peak: bool) -> None:
    """Measure the bytes of K-FAC's state, and at its peak, anew, and write them into a result.

    Args:
        path: The result's file, whose times stay.
        peak: Whether to measure the peak, too, which takes most of the time.
    """
    result = json.loads(path.read_text())
    size, device = result["size"], "cuda" if path.stem.endswith("cuda") else "cpu"
    logging.disable(logging.INFO)
    for name, found in result["workloads"].items():
        work = make_workload(name, size, device)
        for contestant in (c for c in contestants(name, work.terms) if c.is_kfac):
            kind, make = list(contestant.kinds.items())[-1]
            step, optimizer = training_step(work, make)
            step()
            new = {"state_per_parameter_byte": state_bytes(optimizer) / found["parameter_bytes"]}
            if peak:
                new["peak_memory"] = measured_apart(name, size, device, contestant.name, kind)
            for row in (r for r in found["rows"] if r["contestant"] == contestant.name):
                row.update(new)
    result["memory_environment"] = environment(device) | {"peak": peak}
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="stated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each step is timed")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds: tiny models")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--output", type=Path, help="folder of the result")
    parser.add_argument("--memory", type=Path, help="a result whose bytes of K-FAC are run anew")
    parser.add_argument("--readme", type=Path, help="put a result's tables into README.md, no run")
    arguments = parser.parse_args()
    if arguments.readme:
        on_gpu = arguments.readme.stem.endswith("cuda")
        section = "step_cost_cuda" if on_gpu else "step_cost"
        update_readme(section, tables(json.loads(arguments.readme.read_text())))
        return
    if arguments.memory:
        remember(arguments.memory, not arguments.no_memory)
        return
    size = "quick" if arguments.quick else arguments.size
    rounds = 2 if arguments.quick else arguments.rounds
    logging.disable(logging.INFO)  # which parameters K-FAC leaves to AdamW
    result = {**environment(arguments.device), "size": size, "rounds": rounds}
    result |= {"missing_packages": missing_packages(), "workloads": {}}
    whole = [*arguments.workloads] == [*WORKLOADS] and rounds == ROUNDS and not arguments.no_memory
    folder = folder_of("", whole, arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_cost_{size}_{arguments.device}.json"
    for name in arguments.workloads:
        memory = not (arguments.quick or arguments.no_memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the peers' own
            found = measure(name, size, arguments.device, rounds, memory)
        result["workloads"][name] = found
        path.write_text(json.dumps(result, indent=1) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(tables(result))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
