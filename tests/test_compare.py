"""The comparison of optimizers: its formulas, its protocol, and a smoke run."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import report
from benchmarks.calibration import GRADIENT, PERIOD
from benchmarks.compare import options_of, parsed
from benchmarks.contestants import BASELINES, all_contestants
from benchmarks.environment import RESULTS
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import Comparison, Options
from benchmarks.running import Run, evaluation_steps, run
from benchmarks.scoring import outcome, outcomes, profile, relative_to_best, score, sensitivity
from benchmarks.tuning import DEFAULT, SCHEDULES, Choice, LogUniform, Schedule, Trial, trials
from kfacopt.optim.settings import DEFAULTS

ROOT = Path(__file__).parents[1]
NO_LIMIT = 1e9
PROBLEM = "robot-full"


def test_a_space_is_sampled_within_its_bounds_and_prefixes_agree():
    space = {"lr": LogUniform(1e-3, 1.0), "momentum": LogUniform(0.02, 0.2, from_one=True)}
    found = trials(space | {"history": Choice((10, 30))}, 64)
    assert found[:8] == trials(space | {"history": Choice((10, 30))}, 8)
    rates = np.array([t.settings["lr"] for t in found])
    assert 1e-3 <= rates.min() < 3e-3
    assert 0.3 < rates.max() <= 1
    assert abs(np.log10(rates).mean() + 1.5) < 0.1, "uniform in the logarithm"
    assert all(0.8 <= t.settings["momentum"] <= 0.98 for t in found)
    assert {t.settings["history"] for t in found} == {10, 30}
    assert {t.schedule for t in found} == set(SCHEDULES.values)


def test_every_contestant_has_the_same_number_of_trials_and_its_own_space():
    for contestant in all_contestants().values():
        found = trials(contestant.space, 5, not contestant.all_data)
        assert len(found) == 5
        assert all(t.settings.keys() == contestant.space.keys() for t in found)


def test_cosine_warms_up_and_ends_near_zero():
    factors = [Schedule(cosine=True).factor(n, 100) for n in range(100)]
    assert factors.index(max(factors)) == 5
    assert max(factors) == 1
    assert factors[:6] == sorted(factors[:6])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert Schedule().factor(77, 100) == 1


def test_best_metric_in_a_share_of_the_steps():
    curve = [(0, 0.0, 0.1), (1, 1.0, 9.0), (5, 2.0, 4.0), (6, 3.0, math.nan), (10, 4.0, 1.0)]
    found = Run("p", "c", "0", 0, 10, {}, curve, "finished")
    assert [found.best_within(share) for share in (0.01, 0.1, 0.5, 1.0)] == [math.inf, 9, 4, 1]


@pytest.mark.parametrize("steps", [2, 59, 60, 5000])
def test_evaluations_start_early_and_include_the_end(steps):
    found = evaluation_steps(steps)
    assert {1, steps} <= found
    assert len(found) <= 60


def make_run(curve):
    return Run("p", "c", "0", 0, 10, {}, curve, "finished")


def test_a_target_is_reached_by_training_alone():
    found = make_run([(0, 0.0, 0.1), (1, 0.5, 3.0), (2, 1.0, 2.0), (3, 1.5, 2.5)])
    assert found.best == 2.0
    assert found.first_reach(2.5) == (2, 1.0)
    assert found.first_reach(1.9) == (math.inf, math.inf)
    assert make_run([(0, 0.0, 1.0), (1, 0.1, math.nan)]).best == math.inf


TIMES = {
    "p": {"a": 1.0, "b": 2.0, "c": math.inf},
    "q": {"a": 6.0, "b": 2.0, "c": math.inf},
    "r": {"a": math.inf, "b": math.inf, "c": math.inf},
}


def test_profile_and_score_against_numeric_integration():
    ratios = relative_to_best(TIMES)
    assert ratios["a"] == {"p": 1.0, "q": 3.0, "r": math.inf}
    assert profile(ratios["a"], 1) == pytest.approx(1 / 3)
    assert profile(ratios["a"], 3) == pytest.approx(2 / 3)
    taus = np.linspace(1, 4, 300001)
    for name, own in ratios.items():
        expected = np.mean([np.mean(np.array(list(own.values()))[:, None] <= taus, 0)])
        assert score(own) == pytest.approx(expected, abs=1e-4), name
    assert score(ratios["c"]) == 0


# Runs ----------------------------------------------------------------------------------------


def test_the_clock_stands_still_during_evaluation():
    pause = 0.02

    def make():
        task = PROBLEMS["diabetes-full"].make()

        def evaluate(model):
            time.sleep(pause)
            return task.evaluate(model)

        return dataclasses.replace(task, evaluate=evaluate)

    problem = dataclasses.replace(PROBLEMS["diabetes-full"], make=make)
    contestant = all_contestants()["AdamW"]
    run(PROBLEMS["diabetes-full"], contestant, DEFAULT, 0, 2, NO_LIMIT)  # imports a part of torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where other processes run
    try:
        found = run(problem, contestant, DEFAULT, 0, 60, NO_LIMIT)
    finally:
        torch.set_num_threads(threads)
    slept = pause * len(found.curve)
    assert slept > 0.6
    assert 0 < found.curve[-1][1] < slept / 2


def test_a_run_follows_from_its_seed_and_reports_divergence():
    contestants = all_contestants()
    curves = [
        [(n, m) for n, _, m in run(PROBLEMS[PROBLEM], contestants[name], DEFAULT, seed, 5, 9).curve]
        for name, seed in (("K-FAC", 0), ("K-FAC", 0), ("K-FAC", 1), ("AdamW", 0))
    ]
    assert curves[0] == curves[1]
    assert curves[0][0] != curves[2][0], "another initialisation"
    assert curves[0][0] == curves[3][0], "the same initialisation for all contestants"
    wild = Trial("0", {"lr": 1e30}, Schedule())
    found = run(PROBLEMS[PROBLEM], contestants["SGD"], wild, 0, 50, NO_LIMIT)
    assert found.outcome == "diverged"


def test_the_schedule_reaches_every_group_and_shortens_the_run():
    rates = []

    def make(model):
        optimizer = all_contestants()["Muon"].make(model)
        step = optimizer.step

        def recorded():
            rates.append([group["lr"] for group in optimizer.param_groups])
            step()

        optimizer.step = recorded
        return optimizer

    contestant = dataclasses.replace(all_contestants()["Muon"], make=make)
    schedule = Schedule(cosine=True, horizon=0.5)
    found = run(PROBLEMS[PROBLEM], contestant, Trial("0", {}, schedule), 0, 40, NO_LIMIT)
    assert found.steps == len(rates) == 20
    expected = [[1e-3 * schedule.factor(n, 20)] * 2 for n in range(20)]
    np.testing.assert_allclose(rates, expected)


# The protocol --------------------------------------------------------------------------------


@pytest.fixture
def comparison(tmp_path):
    made = []

    def serial_map(function, items):
        items = list(items)
        made.extend(items)
        return map(function, items)

    names = tuple(c.name for c in BASELINES)
    options = Options(tmp_path, (PROBLEM,), (*names, "K-FAC"), 2, 3, 0.0, 0, 6)
    found = Comparison(options, serial_map)
    found.made = made
    return found


def test_targets_are_the_baselines_best_and_stay(comparison):
    comparison.calibrate()
    comparison.freeze_targets()
    assert not [job for job in comparison.made if getattr(job, "contestant", "") == "K-FAC"]
    target = comparison.target(PROBLEM)
    medians = {}
    for contestant in BASELINES:
        tried = [job.read() for job in comparison.trial_jobs(PROBLEM, contestant)]
        best = min(tried, key=lambda r: r.best).trial
        for trial in comparison.trials(contestant):
            if trial.name in (best, "default"):
                jobs = comparison.final_jobs(PROBLEM, contestant.name, trial)
                medians[contestant.name, trial.name] = sorted(j.read().best for j in jobs)[1]
    assert target["value"] == min(medians.values())
    assert target["value"] == medians[target["holder"], target["trial"]]
    path = comparison.options.folder / "targets.json"
    path.write_text(json.dumps({PROBLEM: target | {"value": 0.5}}))
    comparison.complete()
    assert comparison.target(PROBLEM)["value"] == 0.5


@pytest.mark.parametrize(("trial", "label"), [("default", "defaults"), ("1", "trial 1")])
def test_the_report_names_who_set_a_target_and_with_what(comparison, trial, label):
    comparison.complete()
    target = comparison.target(PROBLEM) | {"holder": "SGD", "trial": trial, "value": 0.123}
    (comparison.options.folder / "targets.json").write_text(json.dumps({PROBLEM: target}))
    table = report._metric_table(outcomes(comparison, tuned=True), comparison)
    assert f"| 0.123 (SGD, {label}) |" in table


def test_baselines_may_have_more_trials(comparison):
    options = dataclasses.replace(comparison.options, baseline_trials=3)
    more = Comparison(options, comparison._map)
    counts = {c.name: len(more.trials(c)) for c in more.contestants}
    assert counts == {
        c.name: 1 + (3 if c in BASELINES else options.trials) for c in more.contestants
    }
    first = comparison.trials(BASELINES[0])[0]
    assert more.trials(BASELINES[0])[0] == first  # more of them add to what was run


def test_no_target_is_below_what_the_metric_resolves(comparison, monkeypatch):
    coarse = dataclasses.replace(PROBLEMS[PROBLEM], resolution=1e3)
    monkeypatch.setitem(PROBLEMS, PROBLEM, coarse)
    comparison.calibrate()
    comparison.freeze_targets()
    assert comparison.target(PROBLEM)["value"] == 1e3


def test_a_later_calibration_is_tied_to_the_earlier_by_the_median(tmp_path):
    """The machine is half as fast the second time, and one timing of three is wrong."""
    first = {GRADIENT: 1.0, "SGD": 1.0, "AdamW": 2.0}
    later = iter([first, {GRADIENT: 9.0, "SGD": 2.0, "AdamW": 4.0, "K-FAC": 6.0}])

    def measured(_, items):
        return [(PROBLEM, next(later)) for _ in items]

    for names in (("SGD", "AdamW"), ("SGD", "AdamW", "K-FAC")):
        found = Comparison(Options(tmp_path, (PROBLEM,), names), measured)
        found.calibrate()
    assert found.costs(PROBLEM) == first | {"K-FAC": 3.0}


def test_a_timed_period_holds_whole_intervals():
    defaults = DEFAULTS["fixed"]
    intervals = (defaults.factor_update_interval, defaults.inverse_update_interval)
    assert all(PERIOD % interval == 0 for interval in intervals)


def test_muon_is_absent_where_it_has_no_matrix():
    muon = all_contestants()["Muon"]
    assert [muon.enters(problem) for problem in ("convnet", "vit")] == [False, True]


def test_a_complete_comparison_makes_no_run_twice(comparison):
    comparison.complete()
    first = len(comparison.made)
    runs = [item for item in comparison.made if hasattr(item, "path")]
    assert len({job.path for job in runs}) == len(runs)
    holder = comparison.target(PROBLEM)["holder"]
    found = outcomes(comparison, tuned=True)[PROBLEM]
    assert found.keys() == {"SGD", "AdamW", "K-FAC"}
    assert len(found[holder].runs) == 3
    comparison.complete()
    assert len(comparison.made) == first
    job = comparison.trial_jobs(PROBLEM, comparison.contestants[0])[1]
    job.path.unlink()
    comparison.complete()
    assert comparison.made[first:] == [job]


def test_a_changed_setting_is_run_anew_and_forgetting_keeps_targets(comparison):
    comparison.complete()
    job = comparison.job(PROBLEM, "K-FAC", DEFAULT, 0)
    assert job.read() is not None
    assert dataclasses.replace(job, trial=Trial("default", {"lr": 0.5}, Schedule())).read() is None
    assert dataclasses.replace(job, steps=job.steps + 1).read() is None
    target, costs = comparison.target(PROBLEM), comparison.costs(PROBLEM)
    comparison.forget(["K-FAC"])
    assert job.read() is None
    comparison.calibrate()
    assert comparison.target(PROBLEM) == target
    assert comparison.costs(PROBLEM)["AdamW"] == costs["AdamW"]
    assert comparison.costs(PROBLEM).keys() == {GRADIENT, "SGD", "AdamW", "K-FAC"}


def test_tuned_setting_is_the_first_at_the_target(comparison):
    comparison.complete()
    kfac = comparison.contestants[-1]
    value = comparison.target(PROBLEM)["value"]
    runs = {
        t.name: j.read()
        for t, j in zip(comparison.trials(kfac), comparison.trial_jobs(PROBLEM, kfac), strict=True)
    }
    chosen = comparison.tuned_trial(PROBLEM, kfac).name
    best = min(runs.values(), key=lambda r: (r.first_reach(value)[1], r.best))
    assert runs[chosen] == best
    assert runs.pop("default").configuration["settings"] == {}
    share = sensitivity(comparison, PROBLEM, kfac)
    assert share == sum(r.best <= value for r in runs.values()) / len(runs)
    gained = outcome(comparison, PROBLEM, kfac, tuned=True)
    costs = comparison.costs(PROBLEM)
    ratio = costs["K-FAC"] / costs[GRADIENT]
    assert gained.gradients == pytest.approx([ratio * n for n in gained.steps])


def test_gradients_of_contestants_with_closures_follow_from_their_seconds():
    """A gradient takes 0.5 s, a calibrated step 1 s; the target is met at step 4, after 3 s."""
    curve = [(0, 0.0, 9.0), (4, 3.0, 1.0)]
    found = Run(PROBLEM, "", "default", 0, 4, {}, curve, "finished")
    known = all_contestants()
    stub = SimpleNamespace(
        target=lambda _: {"value": 1.0},
        final_jobs=lambda *_: [SimpleNamespace(read=lambda: found)],
        costs=lambda _: {GRADIENT: 0.5, "L-BFGS": 1.0, "AdamW": 1.0},
    )
    gradients = {n: outcome(stub, PROBLEM, known[n], False).gradients for n in ("L-BFGS", "AdamW")}
    assert gradients == {"L-BFGS": [6.0], "AdamW": [8.0]}


def test_scores_with_one_of_ours_leave_the_others_out(comparison, monkeypatch):
    """K-FAC auto takes 1 s, SOAP 2 s, K-FAC 5 s: SOAP is the best when K-FAC auto is away."""
    seconds = {"SOAP": 2.0, "K-FAC": 5.0, "K-FAC auto": 1.0}
    row = {name: SimpleNamespace(median_seconds=s) for name, s in seconds.items()}
    monkeypatch.setattr(report, "outcomes", lambda _, tuned: {PROBLEM: row})
    comparison.complete()
    found = report.summary(comparison)["scores"]
    assert found["tuned"] == pytest.approx({"SOAP": 2 / 3, "K-FAC": 0.0, "K-FAC auto": 1.0})
    assert found["tuned, one of ours"] == pytest.approx({"SOAP": 1.0, "K-FAC": 0.5})


def test_targets_need_the_baselines(comparison):
    lacking = dataclasses.replace(comparison.options, contestants=("K-FAC",))
    with pytest.raises(ValueError, match="must take part"):
        Comparison(lacking, map).freeze_targets()


@pytest.mark.slow
def test_quick_run_writes_the_whole_report(tmp_path):
    problems = ["diabetes-full", "convnet"]  # all data and batches; test_benchmark_problems has all
    command = [sys.executable, "-m", "benchmarks.compare", "--quick", "--output", str(tmp_path)]
    command += ["--workers", "1", "--problems", *problems]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "targets.json").read_text()).keys() == set(problems)
    for problem in problems:
        for seed_of in ("default-seed0", "0-seed1000", "default-seed1000"):
            path = tmp_path / "runs" / problem / f"K-FAC-{seed_of}.json"
            assert json.loads(path.read_text())["outcome"] == "finished"
    pictures = {"curves_tuned.png", "curves_defaults.png", "profiles.png", "sensitivity.png"}
    assert pictures | {"report.md", "summary.json"} < {path.name for path in tmp_path.iterdir()}
    assert "| convnet" in (tmp_path / "report.md").read_text()


def test_other_sizes_do_not_replace_what_is_published():
    published = options_of(parsed([])).folder
    assert published == RESULTS / "compare"
    assert options_of(parsed(["--again", "K-FAC"])).folder == published
    for other in (["--problems", "vit"], ["--scale", "0.5"], ["--contestants", "AdamW"]):
        assert options_of(parsed(other)).folder == RESULTS / "part" / "compare"
    assert options_of(parsed(["--seeds", "1", "--output", "here"])).folder == Path("here")
