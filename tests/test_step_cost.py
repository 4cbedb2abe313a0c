"""The step-cost benchmark: its formulas, and a tiny run without any claim about time."""

import copy
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import optimizers, peak_memory, step_cost
from benchmarks.environment import RESULTS, folder_of
from benchmarks.floors import PHASES, LayerShape, bare_calls, layer_shapes, operations
from benchmarks.interleaving import interleaved, median_with_interval
from benchmarks.step_contestants import amortised, contestants
from benchmarks.step_cost import _phases, _rows
from benchmarks.step_tables import _cost, _uncertainty
from benchmarks.workloads import WORKLOADS, make_workload

ROOT = Path(__file__).parents[1]


def test_amortised_cost_is_the_mean_over_a_period():
    plain, factors, inverses = 1.0, 3.0, 10.0
    period = [inverses if n % 6 == 0 else factors if n % 2 == 0 else plain for n in range(6)]
    expected = sum(period) / len(period)
    assert amortised([plain, factors, inverses], [2, 6]) == pytest.approx(expected)
    assert amortised([plain], []) == plain


def test_layer_shapes_of_linear_and_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, stride=2), nn.Flatten(2), nn.Linear(16, 7, bias=False)
    )
    first, second = layer_shapes(model, torch.rand(2, 3, 8, 8))
    assert first == LayerShape(2, 16, 28, 5, False)
    assert second == LayerShape(2, 5, 16, 7, True)


def test_operations_by_hand():
    shape = LayerShape(data=2, positions=3, d_in=4, d_out=5, needs_input_gradient=True)
    rows = 6
    factors = rows * 16 + rows * 25 + 2 * rows * 20
    found = operations(shape, reduce=False, ekfac=False)
    assert found == {"factors": factors, "inverses": 64 + 125, "preconditioning": 2 * 20 * 9}
    reduced = operations(shape, reduce=True, ekfac=False)
    assert reduced["factors"] == factors - 4 * (16 + 25)
    eigen = operations(shape, reduce=False, ekfac=True)
    assert eigen["preconditioning"] == 2 * found["preconditioning"]
    assert eigen["factors"] == factors + 2 * rows * (16 + 25 + 20)
    averaged = operations(shape, reduce=True, ekfac=True)
    assert averaged["factors"] == reduced["factors"] + 2 * rows * (16 + 25 + 20)


