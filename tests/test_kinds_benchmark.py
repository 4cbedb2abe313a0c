"""The comparison of kinds of layers: contestants differ in the kind alone; its tables."""

import json
import re
import sys
import warnings

import pytest
import torch
from torch import nn

from benchmarks import kinds, losses
from benchmarks.kind_tables import COMPARISONS, TUNING_SEED, Comparison, lowest, row
from benchmarks.kinds import PROBLEMS, Fallback, Setting
from benchmarks.loss_tables import METRIC, OBJECTIVE
from benchmarks.optimizers import Joint
from benchmarks.problems import kinds_of_layers
from benchmarks.problems.kinds_of_layers import GraphNetwork, graphs, signals
from kfacopt import KFACOptimizer

FALL = 0.02  # of what the objective begins with
TEXT = "def spam(eggs):\n    return [ham * 2 for ham in eggs]\n" * 20
KINDS = {  # names of parameters that have curvature in the first contestant alone
    "`nn.Embedding`": ("users", "items", "embedding"),
    "embedding as head": ("embedding",),
    "`nn.LayerNorm`": ("norm",),
    "`nn.BatchNorm1d`": ("1.", "4.", "7."),
    "`nn.Conv1d`": ("0.", "3.", "6.", "9."),
    "`nn.MultiheadAttention`": ("self_attn",),
    "`nn.LSTM`": ("lstm",),
    "`A @ (x @ W)`": ("graph_",),
}


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """The standard library's sources take a second."""
    monkeypatch.setattr(kinds_of_layers, "texts", lambda: (TEXT, TEXT))
    kinds_of_layers.words.cache_clear()
    yield
    kinds_of_layers.words.cache_clear()


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_loss_can_be_learnt_from_a_seed(name):
    adam = losses.Setting("AdamW", 1e-2, "constant", 0)
    learnt = [losses.run(PROBLEMS[name], adam, 12, evaluations=2) for _ in range(2)]
    assert learnt[0]["curve"] == learnt[1]["curve"]
    assert learnt[0]["outcome"] == "finished"
    first, last = learnt[0]["curve"][0], learnt[0]["curve"][-1]
    assert last[OBJECTIVE] < (1 - FALL) * first[OBJECTIVE]
    assert last[METRIC] < (1 - FALL) * first[METRIC]


def _preconditioned(problem, contestant):
    training = PROBLEMS[problem].training(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network of convolutions has no layer without them
        optimizer = Setting(contestant, 0.07, "cosine", 0).optimizer(training.models[0])
    for _ in range(2):  # products are layers from the second step on
        training.step([optimizer])
    first = optimizer.optimizers[0] if isinstance(optimizer, Joint) else optimizer
    return {p.parameter for p in first.describe().parameters if p.preconditioned}


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: f"{c.kind} {c.problem}")
def test_contestants_differ_in_the_kind_alone(comparison):
    having = _preconditioned(comparison.problem, comparison.with_kind)
    lacking = _preconditioned(comparison.problem, comparison.without)
    model = PROBLEMS[comparison.problem].training(0).models[0]
    own = {n for n, _ in model.named_parameters() if any(k in n for k in KINDS[comparison.kind])}
    assert own
    assert having - lacking == own
    assert lacking < having


@pytest.mark.filterwarnings("ignore:KFACOptimizer. none of the parameters")
@pytest.mark.parametrize("lr", [None, 0.02])
def test_the_fallback_is_that_of_the_optimizer(lr):
    batch = graphs()[0]
    models = []
    for fallback in (True, False):
        torch.manual_seed(0)
        model = GraphNetwork(4)
        models.append(model)
        params = list(model.parameters())
        if fallback:
            optimizer = Fallback(params, lr)
        else:  # without nn.Linear there are no products either
            optimizer = KFACOptimizer(params, layers=[nn.Conv2d], fallback_lr=lr)
        for _ in range(3):
            optimizer.zero_grad()
            (model(batch[0][:8], batch[1][:8]) - batch[2][:8]).square().mean().backward()
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


