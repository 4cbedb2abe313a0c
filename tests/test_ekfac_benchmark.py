"""The comparison of EKFAC with K-FAC, in a tiny form."""

from benchmarks import choosing, ekfac
from kfacopt.optim.state import inverses
from kfacopt.optim.state.curvature_state import CurvatureState


def test_all_contestants_run_and_are_in_the_tables():
    before = CurvatureState._fold_second_moments, inverses.BASIS_TOLERANCE
    found = {"signals-mlp": ekfac.measure(choosing.PROBLEMS["signals-mlp"], 2, (0,))}
    assert (CurvatureState._fold_second_moments, inverses.BASIS_TOLERANCE) == before
    report = ekfac.report(found)
    assert all(
        report.count(f"| {name} |") == (1 if "λ" in name else 3) for name in ekfac.CONTESTANTS
    )