def test_patch_correlations_that_repeat_are_counted_once():
    """5 x 5 distances between taps of a 3 x 3 kernel, of 9 x 9 pairs; only for a stride of 1."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(4, 4, 3, stride=2))
    first, second = layer_shapes(model, torch.rand(1, 2, 9, 9))
    assert first.distinct == pytest.approx(25 / 81)
    assert second.distinct == 1
    rows, d_in, d_out = 49, 18, 4
    expected = rows * (25 / 81 * d_in**2 + d_out**2)
    assert operations(first, reduce=False, ekfac=False)["factors"] == pytest.approx(expected)
    averaged = operations(first, reduce=True, ekfac=False)["factors"]
    assert averaged == d_in**2 + d_out**2


@pytest.mark.parametrize("name", WORKLOADS)
def test_bare_calls_run(name):
    work = make_workload(name, "quick", "cpu")
    for call in bare_calls(layer_shapes(work.model, work.X), True, "cpu").values():
        call()


def test_interleaving_times_each_function_once_a_round():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", 3)
    assert calls == ["a", "a", "b", "b"] * 4
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(("count", "low", "high"), [(2, 0, 1), (5, 0, 4), (9, 1, 7), (25, 7, 17)])
def test_the_interval_of_a_median_holds_it_19_times_in_20(count, low, high):
    values = [*range(count)][::-1]
    found = median_with_interval(values)
    assert found == {"median": (count - 1) / 2, "low": low, "high": high}
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        of = median_with_interval(generator.exponential(size=count))
        held += of["low"] <= math.log(2) <= of["high"]
    assert held >= 945 or count < 6


def test_phases_are_differences_within_a_round():
    """A machine that slows down between rounds does not blur them."""
    kfac = next(c for c in contestants("mlp", "rows") if c.name == "K-FAC")
    slow = [1.0, 1.5, 3.0, 2.0, 1.2, 1.1, 4.0]
    ratios = {
        f"K-FAC/{kind}": [cost * s for s in slow]
        for kind, cost in zip(kfac.kinds, (2.0, 3.0, 7.0), strict=True)
    }
    ratios |= {f"bare expand/{phase}": [1.0] for phase in PHASES}
    found = _phases([kfac], ratios, make_workload("mlp", "quick", "cpu"), 1e9, 1.0)["K-FAC"]
    assert (found["factors"]["measured"], found["inverses"]["measured"]) == (1.5, 6.0)
    assert found["factors"]["low"] == 1.0
    row = _rows([kfac], ratios | {"AdamW/plain": slow}, {"K-FAC": 1.0}, {})[1]
    assert row["intervals"] == "(1, 1)"
    assert row["per_adamw_step"] == pytest.approx(7.0)
    assert row["per_forward_backward"] == pytest.approx(10.5)


def trained(model, work, make, steps):
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        work.loss(model).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_contestant_trains_every_parameter(name):
    work = make_workload(name, "quick", "cpu")
    found = contestants(name, work.terms)
    assert {"SGD", "AdamW", "Muon"} < {c.name for c in found}
    for contestant in found:
        make = list(contestant.kinds.values())[-1]
        model = copy.deepcopy(work.model)
        optimizer = trained(model, work, make, steps=3)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert owned == {id(p) for p in model.parameters()}
        pairs = zip(model.named_parameters(), work.model.parameters(), strict=True)
        unmoved = [key for (key, after), before in pairs if torch.equal(after, before)]
        assert not unmoved, f"{contestant.name} leaves {unmoved}"
        assert optimizers.state_bytes(optimizer) > 0


def test_state_bytes_counts_the_state_alone():
    work = make_workload("mlp", "quick", "cpu")
    optimizer = trained(work.model, work, optimizers.adamw, steps=1)
    parameters = list(work.model.parameters())
    counters = 4 * len(parameters)
    expected = 2 * sum(p.numel() * p.element_size() for p in parameters) + counters
    assert optimizers.state_bytes(optimizer) == expected


def test_soap_and_shampoo_join_where_installed():
    pytest.importorskip("pytorch_optimizer")
    assert {"SOAP", "Shampoo"} < {c.name for c in contestants("mlp", "batch")}


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_quick_run_writes_a_result_and_tables(tmp_path):
    command = ["--quick", "--workloads", "mlp", "--output", str(tmp_path)]
    found = run("benchmarks.step_cost", *command)
    assert found.returncode == 0, found.stderr
    result = json.loads((tmp_path / "step_cost_quick_cpu.json").read_text())
    assert {"version", "commit", "device", "dtype", "threads"} < result.keys()
    work = result["workloads"]["mlp"]
    assert work["phases"]["K-FAC"].keys() == {"factors", "inverses", "preconditioning"}
    assert all(row["per_forward_backward"] > 0 for row in work["rows"])
    assert "| K-FAC (10, 100) |" in found.stdout


def test_memory_is_measured_anew_and_times_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(step_cost, "measured_apart", lambda *_: 7)
    row = {"state_per_parameter_byte": 0.0, "peak_memory": 0, "per_forward_backward": 1.5}
    rows = [row | {"contestant": name} for name in ("K-FAC", "SOAP")]
    work = {"rows": rows, "parameter_bytes": 10**9}
    path = tmp_path / "step_cost_quick_cpu.json"
    path.write_text(json.dumps({"size": "quick", "workloads": {"mlp": work}}))
    step_cost.remember(path, peak=True)
    result = json.loads(path.read_text())
    ours, other = result["workloads"]["mlp"]["rows"]
    assert other == rows[1]
    assert ours["peak_memory"] == 7
    assert ours["state_per_parameter_byte"] > 0
    assert ours["per_forward_backward"] == 1.5
    assert result["memory_environment"]["commit"]


def test_a_part_of_the_runs_does_not_replace_what_is_published():
    assert folder_of("x", whole=True) == RESULTS / "x"
    assert folder_of("x", whole=False) == RESULTS / "part" / "x"
    assert folder_of("x", whole=False, output=ROOT) == ROOT


def test_one_round_has_no_interval():
    once = median_with_interval([1.5])
    row = {"per_forward_backward": once["median"], "low": once["low"], "high": once["high"]}
    assert _cost(row) == "1.50"
    assert _uncertainty({"measured": 1.5} | once) == ("one round", False)


def test_peak_memory_is_the_most_that_is_allocated_at_once(monkeypatch):
    def allocate(*_):
        first = torch.ones(2**20)
        del first
        second, third = torch.ones(2**19), torch.ones(2**20)
        del second, third
        torch.ones(2**10)

    monkeypatch.setattr(peak_memory, "_run", allocate)
    assert peak_memory.peak_memory("mlp", "quick", "cpu") == 4 * (2**19 + 2**20)


def test_peak_memory_of_an_optimizer_includes_its_state(monkeypatch):
    run = peak_memory._run  # the profiler counts on what goes away while it is off

    def run_and_collect(*arguments):
        run(*arguments)
        gc.collect()

    monkeypatch.setattr(peak_memory, "_run", run_and_collect)
    peaks = []
    for contestant in ((), ("AdamW", "plain"), ("K-FAC", "inverses")):
        gc.collect()  # what earlier tests left would count where it goes away
        peaks.append(peak_memory.peak_memory("mlp", "quick", "cpu", *contestant))
    alone, with_adamw, with_kfac = peaks
    work = make_workload("mlp", "quick", "cpu")
    parameters = sum(p.numel() * p.element_size() for p in work.model.parameters())
    assert alone > 2 * parameters  # and gradients
    assert with_adamw >= alone + 2 * parameters
    assert with_kfac > with_adamw


@pytest.mark.slow
def test_peak_memory_in_a_process_of_its_own():
    gc.collect()
    here = peak_memory.peak_memory("mlp", "quick", "cpu")
    assert peak_memory.measured_apart("mlp", "quick", "cpu") == here
    with pytest.raises(RuntimeError, match="peak_memory mlp quick cpu Nobody plain failed"):
        peak_memory.measured_apart("mlp", "quick", "cpu", "Nobody", "plain")
