"""What the examples share is fair: the clock, the schedule, the best rate, and who won."""

import math
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"
RATES = (0.001, 0.01, 0.1)


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """Import it as the examples do."""
    pytest.importorskip("matplotlib", reason="the examples' pictures")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import side_by_side

    yield side_by_side
    sys.modules.pop("side_by_side")


def finished(shared, values):
    """Return runs that ended with these losses, by name, a seed each."""
    runs = []
    for name, losses in values.items():
        for seed, loss in enumerate(losses):
            run = shared.Run(name, torch.optim.AdamW, seed, 1.0)
            run.curve = [(0.0, 0, {"loss": 3.0}), (1.0, 10, {"loss": loss})]
            runs.append(run)
    return runs


def adamw(*losses):
    return {f"AdamW(lr={lr:g})": own for lr, own in zip(RATES, losses, strict=True)}


@pytest.mark.parametrize(
    ("adamws", "ours", "verdict"),
    [
        (adamw([2, 2], [1.0, 1.2], [3, 3]), [0.8, 0.9], "K-FAC wins"),
        (adamw([2, 2], [1.0, 1.2], [3, 3]), [1.3, 1.4], "AdamW wins"),
        (adamw([2, 2], [1.0, 1.2], [3, 3]), [0.8, 1.1], "a draw"),
        (adamw([2, 2], [1.0, 1.2], [3, 3]), [0.1, math.nan], "a draw"),
        (adamw([2, 2], [1.0, 1.2], [0.1, math.nan]), [0.8, 0.9], "K-FAC wins"),
    ],
    ids=["win", "loss", "draw", "diverged", "AdamW diverged"],
)
def test_the_table_says_who_won(shared, capsys, adamws, ours, verdict):
    shared.print_table(finished(shared, adamws | {shared.KFAC: ours}))
    said = capsys.readouterr().out
    assert f"beside AdamW(lr=0.01), 2 seed(s): {verdict}" in said
    assert "at an end" not in said


@pytest.mark.parametrize("losses", [([1], [2], [3]), ([3], [2], [1])], ids=["first", "last"])
def test_a_best_rate_at_an_end_is_said(shared, capsys, losses):
    shared.print_table(finished(shared, adamw(*losses) | {shared.KFAC: [0.5]}))
    assert "at an end" in capsys.readouterr().out


def test_the_rate_falls_and_measuring_is_not_timed(shared):
    model = nn.Linear(2, 1)
    run = shared.Run("SGD", partial(torch.optim.SGD, lr=2.0), 0, 0.2)
    optimizer, rates = run.optimizer(model), []

    def measure():
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass
        return {"loss": 1.0}

    start = time.process_time()
    for _ in run.steps(optimizer, measure):
        rates.append(optimizer.param_groups[0]["lr"])
        end = time.process_time() + 0.001
        while time.process_time() < end:
            pass
    assert time.process_time() - start > 0.2 + 0.01 * len(run.curve)
    assert run.curve[0][:2] == (0.0, 0)
    assert 0.2 <= run.curve[-1][0] < 0.3
    assert rates[0] == 2.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1


def test_others_do_not_count(shared, capsys):
    runs = finished(shared, adamw([2], [1], [3]) | {shared.KFAC: [1.5], "KFACOptimizer, x": [0.1]})
    shared.print_table(runs)
    assert "AdamW wins" in capsys.readouterr().out


def test_the_network_is_the_same_for_all_and_frozen_parameters_are_left(shared):
    seen = []

    def train(run):
        model = nn.Linear(2, 1)
        model.bias.requires_grad_(False)
        optimizer = run.optimizer(model)
        seen.append((run.name, run.seed, [p.shape for p in optimizer.param_groups[0]["params"]]))
        for _ in run.steps(optimizer, lambda: {"loss": 0.0}):
            pass

    shared.compare(train, RATES, seconds=0.001, seeds=2)
    names = [*adamw(1, 2, 3), shared.KFAC]
    assert [entry[:2] for entry in seen[1:]] == [(name, s) for s in (0, 1) for name in names]
    assert all(shapes == [(1, 2)] for *_, shapes in seen)
