"""`kfacopt.diagnose`: what it leaves as it was, what it names, and what it advises."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kfacopt import KFACOptimizer, default_layers, diagnose, input_derivatives
from kfacopt.diagnosis import advice, plan
from kfacopt.diagnosis.report import OutsideReport, StepReport
from kfacopt.diagnosis.text import table


class Model(nn.Module):
    """A network with all that a diagnosis might change: buffers, dropout, modes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


def case():
    torch.manual_seed(0)
    return Model(), [(torch.randn(6, 2, 4, 4), torch.randint(3, (6,))) for _ in range(3)]


def trained(model, data, steps=3, **settings):
    optimizer = KFACOptimizer(model.parameters(), **settings)
    for step in range(steps):
        X, y = data[step % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    return optimizer


def numbers(report):
    """Return a report as data, without the time that it took."""
    found = report.to_dict()
    found.pop("seconds"), found.pop("cost")
    return json.dumps(found)


# What it leaves as it was -------------------------------------------------------------------------


def test_model_gradients_generators_and_optimizer_are_as_before():
    model, data = case()
    optimizer = trained(model, data)
    model.drop.eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    kept = json.dumps(optimizer.state_dict(), default=lambda x: x.tolist())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    drawn = (torch.rand(3), random.random(), np.random.rand())  # noqa: NPY002
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    assert torch.equal(torch.rand(3), drawn[0])
    assert (random.random(), np.random.rand()) == drawn[1:]  # noqa: NPY002
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert json.dumps(optimizer.state_dict(), default=lambda x: x.tolist()) == kept


def test_training_goes_on_as_if_nothing_had_been_looked_at():
    results = []
    for look in (False, True):
        model, data = case()
        optimizer = trained(model, data, 2)
        X, y = data[2]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        if look:  # even here, between a forward and a backward pass
            diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
        loss.backward()
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_a_seed_gives_the_same_numbers_and_another_one_others(monkeypatch):
    model, data = case()
    monkeypatch.setattr(plan, "TYPE_2", 0)  # labels are drawn
    loss_func = nn.CrossEntropyLoss()
    first, again, other = (diagnose(model, loss_func, data, seed=s) for s in (3, 3, 4))
    assert first.sample.fisher_type == "mc"
    assert numbers(first) == numbers(again) != numbers(other)


def test_a_shuffled_loader_keeps_its_generator():
    model, data = case()
    X, y = (torch.cat(x) for x in zip(*data, strict=True))
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(X, y), 6, shuffle=True, generator=generator)
    before = generator.get_state()
    diagnose(model, nn.CrossEntropyLoss(), loader)
    assert torch.equal(generator.get_state(), before)


# The sample ---------------------------------------------------------------------------------------


def test_max_data_cuts_batches_and_holds_the_rest_out():
    model, data = case()
    report = diagnose(model, nn.CrossEntropyLoss(), data, max_data=8)
    assert (report.sample.num_batches, report.sample.num_data) == (2, 8)
    assert report.sample.held_out
    with torch.no_grad():
        model.eval()
        X, y = (torch.cat(x)[:8] for x in zip(*data, strict=True))
        expected = F.cross_entropy(model(X), y).item()
    assert report.loss == pytest.approx(expected, rel=1e-5)


def test_a_generator_of_batches_is_read_once_and_only_as_far_as_needed():
    model, data = case()
    rest = iter(data)
    report = diagnose(model, nn.CrossEntropyLoss(), rest, max_batches=1)
    assert report.sample.num_batches == 1
    assert len(list(rest)) == 1  # one is looked at, one is held out


def test_without_further_data_nothing_is_held_out():
    model, data = case()
    report = diagnose(model, nn.CrossEntropyLoss(), data[:1])
    assert not report.sample.held_out
    assert all(step.held_out_ratio is None for step in report.steps)


