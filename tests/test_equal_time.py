"""The comparison in equal time: its two sets of problems, its runs, its report."""

import math

import pytest
import torch

from benchmarks.equal_time import SETS, Entry, Job, run

EVERY = [(kind, name) for kind, problems in SETS.items() for name in problems]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_problem_runs(kind, name):
    problem = SETS[kind][name]
    for entry in (Entry("AdamW", 1e-3), Entry("K-FAC")):
        found = run(problem, Job(name, entry, "cosine", 0, 1e9), limit=1)
        assert found["outcome"] == "finished", found["outcome"]
        assert math.isfinite(found["metric"])
        assert [row[0] for row in found["curve"]] == [0, 1]
        assert found["curve"][1][2] != found["curve"][0][2]
