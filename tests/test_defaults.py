"""The choice of defaults: its scores, and what is left out of them."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.defaults import ROUNDED, candidates, current, first_round, left_out, main, scores
from benchmarks.running import Run
from kfacopt import KFACOptimizer
from kfacopt.optim.settings import SEARCHED_INTERVALS


def _run(times):
    """Return a run that reaches the metric m at times[m]."""
    rows = sorted((t, m) for m, t in times.items())
    curve = [(0, 0.0, 9.0), *((n, t, m) for n, (t, m) in enumerate(rows, start=1))]
    return Run("p", "K-FAC", "0", 0, 9, {}, curve, "finished")


def test_scores_by_hand():
    """a reaches 1.0 first, b takes 2.5 times as long; only b reaches 0.5."""
    runs = {"p": {"a": _run({1.0: 2.0}), "b": _run({1.0: 5.0, 0.5: 6.0}), "c": _run({2.0: 1.0})}}
    found = scores(runs, {"p": (0.5, 1.0)})
    assert found["a"]["p"] == pytest.approx((0 + 1) / 2)
    assert found["b"]["p"] == pytest.approx((1 + 0.5) / 2)
    assert found["c"]["p"] == 0


def test_a_problem_has_no_say_in_the_choice_that_it_judges():
    found = {
        "a": {"p": 1.0, "q": 0.0, "r": 0.1},
        "b": {"p": 0.2, "q": 0.6, "r": 0.0},
        "c": {"p": 0.0, "q": 0.0, "r": 0.9},
    }
    chosen = left_out(found, ["p", "q", "r"])
    assert first_round({"now": {}, "0": {"p": 1.0}, "b0": {}, "r1": {}}) == {"0": {"p": 1.0}}
    assert chosen["p"] == {"candidate": "c", "score": 0.0}
    assert chosen["q"] == {"candidate": "a", "score": 0.0}
    assert chosen["r"] == {"candidate": "a", "score": 0.1}


def test_candidates_start_with_the_defaults_and_are_settings_of_the_optimizer():
    found = candidates(3, 2)
    rounded = [f"r{n}" for n in range(len(ROUNDED))]
    assert [t.name for t in found] == ["now", "0", "1", "2", "b0", "b1", *rounded]
    assert found[:3] == candidates(2, 0)
    layer = torch.nn.Linear(2, 1)
    written_out = KFACOptimizer(layer.parameters(), **current().settings)
    plain = KFACOptimizer(layer.parameters())
    assert written_out.defaults == plain.defaults
    intervals = replace(written_out._settings.schedule, searched=SEARCHED_INTERVALS, starts=True)
    assert replace(written_out._settings, schedule=intervals) == plain._settings
    given = set(current().settings)
    assert given == set(found[1].settings) == set(found[-1].settings), "all that is chosen"
    for trial in found:
        KFACOptimizer(layer.parameters(), **trial.settings)


@pytest.mark.slow
def test_a_small_choice_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["--candidates", "1", "--narrower", "0", "--workers", "1", "--scale", "0.0"]
    arguments += ["--problems", "robot-full", "diabetes-full"]
    arguments += ["--output", str(tmp_path / "d"), "--compared", str(tmp_path / "c")]
    monkeypatch.setattr(sys, "argv", ["defaults", *arguments])
    main()
    assert "| robot-full |" in capsys.readouterr().out
    assert (tmp_path / "d" / "defaults.json").exists()
