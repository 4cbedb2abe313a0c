"""The comparison of losses: its problems are what they claim to be, its harness judges right."""

import json
import math
import sys
import time

import pytest
import torch
from torch import Generator, nn

from benchmarks import losses
from benchmarks.loss_tables import row, seconds_to, tables
from benchmarks.losses import PROBLEMS, RATES, Plan, Runs, Setting, run
from benchmarks.problems import cart_pole
from benchmarks.problems.cart_pole import CartPole, has_fallen, moved, starts, steps_missing
from benchmarks.problems.losses_of_batches import (
    ActorCritic,
    _augmented,
    _strips,
    _triples,
    energy_distance,
    ring,
    shapes,
)
from benchmarks.problems.losses_of_data import arm, digits, eights, halves
from benchmarks.problems.problem import LossProblem, Training
from benchmarks.step_tables import update_page
from kfacopt import KFACOptimizer

ADAM = Setting("AdamW", 3e-3, "constant", 0)
FALL = 0.1  # of what the objective begins with; losses of long runs fall by far more
STEPS = {"ppo": 2, "ctc": 12, "dice": 40, "huber": 200, "gan": 1400}  # until then
SLOW = {"gan"}  # a thousand steps go by before critic and generator agree
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}  # sums of some hundred terms of order 1
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_run_is_seeded(name):
    found = [run(PROBLEMS[name], ADAM, 1 if name == "ppo" else 2) for _ in range(2)]
    assert found[0]["curve"] == found[1]["curve"]
    other = run(PROBLEMS[name], Setting("AdamW", 3e-3, "constant", 1), 1)
    assert other["curve"][0][2] != found[0]["curve"][0][2], "another initialisation"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in PROBLEMS]
)
def test_the_loss_can_be_learnt(name):
    steps = STEPS.get(name, 60)
    learnt = run(PROBLEMS[name], ADAM, steps)
    assert learnt["outcome"] == "finished"
    (_, _, first, _), (count, _, last, _) = learnt["curve"][0], learnt["curve"][-1]
    if name == "gan":  # which circles around what it learns, and where it ends round-off decides
        last = min(value for _, _, value, _ in learnt["curve"])
    assert count == steps
    assert first - last > FALL * abs(first)


# What the problems consist of --------------------------------------------------------------------


def test_carts_obey_lagrange():
    """The acceleration is that of the Lagrangian of a cart and a thin rod, by autograd."""
    state = torch.randn(5, 4, dtype=torch.float64, generator=Generator().manual_seed(0))
    action = torch.tensor([0, 1, 0, 1, 1])
    change = (moved(state, action) - state) / cart_pole.INTERVAL
    torch.testing.assert_close(change[:, [0, 2]], state[:, [1, 3]], **FLOAT64)
    half, mass = cart_pole.HALF_LENGTH, cart_pole.POLE

    def lagrangian(x, v):
        speed = (v[0] + half * v[1] * x[1].cos()) ** 2 + (half * v[1] * x[1].sin()) ** 2
        turning = mass * half**2 / 3 * v[1] ** 2
        kinetic = (cart_pole.CART * v[0] ** 2 + mass * speed + turning) / 2
        return kinetic - mass * cart_pole.GRAVITY * half * x[1].cos()

    for own, push, found in zip(state, action, change, strict=True):
        x, v = own[[0, 2]], own[[1, 3]]
        (_, _), (mixed, inertia) = torch.autograd.functional.hessian(lagrangian, (x, v))
        force = torch.tensor([cart_pole.FORCE * (2 * push - 1), 0], dtype=torch.float64)
        slope = torch.autograd.functional.jacobian(lambda x, v=v: lagrangian(x, v), x)
        exact = torch.linalg.solve(inertia, slope + force - mixed @ v)
        torch.testing.assert_close(found[[1, 3]], exact, **FLOAT64)


