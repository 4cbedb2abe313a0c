"""The comparison in equal time: its two sets of problems, its runs, its report."""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks import equal_time
from benchmarks.equal_time import (
    EVALUATIONS,
    SETS,
    Entry,
    Job,
    append,
    factor,
    fixed_batches,
    jobs,
    missing,
    read,
    run,
    setting,
    train,
    training_loss,
)
from benchmarks.equal_time_tables import counts, failures, rows, text_of, time_to
from benchmarks.problems import regression
from benchmarks.problems.problem import Problem, Task, repeated

EVERY = [(kind, name) for kind, problems in SETS.items() for name in problems]
ADAMW = Entry("AdamW", 1e-3)


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
    for entry in (ADAMW, Entry("K-FAC")):
        found = run(problem, Job(name, entry, "cosine", 0, 1e9), limit=1)
        assert found["outcome"] == "finished", found["outcome"]
        assert math.isfinite(found["metric"])
        assert [row[0] for row in found["curve"]] == [0, 1]
        assert found["curve"][1][2] != found["curve"][0][2]


def test_no_problem_is_in_both_sets():
    chosen, held_out = SETS["choosing"], SETS["held-out"]
    assert len(held_out) >= 12
    assert len(chosen) == 20
    assert not chosen.keys() & held_out.keys()


# Runs --------------------------------------------------------------------------------------------


def _friedman():
    return next(p for p in regression.PROBLEMS if p.name == "friedman-small")


def _line(loss=lambda model, batch: (model(batch[0]) - 1).square().mean()):
    data = (torch.ones(4, 2),)
    make = lambda: Task(nn.Linear(2, 1), loss, repeated(data), lambda model: 0.5)  # noqa: E731
    return Problem("line", "", "", make, budget=1)


def _clock(step=0.25):
    """Return a clock on which each stretch that is measured takes `step` seconds."""
    now = [0.0]

    def clock():
        now[0] += step
        return now[0]

    return clock


def test_time_is_that_of_steps_alone_and_the_rate_follows_it():
    task = _line().task(0)
    rates = []
    optimizers = []

    def note(model, *_):
        if model.training:
            rates.append(optimizers[0].param_groups[0]["lr"])

    task.model.register_forward_hook(note)

    class Kept(Entry):
        def optimizer(self, model):
            optimizers.append(super().optimizer(model))
            return optimizers[0]

    job = Job("line", Kept("SGD", 0.1), "cosine", 0, 2.0)
    curve = list(train(task, job, clock=_clock()))
    # 0.25 seconds for the optimizer, 0.25 for each step: seven steps
    assert [row[:2] for row in curve] == [(0, 0.0), *((n, 0.25 + n / 4) for n in range(1, 8))]
    shares = [(0.25 + n / 4) / 2 for n in range(7)]
    assert rates == pytest.approx([0.1 * (0.5 + 0.5 * math.cos(math.pi * s)) for s in shares])


def test_evaluations_are_spread_over_the_time():
    job = Job("line", Entry("SGD", 1e-3), "constant", 0, 100.0)
    curve = list(train(_line().task(0), job, clock=_clock()))
    assert len(curve) == EVALUATIONS + 1
    assert {round(b[1] - a[1], 6) for a, b in pairwise(curve)} == {5.0}
    assert curve[-1][2] < curve[0][2]