def test_no_time_is_told_and_not_guessed():
    model, data = case()
    report = diagnose(model, nn.CrossEntropyLoss(), data, max_seconds=1e-9)
    assert [layer.estimator for layer in report.layers] == ["not measured"] * 2
    assert report.outside is None
    assert any("Time ran out" in note and "EKFAC" in note for note in report.notes)
    assert "exact blocks" not in [step.step for step in report.steps]


def test_iterations_that_time_ends_say_how_far_they_came(monkeypatch):
    monkeypatch.setattr("kfacopt.diagnosis.exact.FORMED", 0)
    model, data = case()
    report = diagnose(model, nn.CrossEntropyLoss(), data, max_seconds=1e-9)
    assert (report.solve.iterations, report.solve.converged) == (1, False)
    assert report.solve.halfway == 0
    assert report.solve.residual > 0.25
    (note,) = [note for note in report.notes if "Conjugate gradients stopped" in note]
    assert "after 1 iteration, so that the exact step is not known" in note
    enough = report.solve.enough_seconds
    assert (
        0
        < enough
        <= float(re.search(r"max_seconds=(\S+) is enough", note)[1])
        <= max(1, 1.1 * enough)
    )
    # One iteration from K-FAC's step is K-FAC's step, so that nothing may be compared with it.
    assert all(math.isnan(step.cosine) and math.isnan(step.decrease) for step in report.steps)
    assert all(layer.cosine == {} for layer in report.layers)
    assert all(math.isfinite(step.ratio) for step in report.steps)
    assert "cosine" not in str(report)


def test_a_progress_bar_is_shown_where_it_is_asked_for(capsys):
    model, data = case()
    diagnose(model, nn.CrossEntropyLoss(), data)
    assert capsys.readouterr().err == ""
    diagnose(model, nn.CrossEntropyLoss(), data, progressbar=True)
    assert "diagnose: comparison" in capsys.readouterr().err


# Layers -------------------------------------------------------------------------------------------


def test_what_is_not_covered_is_named_with_the_reason():
    model, data = case()
    report = diagnose(model, nn.CrossEntropyLoss(), data)
    assert [layer.layer for layer in report.layers] == ["conv", "head"]
    assert set(report.uncovered) == {"norm.weight", "norm.bias"}
    assert "layers= does not name" in report.uncovered["norm.bias"]
    share = 8 / sum(p.numel() for p in model.parameters())
    assert report.uncovered_share == pytest.approx(share)
    kinds = [*default_layers(), nn.BatchNorm2d]
    report = diagnose(model, nn.CrossEntropyLoss(), data, layers=kinds)
    assert len(report.layers) == 4
    assert not report.uncovered
    scale = report.layers[1]
    assert scale.input_factor.side == scale.grad_output_factor.side == 1
    assert scale.damping.effective_dimension <= scale.size