def test_advantages_are_sums_of_surprises_to_the_end_of_an_episode():
    torch.manual_seed(0)
    model, poles, length = ActorCritic(), CartPole(3, Generator().manual_seed(0)), 60
    poles.age += cart_pole.HORIZON - 5  # the first episodes are cut
    ages = poles.age.clone()
    data = poles.rollout(model, length)
    state, action, log_p, advantage, goal = (t.unflatten(0, (length, 3)) for t in data)
    assert bool((action == 0).any() and (action == 1).any())
    with torch.no_grad():
        logits, value = model(state)
        after = moved(state, action)
        beyond = model(after)[1] * ~has_fallen(after)
    chosen = torch.distributions.Categorical(logits=logits).log_prob(action)
    torch.testing.assert_close(log_p, chosen, **FLOAT32)
    torch.testing.assert_close(goal, advantage + value, **FLOAT32)
    surprise = 1 + cart_pole.DISCOUNT * beyond - value
    ends = 0
    for n in range(3):
        exact, age = torch.zeros(length), ages[n]
        begin = 0
        for t in range(length):
            age = age + 1
            ended = bool(has_fallen(after[t, n])) or age >= cart_pole.HORIZON
            if ended or t == length - 1:
                for s in range(begin, t + 1):
                    decay = (cart_pole.DISCOUNT * cart_pole.TRACE) ** torch.arange(t + 1 - s)
                    exact[s] = (decay * surprise[s : t + 1, n]).sum()
                begin, age, ends = t + 1, torch.tensor(0.0), ends + ended
        torch.testing.assert_close(advantage[:, n], exact, **FLOAT32)
    assert ends > 5


