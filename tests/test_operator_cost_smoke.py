"""A tiny run of the benchmark of product costs, without any claim about time."""

import importlib.util
import json
import pathlib

import pytest
import torch

PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "test_operator_cost.py"


@pytest.fixture
def benchmark_module():
    spec = importlib.util.spec_from_file_location("operator_cost", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_every_operator_of_a_model(benchmark_module, name):
    model, loss_func, data = benchmark_module.make_problem(name, "cpu", batch_size=2)
    gradient = benchmark_module.gradient_evaluation(model, loss_func, data)
    assert benchmark_module.timed(gradient, "cpu") > 0
    for operator in benchmark_module.OPERATORS:
        A = benchmark_module.make_operator("kfacopt", operator, model, loss_func, data)
        assert bool((A @ torch.ones(A.shape[1])).isfinite().all())


def test_operations_are_counted(benchmark_module):
    X, W = torch.rand(3, 4), torch.rand(4, 5)
    assert benchmark_module.operations(lambda: X @ W) == 2 * 3 * 4 * 5


def test_environment_is_recorded(benchmark_module):
    found = json.loads(json.dumps(benchmark_module.environment("cpu")))
    assert {"version", "commit", "device", "dtype", "threads"} <= found.keys()
    assert found["device"]


def test_some_rows_do_not_replace_what_is_published(benchmark_module, monkeypatch):
    monkeypatch.delenv("KFACOPT_BENCHMARK_RESULTS", raising=False)
    results = PATH.parent / "results"
    published = json.loads((results / "operator_cost.json").read_text())["rows"]
    assert benchmark_module.output(published) == results / "operator_cost.json"
    assert benchmark_module.output(published[1:]) == results / "part" / "operator_cost.json"