class Odd(nn.Module):
    """A layer with a weight that K-FAC sees part of, one that is not used, and a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.tied, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale, self.matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.eye(3))

    def forward(self, x):
        x = self.tied(self.first(x) @ self.matrix) * self.scale
        return x + x * self.tied.weight.diagonal()


def test_odd_uses_are_named_and_products_are_covered():
    torch.manual_seed(0)
    report = diagnose(Odd(), nn.MSELoss(), [(torch.randn(9, 3), torch.randn(9, 3))])
    assert {layer.layer for layer in report.layers} == {"first", "matrix"}
    reasons = report.uncovered
    assert reasons["scale"] == "in no layer that K-FAC knows"
    assert "other ways" in reasons["tied.weight"]
    assert reasons["idle.weight"] == "not used for these data"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, x):
        return (self.layer(self.embedding(x)).tanh() @ self.embedding.weight.T).transpose(1, 2)


@pytest.mark.parametrize("layers", [None, [nn.Linear, nn.Embedding]])
def test_tied_embeddings_are_named(layers):
    torch.manual_seed(0)
    tokens = torch.randint(7, (5, 6))
    report = diagnose(Tied(), nn.CrossEntropyLoss(), [(tokens, tokens)], layers=layers)
    assert [layer.layer for layer in report.layers] == ["layer"]
    assert set(report.uncovered) == {"embedding.weight"}


def test_weight_and_bias_of_their_own_are_blocks_of_their_own():
    model, data = case()
    optimizer = trained(model, data, separate_weight_and_bias=True)
    report = diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    names = [layer.layer for layer in report.layers]
    assert names == ["conv.weight", "conv.bias", "head.weight", "head.bias"]


# An optimizer -------------------------------------------------------------------------------------

SETTINGS = {
    "factored": {},
    "exact": {"damping_method": "exact", "kfac_approx": "reduce"},
    "ekfac": {"preconditioner": "ekfac"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_optimizer_on_the_sample_itself_has_the_factors_of_the_sample(settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(20, 4).double(), torch.randint(3, (20,)))]
    options = {"fisher_type": "type-2", "ema_decay": 0.0, "lr": 0.0, "damping": 0.01}
    optimizer = trained(model, data, 1, **options, **settings)
    report = diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    cosines = {step.step: step.cosine for step in report.steps}
    own = "EKFAC" if "preconditioner" in settings else "K-FAC"
    assert cosines["optimizer"] == pytest.approx(cosines[own], rel=1e-6)
    for layer in report.layers:
        assert layer.damping.damping == 0.01
        assert layer.distance["optimizer"] == pytest.approx(layer.distance[own], rel=1e-6)
        assert (layer.running.factor_age, layer.running.inverse_age) == (0, 0)
        assert layer.running.drift is None or layer.running.drift < 1e-6
    assert report.settings["num_steps"] == 1


@pytest.mark.parametrize("conv_factor", ["full", "channels"])
def test_factors_of_convolutions_are_split_as_the_optimizers(conv_factor):
    model, data = case()
    model, data = model.double().eval(), [(data[0][0].double(), data[0][1])]
    options = {"fisher_type": "type-2", "ema_decay": 0.0, "lr": 0.0, "conv_factor": conv_factor}
    optimizer = trained(model, data, 1, **options)
    report = diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    cosines = {step.step: step.cosine for step in report.steps}
    assert cosines["optimizer"] == pytest.approx(cosines["K-FAC"], rel=1e-6)
    for layer in report.layers:
        assert layer.distance["optimizer"] == pytest.approx(layer.distance["K-FAC"], rel=1e-6)
        assert layer.running.drift < 1e-6


def test_an_optimizer_without_a_step_has_no_direction_yet():
    model, data = case()
    report = diagnose(model, nn.CrossEntropyLoss(), data, KFACOptimizer(model.parameters()))
    assert "optimizer" not in [step.step for step in report.steps]
    assert any("no block" in note for note in report.notes)
    assert "rank A" in str(report)


def test_the_optimizers_own_parameters_alone_are_looked_at():
    model, data = case()
    optimizer = KFACOptimizer(model.head.parameters(), model=model)
    report = diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    assert [layer.layer for layer in report.layers] == ["head"]
    assert report.uncovered["conv.weight"] == "not one of the optimizer's"


# Losses -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_convex_has_no_exact_step(monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    data = [(torch.randn(8, 2), torch.randn(8, 2))]

    def wells(z, y):
        return ((z - y) ** 2 - 40).square().mean()

    monkeypatch.setattr("kfacopt.diagnosis.exact.FORMED", 0)
    model.weight.data *= 0.1
    data[0][1].mul_(0.1)
    with pytest.raises(NotImplementedError, match="curvature"):  # concave: nothing is positive
        diagnose(model, wells, data)

    def mixed(z, y):
        return ((z - y) ** 2 - 40).square()[:, 0].mean() / 1000 + z[:, 1].square().mean()

    report = diagnose(model, mixed, data)
    assert report.solve is None
    assert report.steps == ()
    assert any("not convex" in note for note in report.notes)
    assert "No step is compared" in str(report)


def test_of_a_loss_without_a_reduction_it_is_found_out():
    model, data = case()

    def loss_func(z, y):
        return F.cross_entropy(z, y) * 2

    report = diagnose(model, loss_func, data)
    assert report.sample.num_batches == 3
    assert any("taken for a mean over data" in note for note in report.notes)
    known = diagnose(model, nn.CrossEntropyLoss(), data)
    distances = [[layer.distance["K-FAC"] for layer in r.layers] for r in (report, known)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)
    assert report.loss == pytest.approx(2 * known.loss)


def test_a_sum_is_a_sum():
    model, data = case()
    reports = [
        diagnose(model, nn.CrossEntropyLoss(reduction=r), data, damping=d)
        for r, d in (("mean", 0.01), ("sum", 0.18))
    ]
    assert reports[1].loss == pytest.approx(18 * reports[0].loss, rel=1e-5)
    first, second = ([s.cosine for s in r.steps] for r in reports)
    assert first == pytest.approx(second, rel=1e-3)


# Bad input ----------------------------------------------------------------------------------------


def bad(**changes):
    model, data = case()
    given = {"model": model, "loss_func": nn.CrossEntropyLoss(), "data": data} | changes
    return lambda: diagnose(**given)


BAD = {
    "model": lambda: bad(model=lambda x: x),
    "loss_func": lambda: bad(loss_func=nn.MSELoss),
    "data": lambda: bad(data=3),
    "data: there are no batches": lambda: bad(data=[]),
    "optimizer": lambda: bad(optimizer=torch.optim.SGD([torch.zeros(1)])),
    "damping": lambda: bad(damping=0.0),
    "max_batches": lambda: bad(max_batches=0),
    "max_data": lambda: bad(max_data=1.5),
    "max_seconds": lambda: bad(max_seconds=0),
    "seed": lambda: bad(seed="a"),
    "progressbar": lambda: bad(progressbar=1),
    "layers must be None": lambda: bad(layers=[nn.ReLU]),
    "model: its parameters must be in float32": lambda: bad(model=Model().bfloat16()),
    "model: it has no parameters": lambda: bad(model=nn.ReLU()),
    "model: at its parameters": lambda: bad(
        data=[(torch.full((2, 2, 4, 4), float("nan")), torch.zeros(2).long())]
    ),
    "model: K-FAC covers none": lambda: bad(model=nn.Sequential(nn.BatchNorm2d(2), nn.Flatten())),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    with pytest.raises(ValueError, match=f"^{name}"):
        BAD[name]()()


def test_an_optimizer_of_another_model_is_named():
    model, data = case()
    other = Model()
    optimizer = KFACOptimizer(other.parameters())
    with pytest.raises(ValueError, match=r"^optimizer: it has none"):
        diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    own = KFACOptimizer(model.parameters())
    with pytest.raises(ValueError, match=r"^layers must be None with an optimizer"):
        diagnose(model, nn.CrossEntropyLoss(), data, own, layers=[nn.Linear])


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x + torch.rand_like(x))


def test_a_model_that_draws_in_evaluation_mode_is_named():
    data = [(torch.randn(4, 3), torch.randn(4, 2))]
    with pytest.raises(RuntimeError, match="not deterministic"):
        diagnose(Noisy(), nn.MSELoss(), data)


# What follows -------------------------------------------------------------------------------------


def topics(report):
    return {a.topic for a in report.advice}


def advice_on(report, topic):
    return next(a for a in report.advice if a.topic == topic)


def test_damping_that_is_too_small_and_too_large_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    data = [(torch.randn(12, 6), torch.randint(4, (12,))) for _ in range(2)]
    small = diagnose(model, nn.CrossEntropyLoss(), data, damping=1e-8, max_batches=1)
    found = advice_on(small, "damping")
    assert "too small for this batch" in found.sentence
    kfac = next(step for step in small.steps if step.step == "K-FAC")
    assert found.value in (kfac.ratio, kfac.held_out_ratio)
    assert f"{found.value:.2f}" in found.sentence
    large = diagnose(model, nn.CrossEntropyLoss(), data, damping=1e4)
    assert any("above all curvature of 2 of 2" in a.sentence for a in large.advice)


def test_factors_of_few_data_are_told_to_be_rank_deficient():
    torch.manual_seed(0)
    model = nn.Linear(20, 3)
    report = diagnose(model, nn.MSELoss(), [(torch.randn(7, 20), torch.randn(7, 3))])
    found = advice_on(report, "rank")
    assert found.layers == ("",)
    assert "7 of 21" in found.sentence
    assert found.value == pytest.approx(7 / 21)


def test_softmax_alone_is_no_reason_to_call_a_factor_rank_deficient():
    torch.manual_seed(0)
    model = nn.Linear(2, 10)
    report = diagnose(model, nn.CrossEntropyLoss(), [(torch.randn(64, 2), torch.zeros(64).long())])
    assert report.layers[0].grad_output_factor.rank == 9
    assert "rank" not in topics(report)


class Positions(nn.Module):
    def __init__(self, alike):
        super().__init__()
        self.layer, self.alike = nn.Linear(3, 2), alike

    def forward(self, x):
        return self.layer(x[:, :1].expand_as(x) if self.alike else x).mean(1)


def test_expand_and_reduce_are_compared_where_there_are_positions():
    torch.manual_seed(0)
    data = [(torch.randn(64, 6, 3), torch.randn(64, 2))]
    report = diagnose(Positions(False), nn.MSELoss(), data)
    found = advice_on(report, "expand or reduce")
    layer = report.layers[0]
    ratio = layer.distance["K-FAC reduce"] / layer.distance["K-FAC"]
    assert found.value == pytest.approx(ratio)
    assert ratio < 0.1  # reduce is exact for a mean over positions
    assert 'kfac_approx="reduce"' in found.sentence


def test_stale_factors_are_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
    optimizer = trained(model, data, 1, lr=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    report = diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    found = advice_on(report, "running factors")
    assert found.value > 0
    drifts = [layer.running.drift for layer in report.layers]
    assert max(drifts) > advice.MUCH_DRIFT


def test_a_fused_lstm_and_derivatives_by_inputs_are_looked_at():
    torch.manual_seed(0)

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model, data = Sequence(), [(torch.randn(6, 5, 3), torch.randn(6, 2))]
    reasons = diagnose(model, nn.MSELoss(), data).uncovered
    assert reasons["lstm.weight_hh_l0"] == "in nn.LSTM, which layers= does not name"
    report = diagnose(model, nn.MSELoss(), data, layers=[nn.LSTM, nn.Linear])
    names = {layer.layer for layer in report.layers}
    assert names == {"head", "lstm.weight_ih_l0", "lstm.weight_hh_l0"}

    class Laplacian(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x):
            return input_derivatives(self.net, x)[2]

    report = diagnose(Laplacian(), nn.MSELoss(), [(torch.randn(9, 2), torch.randn(9, 1))])
    assert [layer.layer for layer in report.layers] == ["net.0", "net.2"]


def test_wide_factors_leave_ekfac_out(monkeypatch):
    model, data = case()
    monkeypatch.setattr("kfacopt.diagnosis.candidates.WIDEST", 4)
    monkeypatch.setattr("kfacopt.diagnosis.spectra.WIDEST", 4)
    report = diagnose(model, nn.CrossEntropyLoss(), data)
    assert "EKFAC" not in report.layers[0].distance
    assert any("EKFAC is left out" in note for note in report.notes)
    assert report.layers[0].input_factor.rank is None
    assert report.layers[0].grad_output_factor.rank is not None
    assert str(report)


def step(name, cosine, ratio=0.5, held_out=0.5):
    return StepReport(name, cosine, 0.5, ratio, held_out)


def sentences(*steps, outside=None):
    """Advice from directions alone."""
    share = None if outside is None else OutsideReport(outside, 0.0)
    return advice.advice_of(advice.Findings((), steps, share, None, "expand", 0.0, 64))


RULES = {
    # numbers: (topic, what the sentence says, its number) or None
    "the loss rises": (
        [step("K-FAC", 0.5, -2.0), step("gradient", 0.1)],
        ("damping", "-2.00 of what the quadratic model says", -2.0),
    ),
    "it rises on other data": (
        [step("K-FAC", 0.5, 0.9, -0.4), step("gradient", 0.1)],
        ("damping", "raises that of the data that follow (-0.40)", -0.4),
    ),
    "the model is right": (
        [step("K-FAC", 0.5, 0.97, 0.8), step("gradient", 0.1)],
        ("damping", "a smaller one may do", 0.97),
    ),
    "the model is right for the sample alone": (
        [step("K-FAC", 0.5, 0.97, 0.3), step("gradient", 0.1)],
        None,
    ),
    "the optimizer's direction counts": (
        [step("K-FAC", 0.5), step("gradient", 0.1), step("optimizer", 0.5, 0.1)],
        ("damping", "the optimizer's direction", 0.1),
    ),
    "the gradient is closer": (
        [step("K-FAC", 0.25), step("gradient", 0.5)],
        ("K-FAC or the gradient", "0.25 against 0.50", -0.25),
    ),
    "EKFAC is closer": (
        [step("K-FAC", 0.25), step("gradient", 0.1), step("EKFAC", 0.5)],
        ("EKFAC", "cosine 0.50, K-FAC's 0.25", 0.25),
    ),
    "the blocks are no better": (
        [step("K-FAC", 0.5), step("gradient", 0.1), step("exact blocks", 0.5)],
        ("blocks", "0.50 against 0.50", 0.0),
    ),
    "the blocks are better": (
        [step("K-FAC", 0.5), step("gradient", 0.1), step("exact blocks", 0.75)],
        None,
    ),
    "running factors lag": (
        [step("K-FAC", 0.5), step("gradient", 0.1), step("optimizer", 0.25)],
        ("running factors", "the cosine 0.25", 0.25),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_advice_follows_from_the_number_that_it_has(name):
    steps, expected = RULES[name]
    found = sentences(*steps)
    if expected is None:
        assert found == ()
    else:
        topic, words, value = expected
        assert [a.topic for a in found] == [topic]
        assert words in found[0].sentence
        assert found[0].value == pytest.approx(value)


def test_curvature_between_layers_is_told_where_it_is_most():
    (found,) = sentences(step("exact blocks", 0.25), outside=0.75)
    assert found.value == 0.75
    assert "75%" in found.sentence
    assert "0.25" in found.sentence
    assert sentences(outside=0.25) == ()


# The report ---------------------------------------------------------------------------------------


def test_a_report_prints_aligned_and_is_plain_data():
    model, data = case()
    report = diagnose(model, nn.CrossEntropyLoss(), data, trained(model, data))
    text = str(report)
    for name in ("conv", "head", "norm.weight", "K-FAC", "exact blocks", "optimizer"):
        assert name in text
    assert all(a.sentence.split()[0] in text for a in report.advice)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["layer"] == "conv"
    lines = table(("a", "b"), [("x", "1"), ("yyyy", "22")]).splitlines()
    assert lines == ["a      b", "----  --", "x      1", "yyyy  22"]


def test_a_report_draws(tmp_path):
    model, data = case()
    report = diagnose(model, nn.CrossEntropyLoss(), data)
    figure = report.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert len(figure.axes) == 4
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["conv", "head"]