def test_a_pole_that_is_pushed_one_way_falls_soon_and_one_held_up_stands():
    class Policy(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = torch.tensor(weights)

        def forward(self, state):
            push = state @ self.weights
            return torch.stack([-push, push], -1), state.sum(-1)

    assert steps_missing(Policy([0.5, 1.0, 30.0, 5.0]), 0.05) == 0
    assert cart_pole.HORIZON - 30 < steps_missing(Policy([0.0, 0.0, 0.0, 0.0]), 0.05) < 500
    assert bool((starts(50, 0.2, Generator()).abs() <= 0.2).all())


def test_strips_have_the_whole_of_their_digits_in_order():
    (X, y), _ = digits()
    strips, classes, numbers = _strips(X, y, 40, Generator().manual_seed(0))
    assert set(numbers.tolist()) == {2, 3, 4}
    for strip, labels, number in zip(strips, classes, numbers, strict=True):
        begin = 0
        for label in labels[:number]:  # each is one of the data, at most two columns after the last
            found = [
                (begin + gap, int(n))
                for gap in range(3)
                if begin + gap + 8 <= strip.shape[1]
                for n in (strip[:, begin + gap : begin + gap + 8].reshape(-1) == X).all(1).nonzero()
            ]
            assert [1 + int(y[n]) for _, n in found] == [int(label)]
            assert strip[:, begin : found[0][0]].sum() == 0
            begin = found[0][0] + 8
        assert strip[:, begin:].sum() == 0


def test_images_are_moved_by_at_most_a_pixel():
    image = torch.zeros(200, 64)
    image[:, 9] = 50  # row 1, column 1
    found = _augmented(image, Generator().manual_seed(0)).argmax(1)
    assert set(found.tolist()) == {8 * i + j for i in range(3) for j in range(3)}


def test_triples_have_a_member_of_the_class_and_one_of_another():
    y = torch.tensor([0, 0, 1, 1, 2, 0])
    positive, negative = _triples(y, Generator().manual_seed(0))
    assert torch.equal(y[positive], y)
    assert bool((y[negative] != y).all())


def test_data_are_what_is_said():
    assert [len(y) for _, y in digits()] == [1297, 500]
    assert [(int(y.sum()), len(y)) for _, y in eights()] == [(30, 1205), (52, 500)]
    counts = halves()[0][1]
    assert counts.max() == 16
    assert torch.equal(counts, counts.round())
    assert arm()[0][1].norm(dim=1).max() <= 1 + 1 / 2 + 1 / 4 + 1 / 8 + FLOAT32["atol"]
    image, disc = shapes()
    inside, outside = image[disc > 0], image[disc == 0]
    assert inside.mean() == pytest.approx(1, abs=0.02)
    assert 0 < outside.mean() < 0.3
    assert 7 < disc.sum((1, 2, 3)).mean() < 39, "areas of discs of radius 1.5 to 3.5"
    radius = ring(100, Generator()).norm(dim=1)
    assert radius.mean() == pytest.approx(1, abs=0.03)


def test_energy_distance_against_loops():
    a, b = torch.randn(5, 2), torch.randn(7, 2) + 1

    def mean(x, y):
        return sum(float((p - q).norm()) for p in x for q in y) / (len(x) * len(y))

    exact = 2 * mean(a, b) - mean(a, a) - mean(b, b)
    assert float(energy_distance(a, b)) == pytest.approx(exact, rel=FLOAT32["rtol"])
    assert float(energy_distance(a, a)) == 0


# The harness -------------------------------------------------------------------------------------


def _problem(step):
    """Return a problem of one parameter, which is objective and metric."""

    def make(generator):
        model = nn.Linear(1, 1)
        return Training((model,), lambda _: step(model), lambda: (float(model.weight),) * 2)

    return LossProblem("p", "l", "d", "weight", "weight", make, 1.0)


def test_errors_and_nan_are_results():
    def fails(model):
        raise KeyError("unknown loss")

    found = run(_problem(fails), ADAM, 3)
    assert found["outcome"] == "KeyError: 'unknown loss'"
    assert [r[0] for r in found["curve"]] == [0]
    found = run(_problem(lambda model: model.weight.data.fill_(math.nan)), ADAM, 3)
    assert found["outcome"] == "diverged"


def test_an_iteration_costs_what_the_thread_computes():
    """K-FAC's cost three times as much; where they raise, nothing that is known."""
    kinds = {torch.optim.AdamW: 1, KFACOptimizer: 3}

    def make(generator):
        model = nn.Linear(1, 1)

        def step(optimizers):
            time.sleep(0.001)  # which is not computing
            end = time.thread_time() + 0.0005 * kinds[type(optimizers[0])]
            while time.thread_time() < end:
                pass

        return Training((model,), step, lambda: (1.0, 1.0))

    problem = LossProblem("p", "l", "d", "o", "m", make, steps=10)
    found = losses.costs(problem, rounds=3)
    assert 0.0005 <= found["AdamW"] < 0.001
    assert 2 < found["K-FAC"] / found["AdamW"] < 3.5
    del kinds[KFACOptimizer]
    assert losses.costs(problem, rounds=1).keys() == {"AdamW"}


def _fake(best):
    """Return runs whose final loss grows with the distance of AdamW's rate to the best; ours 1."""

    def fake(problem, setting, iterations, cost):
        lr = setting.lr
        loss = 1.0 if lr is None else 2 + abs(math.log(lr / best))
        curve = [[0, 0.0, 9.0, 9.0], [1, 1.0, loss, loss + 0.1 * setting.seed]]
        entry = {**vars(setting), "iterations": iterations, "outcome": "finished"}
        return entry | {"curve": curve, "cost": cost}

    return fake


@pytest.mark.parametrize(("best", "tried"), [(1e-3, RATES), (2e-5, (1e-5, 3e-5, *RATES))])
def test_rates_go_on_where_the_best_is_at_the_edge(best, tried, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "run", _fake(best))
    monkeypatch.setattr(losses, "costs", lambda problem: {"AdamW": 0.01, "K-FAC": 0.03})
    plan = Plan(tmp_path, schedules=("constant",))
    runs = Runs(plan, "huber")
    runs.complete()
    rates = {r["lr"] for r in runs.found if r["contestant"] == "AdamW"}
    assert rates == set(tried)
    assert len(runs.found) == 3 * (len(tried) + 1)
    iterations = {r["contestant"]: r["iterations"] for r in runs.found}
    assert iterations == {"AdamW": 800, "K-FAC": 267}, "8 seconds"
    again = Runs(plan, "huber")
    monkeypatch.setattr(losses, "run", None)
    again.complete()  # makes no run
    assert again.found == runs.found
    again.forget(["K-FAC"])
    assert len(again.found) == 3 * len(tried)
    monkeypatch.setattr(losses, "costs", lambda problem: {"AdamW": 0.02, "K-FAC": 0.04})
    again.calibrate()
    assert again.costs == {"AdamW": 0.01, "K-FAC": 0.02}, "in units of the runs that stay"


def _run(contestant, lr, seed, end, outcome="finished"):
    curve = [[0, 0.0, 9.0, 9.0], [5, 2.0, (9 + end) / 2, 5.0], [9, 4.0, end, end]]
    entry = vars(Setting(contestant, lr, "constant", seed)) | {"iterations": 9, "outcome": outcome}
    seconds = 4.0 if lr else 5.0
    return entry | {
        "curve": curve,
        "warnings": [],
        "commit": "0123456789",
        "thread_seconds": seconds,
    }


def test_tables_by_hand(tmp_path):
    runs = [_run("AdamW", 1e-3, s, e) for s, e in enumerate((3.0, 4.0, 5.0))]
    runs += [_run("AdamW", 1e-2, s, e) for s, e in enumerate((2.0, 6.0, 7.0))]
    problem = {"name": "p", "loss": "l", "description": "d", "objective": "o", "metric": "m"}
    machine = {"device": "cpu", "threads": 1, "torch": "2", "version": "0", "date": "today"}
    ours = [_run("K-FAC", None, s, e) for s, e in enumerate((-1.0, 0.5, 2.5))]
    content = machine | {"problem": problem, "runs": runs + ours, "budget": 4}
    assert seconds_to(ours, 4.75) == 2.0
    assert seconds_to(ours, 0.0) == math.inf
    cells, first, second = row(content, "constant")
    assert (first, second) == (1, 1), "all seeds of ours are below all of the best rate's"
    assert cells[1:7] == ["o", "4 (3…5)", "0.001", "**0.5** (-1…2.5)", "4", "4"]
    failed = [_run("K-FAC", None, s, 1.0, "ValueError: no") for s in range(3)]
    both = [content, content | {"runs": runs + failed, "problem": problem | {"name": "q"}}]
    text = tables(both)
    assert "Objective: K-FAC is lower in 1, AdamW in 1, and the seeds overlap in 0" in text
    assert "| q | o | **4** (3…5) | 0.001 | ValueError | 4 | – |" in text
    assert "- K-FAC: ValueError: no (q)" in text
    assert "K-FAC's runs took 1.25 times the thread time" in text
    page = tmp_path / "page.md"
    page.write_text("before <!-- losses --> old <!-- /losses --> after")
    update_page(page, "losses", text)
    assert page.read_text() == f"before <!-- losses -->\n\n{text}\n\n<!-- /losses --> after"


def test_a_quick_run_writes_results_and_tables(tmp_path, monkeypatch, capsys):
    names = ["huber", "gan"]
    arguments = ["losses", "--quick", "--output", str(tmp_path), "--problems", *names]
    monkeypatch.setattr(sys, "argv", arguments)
    losses.main()
    assert "| gan |" in capsys.readouterr().out
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"version", "commit", "device", "threads", "problem"} < found.keys()
        assert {r["contestant"] for r in found["runs"]} == {"AdamW", "K-FAC"}
    assert "| huber |" in (tmp_path / "tables.md").read_text()