def test_a_constant_rate_is_constant_and_a_cosine_ends_at_nothing():
    assert [factor("constant", s) for s in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert [factor("cosine", s) for s in (0.0, 0.5, 1.2)] == pytest.approx([1.0, 0.5, 0.0])


def test_the_loss_is_that_of_the_same_batches_in_every_run():
    first, second = (fixed_batches(_friedman().task(seed)) for seed in (0, 1))
    assert len(first) == equal_time.BATCHES
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    task = _friedman().task(0)
    with torch.no_grad():
        mean = sum(task.loss(task.model, batch) for batch in first) / len(first)
    assert training_loss(task, first) == pytest.approx(float(mean))
    assert len(fixed_batches(_line().task(0))) == 1, "all data are one batch"


def test_errors_and_divergence_are_results():
    def fails(model, batch):
        if model.training:
            raise RuntimeError("a wire broke")
        return model(batch[0]).sum()

    job = Job("line", ADAMW, "constant", 0, 1.0)
    assert run(_line(fails), job)["outcome"] == "RuntimeError: a wire broke"
    steep = Job("line", Entry("SGD", 1e30), "constant", 0, 1.0)
    found = run(_line(lambda model, batch: model(batch[0]).square().mean()), steep)
    assert found["outcome"] == "diverged"
    assert math.isnan(found["metric"])
    json.dumps(found)


def test_shards_share_the_work_and_take_turns():
    problems = {"friedman-small": _friedman()}
    numbers = list(jobs(problems))
    assert len({tuple(job.key().items()) for _, job in numbers}) == len(numbers)
    cosine = [(n, job) for n, job in numbers if job.schedule == "cosine"]
    assert len(cosine) == 3 * (5 + 4 + 3 + 3 + 2)
    ours = [n % 2 for n, job in cosine if job.entry.contestant == "K-FAC"]
    assert ours in ([0, 1, 0], [1, 0, 1])


def test_muon_enters_where_it_has_a_matrix():
    entered = {
        name
        for name, problem in SETS["held-out"].items()
        if any(job.entry.contestant == "Muon" for _, job in jobs({name: problem}, ["cosine"]))
    }
    assert SETS["held-out"].keys() - entered == {"texture-resnet", "gru-tagger", "sounds-tasks"}


def test_what_exists_is_not_repeated(tmp_path):
    path = tmp_path / "line.jsonl"
    job = Job("line", ADAMW, "constant", 0, 1.0)
    assert missing(job, read([path]), [], "b")
    for commit, metric in (("a", 1.0), ("a", 2.0)):
        append(path, job.key() | {"metric": metric, "environment": {"commit": commit}})
    (record,) = read([path])
    assert record["metric"] == 2.0, "the later line counts"
    assert not missing(job, [record], [], "b")
    assert missing(job, [record], ["AdamW"], "b")
    assert not missing(job, [record], ["AdamW"], "a")
    assert not missing(job, [record], ["K-FAC"], "b")
    assert missing(Job("line", ADAMW, "constant", 1, 1.0), [record], [], "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["held-out", "--set", "damping=1"], "no setting is chosen"),
        (["held-out", "--set", "damping=1", "--final"], "no setting is chosen"),
        (["held-out"], "once, with --final"),
        (["choosing", "--problems", "flow"], "not in the set: flow"),
        (["choosing", "--report", "--page"], "has no page"),
    ],
)
def test_nothing_is_chosen_on_what_is_held_out(arguments, message, capsys):
    with pytest.raises(SystemExit):
        equal_time.parsed(arguments)
    assert message in capsys.readouterr().err


def test_settings_run_k_fac_alone_under_a_name_of_their_own():
    assert setting("damping=0.005") == ("damping", 0.005)
    assert setting("lr=auto") == ("lr", "auto")
    own = equal_time.parsed(["choosing", "--problems", "vit", "--set", "damping=0.005", "lr=0.1"])
    assert {job.entry.label for job in equal_time.planned(own)} == {"K-FAC damping=0.005 lr=0.1"}


# The report --------------------------------------------------------------------------------------

TEN = [round(0.1 * i, 1) for i in range(11)]


def _record(contestant, lr, seed, losses, metric, outcome="finished", problem="p"):
    curve = [[i, 2 * share, loss] for i, (share, loss) in enumerate(zip(TEN, losses, strict=False))]
    key = Job(problem, Entry(contestant, lr), "cosine", seed, 2.0).key()
    where = {"commit": "c0ffee", "device": "d", "torch": "t", "version": "v", "date": "today"}
    found = key | {"curve": curve, "metric": metric, "outcome": outcome, "warnings": []}
    return found | {"environment": where}


def _falling(last):
    """Return losses that fall on a line from 11 to `last`."""
    return [11 + share * (last - 11) for share in TEN]


def _made_up():
    records = []
    for seed in range(3):
        records += [
            _record("AdamW", 1e-3, seed, _falling(5.0), 0.3),
            _record("AdamW", 1e-2, seed, _falling(0.5 + seed / 2), 0.2 + seed / 100),  # 1 in mean
            _record("SGD", 0.1, seed, _falling(6.0), 0.5),
            _record("SOAP", 1e-3, seed, _falling(-1.0), 0.1),
            _record("SOAP", 1e-2, seed, _falling(-9.0), 0.4),
            _record("Muon", 1e-3, seed, _falling(1.0), 0.4),
            _record("K-FAC", None, seed, _falling(-14.0), 0.21 + seed / 100),
            _record("EKFAC", None, seed, _falling(0.0), 0.9, "diverged" if seed else "finished"),
        ]
    return records