def test_data_are_what_is_said():
    text, _ = kinds_of_layers.words()
    assert len(text) == len(re.findall(r"[a-z]+|[^a-z ]| +", TEXT))
    user, item, dense, clicked = kinds_of_layers.clicks()[0]
    assert {len(x) for x in (user, item, dense, clicked)} == {400_000}
    assert {*clicked.unique().tolist()} == {0.0, 1.0}
    adjacency, _, y = graphs()[0]
    assert torch.equal(adjacency, adjacency.mT)
    degrees = (adjacency > 0).sum(2, keepdim=True)
    assert torch.allclose(adjacency, (adjacency > 0) / (degrees * degrees.mT).sqrt())
    both = torch.cat([y, graphs()[1][2]])
    assert float(both.mean()) == pytest.approx(0, abs=1e-5)
    assert float(both.std()) == pytest.approx(1, abs=1e-5)
    noisy, clean = signals()[0]
    assert float((noisy - clean).std()) == pytest.approx(0.5, abs=0.01), "of 128,000 draws"


def _run(contestant, kl_clip, seed, end, metric, fallback_lr=None, outcome="finished"):
    curve = [[0, 0.0, 9.0, 9.0], [9, 4.0, end, metric]]
    entry = vars(Setting(contestant, 0.07, "cosine", seed, fallback_lr, kl_clip))
    return entry | {"curve": curve, "outcome": outcome, "iterations": 9, "warnings": []}


def test_the_table_by_hand():
    runs = [_run("with", 0.03, TUNING_SEED, 1.0, 3.0), _run("with", 0.07, TUNING_SEED, 2.0, 2.0)]
    runs += [_run("base", 0.03, TUNING_SEED, 1.0, 1.0, 3e-3)]
    runs += [_run("base", 0.07, TUNING_SEED, 0.0, 0.0, outcome="diverged")]
    assert lowest(runs, "with", OBJECTIVE) == (None, 0.03)
    assert lowest(runs, "with", METRIC) == (None, 0.07)
    assert lowest(runs, "base", METRIC) == (3e-3, 0.03), "the other diverged"
    comparison = Comparison("kind", "p", "with", "base")
    content = {"runs": runs, "costs": {"with": 3.0, "base": 2.0}}
    assert row(comparison, content) is None, "only tuned so far"
    for seed, (end, metric) in enumerate([(1.0, 4.0), (3.0, 6.0)]):
        runs.append(_run("with", 0.03, seed, end, 0.0))
        runs.append(_run("with", 0.07, seed, 0.0, metric))
        runs.append(_run("base", 0.03, seed, end + 2.5, metric - 1, 3e-3))
    cells, verdicts = row(comparison, content)
    assert cells[:3] == ["kind", "p", "1.50"]
    assert cells[3] == "**2** (1…3) at 0.03, default"
    assert cells[4] == "4.5 (3.5…5.5) at 0.03, 0.003"
    assert cells[5:] == ["5 (4…6) at 0.07, default", "4 (3…5) at 0.03, 0.003"]
    assert verdicts == [1, 0], "both seeds lower; seeds that overlap"
    runs[-1] |= {"outcome": "diverged"}
    cells, verdicts = row(comparison, content)
    assert cells[4] == "failed"
    assert verdicts == [1, 0]


def test_a_quick_run_writes_results_and_a_table(tmp_path, monkeypatch, capsys):
    names = ["clicks", "graphs"]
    arguments = ["kinds", "--quick", "--output", str(tmp_path), "--problems", *names]
    monkeypatch.setattr(sys, "argv", arguments)
    kinds.main()
    printed = capsys.readouterr().out
    assert "| `nn.Embedding` | clicks |" in printed
    assert "Not measured: `nn.Embedding` on words" in printed
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"version", "commit", "device", "threads", "problem"} < found.keys()
        assert {r["seed"] for r in found["runs"]} == {0, TUNING_SEED}
