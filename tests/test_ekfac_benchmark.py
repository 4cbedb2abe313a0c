"""The comparison of EKFAC with K-FAC, in a tiny form."""

import json

from benchmarks import choosing, ekfac
from benchmarks.environment import environment
from kfacopt.optim.state import inverses
from kfacopt.optim.state.curvature_state import CurvatureState


def test_all_contestants_run_and_are_in_the_tables():
    before = CurvatureState._fold_second_moments, inverses.BASIS_TOLERANCE
    found = {"signals-mlp": ekfac.measure(choosing.PROBLEMS["signals-mlp"], 2, (0,))}
    assert (CurvatureState._fold_second_moments, inverses.BASIS_TOLERANCE) == before
    content = {"environment": environment("cpu"), "settings": ekfac.defaults(), "runs": found}
    report = ekfac.report(content)
    for name in ekfac.CONTESTANTS:
        tables = 1 + ("λ" not in name) + (name in ekfac.contestants("signals-mlp", "time"))
        assert report.count(f"| {name} |") == tables, name


def test_multiples_of_damping_are_those_of_the_default():
    assert ekfac.defaults()["damping"] == ekfac.DAMPING


def test_runs_that_there_are_stay():
    problem, kept = choosing.PROBLEMS["signals-mlp"], []
    found = ekfac.measure(problem, 1, (0,))
    before = json.dumps(found)
    ekfac.measure(problem, 1, (0,), found, lambda: kept.append(1))
    assert json.dumps(found) == before
    assert not kept