PROBLEM = {"p": Problem("p", "a model", "error", lambda: None, budget=1)}


def test_the_time_to_a_loss_is_between_evaluations():
    record = _record("K-FAC", None, 0, [4.0, 2.0, 1.0], 0.0)
    assert time_to(record, 5.0) == 0
    assert time_to(record, 3.0) == pytest.approx(0.05)
    assert time_to(record, 1.0) == pytest.approx(0.2)
    assert time_to(record, 0.5) == math.inf
    assert time_to(record | {"outcome": "diverged"}, 3.0) == math.inf


def test_the_report_by_hand():
    (row,), names = rows(_made_up(), "cosine", PROBLEM)
    assert names == ["SGD", "AdamW", "SOAP", "Muon", "K-FAC", "EKFAC"]
    assert row.best("AdamW", lambda runs: runs[0]["curve"][-1][2]) == 1e-2
    assert row.target == pytest.approx(1.0)
    assert row.speed("AdamW")[0] == pytest.approx(1.0), "two seeds of three reach it"
    assert row.speed("SGD")[0] == math.inf
    assert row.speed("SOAP")[0] == pytest.approx(0.5), "at the faster of its rates"
    assert row.speed("Muon")[0] == pytest.approx(1.0)
    assert row.speed("K-FAC")[0] == pytest.approx(0.4)
    assert row.speed("EKFAC")[0] == math.inf, "two of three diverged"
    assert row.is_as_good("K-FAC"), "0.21…0.23 beside 0.20…0.22"
    assert not row.is_as_good("Muon")
    text = counts([row], "K-FAC")
    assert "on 1 of 1 problems, in at most half of the time on 1 (aim: all)" in text
    assert "in the median in 0.4 (aim: 0.33)" in text
    assert "ahead of SOAP's best on 1 of 1 (aim: 1)" in text
    assert "metric at least AdamW's best on 1 of 1" in text
    assert "on 0 of 1 problems" in counts([row], "EKFAC")
    assert failures(_made_up()) == ["- EKFAC: diverged (p: 2 runs)"]


def test_the_tables_by_hand():
    text = text_of(_made_up(), PROBLEM)
    assert "| p | 1 at 0.01 | – | 0.50 | 1.00 | 0.40 | – |" in text
    assert "| p | 6 at 0.1 | 1 at 0.01 | -9 at 0.01 | 1 at 0.001 | -14 | – |" in text
    assert "| p | error | 0.5 (0.5…0.5) | 0.21 (0.2…0.22) | 0.1 (0.1…0.1) |" in text
    assert "kfacopt v at c0ffee, today; 2 CPU seconds a run, 24 runs, 48 seconds in all." in text


def test_a_report_of_what_is_there_so_far():
    records = [r for r in _made_up() if r["contestant"] in ("AdamW", "K-FAC") and r["seed"] == 0]
    text = text_of(records, PROBLEM | {"q": Problem("q", "", "", lambda: None, budget=1)})
    assert "| p | 0.5 at 0.01 | 0.42 |" in text
    assert "SOAP" not in text


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_the_command_and_its_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("Before <!-- held-out --> nothing yet <!-- /held-out --> after")
    monkeypatch.setitem(equal_time.PAGES, "held-out", page)
    monkeypatch.setitem(SETS, "held-out", {"line": _line()})
    monkeypatch.setattr(equal_time, "warm_up", lambda: None)
    output = tmp_path / "results" / "held_out"
    common = ["held-out", "--output", str(output)]
    few = ["--contestants", "AdamW", "K-FAC", "--seconds", "0.01", "--seeds", "1"]
    for shard in ("1/2", "2/2", "2/2"):
        equal_time.main([*common, *few, "--final", "--shard", shard])
    assert len((output / "line.jsonl").read_text().splitlines()) == 5 + 1 + 3 + 1
    equal_time.main([*common, "--report"])
    assert "nothing yet" in page.read_text()
    equal_time.main([*common, "--report", "--page"])
    assert "| line |" in capsys.readouterr().out
    assert "(../results/held_out/curves_cosine.png)" in page.read_text()
    assert (output / "curves_cosine.png").stat().st_size > 1000
    assert (output / "curves_constant.png").exists()
