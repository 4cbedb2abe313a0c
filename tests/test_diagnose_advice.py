"""`kfacopt.diagnose`: advice is given where it is true, and says the cure that there is."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer, diagnose
from kfacopt.diagnosis import advice, advice_on_ranks, words
from kfacopt.diagnosis.cost import NO_OPTIMIZER
from kfacopt.diagnosis.findings import Findings
from kfacopt.diagnosis.report import (
    CostReport,
    DampingReport,
    FactorReport,
    LayerReport,
    StepReport,
)


def on(report, topic):
    return [a.sentence for a in report.advice if a.topic == topic]


def batches(X, y, size):
    return list(zip(X.split(size), y.split(size), strict=True))


def classifier(seed=0):
    torch.manual_seed(seed)
    X = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    return model, batches(X, X[:, :5].argmax(1), 32)


def trained(model, data, steps, loss_func=F.cross_entropy, **settings):
    optimizer = KFACOptimizer(model.parameters(), **settings)
    for step in range(steps):
        X, y = data[step % len(data)]
        optimizer.zero_grad()
        loss_func(model(X), y).backward()
        optimizer.step()
    return optimizer


# Damping and noise --------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-4, 1e-3, 0.1, 10.0, 1e3])
def test_at_an_optimum_no_damping_is_called_too_small(damping):
    torch.manual_seed(0)
    X = torch.randn(256, 5)
    y = X.sum(1, keepdim=True) + 0.3 * torch.randn(256, 1)
    model = nn.Linear(5, 1)
    solution = torch.linalg.lstsq(torch.cat([X, torch.ones(256, 1)], 1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:5].T), model.bias.copy_(solution[5])
    report = diagnose(model, nn.MSELoss(), batches(X, y, 32), damping=damping)
    assert not any("too small" in sentence for sentence in on(report, "damping"))
    (noise,) = on(report, "noise")
    gradient = report.steps[0]
    assert f"{gradient.held_out_ratio:.2f}" in noise
    assert any("above all curvature" in s for s in on(report, "damping")) == (damping >= 10)


def step(name, ratio, held_out=None, cosine=0.5):
    return StepReport(name, cosine, 0.5, ratio, held_out)


def found(*steps, layers=(), **further):
    given = {"outside": None, "other_approx": None, "approx": "expand", "uncovered_share": 0.0}
    return advice.advice_of(Findings(layers, steps, num_data=64, **given | further))


ratios = st.floats(-3, 2)


@given(ratios, ratios, ratios, ratios, st.floats(0, 1), st.floats(0.01, 100))
def test_too_small_and_above_all_curvature_never_stand_together(r, h, g, gh, share, damping):
    factor = FactorReport(1, 1, False, 1.0, largest=1.0, rank=1)
    spectrum = DampingReport(damping, None, damping, 0.0, 1.0)
    numbers = {"distance": {}, "distance_error": {}, "cosine": {}, "running": None}
    layers = [
        LayerReport(
            name, 1, "formed", gradient_share=part, block_solve=None, input_factor=factor,
            grad_output_factor=factor, damping=spectrum, **numbers,
        )
        for name, part in (("a", share), ("b", 1 - share))
    ]  # fmt: skip
    sentences = [
        a.sentence for a in found(step("gradient", g, gh), step("K-FAC", r, h), layers=layers)
    ]
    said = [
        any(w in s for s in sentences) for w in ("too small", "above all curvature", "mostly of")
    ]
    assert not (said[0] and said[1])
    assert not (said[0] and said[2])


def test_the_step_that_the_optimizer_takes_decides_on_damping():
    full = [
        step("gradient", 1.0, 0.9, cosine=0.1),
        step("K-FAC", -2.0, -2.0),
        step("optimizer", -2.0, -2.0),
    ]
    assert "too small" in found(*full)[0].sentence
    assert found(*full, step("clipped step", 0.98, 0.6)) == ()
    (rises,) = found(*full, step("clipped step", 0.98, -0.6))
    assert "the optimizer's clipped step" in rises.sentence


def test_the_clipped_step_is_the_one_that_is_taken():
    model, data = classifier()
    model = model.double()
    data = [(X.double(), y) for X, y in data[:1]]
    settings = {"ema_decay": 0.0, "momentum": 0.0, "kl_clip": 1e-3, "fisher_type": "type-2"}
    optimizer = trained(model, data, 1, lr=0.5, **settings)
    report = diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    clipped = next(s for s in report.steps if s.step == "clipped step")
    # The same step with the inverses that were looked at: of an optimizer that does not renew them.
    before = [F.cross_entropy(model(X), y).item() for X, y in data]
    trained_on = copy.deepcopy((model, optimizer))
    own, other = trained_on
    X, y = data[0]
    other.zero_grad()
    F.cross_entropy(own(X), y).backward()
    gradients = [p.grad.clone() for p in own.parameters()]
    other.step()
    pairs = zip(own.parameters(), model.parameters(), strict=True)
    moved = [(q - p).detach() for p, q in pairs]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, moved, strict=True))
    optimum = next(s for s in report.steps if s.step == "optimizer")
    assert clipped.cosine == pytest.approx(optimum.cosine)
    assert 0 < clipped.length < 1
    after = F.cross_entropy(own(X), y).item()
    curvature = curvature_along(model, data, moved)
    assert clipped.ratio == pytest.approx((before[0] - after) / (slope - curvature / 2), rel=1e-6)


def curvature_along(model, data, moved):
    """dᵀ F d of cross entropy's GGN, by the outputs' derivative along d."""
    X = data[0][0]
    params = {name: p.detach() for name, p in model.named_parameters()}
    tangents = dict(zip(params, moved, strict=True))
    call = lambda params: torch.func.functional_call(model, params, (X,))  # noqa: E731
    z, dz = torch.func.jvp(call, (params,), (tangents,))
    p = z.softmax(1)
    return float(((p * dz**2).sum(1) - (p * dz).sum(1) ** 2).mean())


# Ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [60, 256])
def test_a_classifiers_head_has_rank_c_minus_one_and_that_is_no_fault(count):
    model, data = classifier()
    report = diagnose(model, nn.CrossEntropyLoss(), data, max_data=count, max_batches=8)
    (sentence,) = on(report, "rank")
    assert sentence.startswith("G of block 2 (4 of 5) lacks one direction")
    assert report.layers[1].grad_output_factor.blind


INPUTS = {
    "one-hot": (lambda: F.one_hot(torch.arange(300) % 5, 5).float(), "lacks rank for good"),
    "collinear": (
        lambda: torch.randn(300, 4) @ torch.randn(4, 6),
        "lacks rank for good. Half of the data have nearly the same rank (5, all 5)",
    ),
    "empty": (
        lambda: F.pad(torch.randn(300, 4), (0, 3)),
        "3 of its 8 inputs are 0 for all data looked at",
    ),
    "few data": (lambda: torch.randn(6, 20), "there are too few data"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_more_data_are_advised_only_where_they_fill_a_rank(name):
    torch.manual_seed(0)
    make, words = INPUTS[name]
    X = make()
    model = nn.Linear(X.shape[1], 2)
    report = diagnose(model, nn.MSELoss(), [(X, torch.randn(len(X), 2))])
    (sentence,) = on(report, "rank")
    assert words in sentence
    assert ("larger batches" in sentence) == (name == "few data")
    assert "of the only block (" in sentence


def test_dead_units_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias[:5] = -100.0
    report = diagnose(model, nn.MSELoss(), [(torch.randn(64, 4), torch.randn(64, 2))])
    assert "5 of its 8 outputs have no gradient" in on(report, "dead units")[0]
    assert "5 of its 9 inputs are 0" in on(report, "rank")[0]


def test_one_datum_and_no_time_leave_the_cause_open_or_plain():
    few = FactorReport(9, 1, False, 1.0, rank=1)
    many = FactorReport(9, 1, False, 1.0, rank=5)
    assert advice_on_ranks.cause_of(few, 1) == "data"
    assert advice_on_ranks.cause_of(many, 2) == "unknown"


# What was not measured ----------------------------------------------------------------------------


def test_means_of_some_blocks_say_so():
    model, data = classifier()
    report = diagnose(model, nn.CrossEntropyLoss(), data)
    first, second = report.layers
    second = copy.copy(second)
    object.__setattr__(second, "distance", {})
    numbers = {"K-FAC": 0.8, "EKFAC": 0.4}
    object.__setattr__(first, "distance", numbers)
    sentence = found(layers=(first, second))[0].sentence
    assert "mean relative distance of 1 of 2 blocks (144 of 229 parameters) 0.40" in sentence


def test_nothing_follows_from_an_exact_step_that_is_not_known():
    names = ("gradient", "K-FAC", "K-FAC reduce", "EKFAC", "optimizer", "exact blocks")
    steps = [step(name, 0.5, cosine=math.nan) for name in names]
    assert found(*steps, other_approx="K-FAC reduce") == ()


# Running factors and cost -------------------------------------------------------------------------


def test_shorter_intervals_are_advised_only_where_there_are_longer_ones():
    low = {"cosine": 0.2}
    gradient, kfac = step("gradient", 1, 0.5, **low), step("K-FAC", 0.5)
    steps = [gradient, kfac, step("optimizer", 0.5, **low)]
    settings = {"factor_update_interval": 10, "ema_decay": 0.9}
    (sentence,) = (a.sentence for a in found(*steps, settings=settings))
    assert "Shorter factor_update_interval and inverse_update_interval follow faster, and cost" in (
        sentence
    )
    tuned = {"factor_update_interval": 1, "inverse_update_interval": 5, "ema_decay": 0.8}
    (sentence,) = (a.sentence for a in found(*steps, settings=tuned))
    assert "Shorter" not in sentence
    noisy = [step("gradient", 1, -0.5, **low), kfac, step("optimizer", 0.5, -1, **low)]
    rare = CostReport(0.1, 3.0, 1.2, 9.0, 20.0, 1.2)
    cost, running = found(*steps, settings=settings, cost=rare)
    assert "longer" not in cost.sentence
    assert "(one with both costs 20.0 passes)" in running.sentence
    noise, running = found(*noisy, settings=settings)
    assert noise.topic == "noise"
    assert "Shorter" not in running.sentence


COSTS = {
    "cheap": (CostReport(0.1, 1.2, 1.1, 2.0, 3.0, 1.1), None),
    "short passes": (
        CostReport(1e-4, 5.0, 4.0, 9.0, 15.0, 2.0),
        "2.5 times fewer steps. A forward",
    ),
    "rare steps": (CostReport(0.1, 3.0, 1.2, 9.0, 20.0, 1.2), "take 1.0: longer factor_update_int"),
    "all steps": (CostReport(0.1, 6.0, None, None, 6.0, 1.0), "6.0 times fewer steps."),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_of_a_step_is_told_beside_adamws(name):
    cost, words = COSTS[name]
    sentences = [a.sentence for a in found(cost=cost)]
    assert len(sentences) == (words is not None)
    assert words is None or words in sentences[0]


@pytest.mark.parametrize("settings", [{}, {"lr": "auto"}, {"factor_update_interval": 3}])
def test_the_cost_of_a_step_is_measured_on_copies(settings):
    model, data = classifier()
    model.insert(1, nn.BatchNorm1d(16)), model.insert(2, nn.Dropout(0.1))
    optimizer = trained(model, data, 4, **settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    report = diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    assert torch.equal(torch.rand(1), expected)
    assert report.cost.step > 1
    assert (report.cost.plain is None) == ("lr" in settings)
    assert report.cost.inverses > 1
    assert "A step takes" in str(report)
    assert str(state) == str((model.state_dict(), optimizer.state_dict()))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_a_loss_that_reaches_the_model_itself_leaves_its_gradients():
    model, data = classifier()

    def loss_func(z, y):
        return F.cross_entropy(z, y) + 0.01 * model[0].weight.square().sum()

    loss_func.reduction = "mean"
    optimizer = trained(model, data, 2)
    kept = [p.grad for p in model.parameters()]
    values = [g.clone() for g in kept]
    diagnose(model, loss_func, data, optimizer)
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    assert all(map(torch.equal, kept, values))


class NotCopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise NotImplementedError("no copies of me")


def test_where_the_cost_cannot_be_measured_that_is_said():
    torch.manual_seed(0)
    model, data = NotCopied(3, 2), [(torch.randn(8, 3), torch.randn(8, 2))]
    report = diagnose(model, nn.MSELoss(), data, trained(model, data, 2, F.mse_loss))
    assert report.cost is None
    assert any("no copies of me" in note for note in report.notes)
    report = diagnose(nn.Linear(3, 2), nn.MSELoss(), data)
    assert report.cost is None
    assert NO_OPTIMIZER in report.notes


# Coverage -----------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 8))
        self.table, self.head = nn.Embedding(9, 20), nn.Linear(20, 2)

    def forward(self, x):
        return self.head(F.linear(x, self.weight * 0.5) + self.table.weight[0])


def test_the_cure_of_what_is_not_covered_follows_from_the_reason():
    torch.manual_seed(0)
    model, data = Scaled(), [(torch.randn(40, 8), torch.randn(40, 2))]
    report = diagnose(model, nn.MSELoss(), data)
    first = report.advice[0]
    assert (first.topic, first.value) == ("coverage", pytest.approx(340 / 382))
    assert "47% in nn.Embedding" in first.sentence
    assert "layers=[*kfacopt.default_layers(), nn.Embedding]" in first.sentence
    assert "42% multiplied or added entry by entry" in first.sentence
    assert "scale the layer's output instead (else tune fallback_lr" in first.sentence
    optimizer = trained(model.head, [(torch.randn(40, 20), data[0][1])], 2, F.mse_loss)
    report = diagnose(model, nn.MSELoss(), data, optimizer)
    assert "not one of the optimizer's (give them to KFACOptimizer" in report.advice[0].sentence


def test_the_rates_at_which_adamw_trains_the_rest_are_told():
    torch.manual_seed(0)
    model, data = Scaled(), [(torch.randn(40, 8), torch.randn(40, 2))]
    optimizer = trained(model, data, 2, F.mse_loss)
    report = diagnose(model, nn.MSELoss(), data, optimizer)
    assert report.fallback_lr == {"weight": 1e-3, "table.weight": 0.015}
    (sentence,) = on(report, "fallback_lr")
    assert sentence.startswith("AdamW trains weight at 0.001, table.weight at 0.015.")
    assert diagnose(model, nn.MSELoss(), data).fallback_lr == {}


# Losses and input ---------------------------------------------------------------------------------


def contrastive(z, y):
    return -(z @ z.mT).log_softmax(1).diagonal().mean()


LOSSES = {
    "lambda, mean": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), "mean"),
    "partial, sum": (partial(F.cross_entropy, reduction="sum"), "sum"),
    "function": (F.cross_entropy, "mean"),
    "of pairs": (contrastive, None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_whether_a_loss_is_a_mean_or_a_sum_is_found_out_by_trying(name):
    loss_func, reduction = LOSSES[name]
    model, data = classifier()
    if reduction is None:
        data = [(X[:6], y[:6]) for X, y in data]
        report = diagnose(model, loss_func, data)
        assert report.sample.num_batches == 1
        assert any('loss_func.reduction = "mean"' in note for note in report.notes)
        return
    known = lambda z, y: loss_func(z, y)  # noqa: E731
    known.reduction = reduction
    reports = [diagnose(model, f, data[:3]) for f in (loss_func, known)]
    assert any(f"taken for a {reduction} over data" in note for note in reports[0].notes)
    assert reports[0].sample.num_batches == 3
    assert reports[0].loss == reports[1].loss
    assert reports[0].steps == reports[1].steps


def test_a_loss_without_curvature_is_not_compared_with_nothing():
    torch.manual_seed(0)
    X = torch.randn(40, 3)
    model, data = nn.Linear(3, 1), [(X, X[:, :1])]
    optimizer = trained(model, data, 3, F.l1_loss, fisher_type="empirical")
    report = diagnose(model, nn.L1Loss(), data, optimizer)
    assert report.steps == ()
    assert any("no curvature in the model's predictions" in note for note in report.notes)
    assert not any("not convex" in note for note in report.notes)
    assert {a.topic for a in report.advice} <= {"cost", "running factors"}


class Drawing(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.rand_like(x))


class Named(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


X, Y = torch.randn(9, 3), torch.randn(9, 2)
ERRORS = {
    "a model that draws": (
        RuntimeError,
        lambda: diagnose(Drawing(3, 2), nn.MSELoss(), [(X, Y)]),
        r"^model: not deterministic, .* in evaluation mode\. .* `if self\.training:`\.$",
    ),
    "a model that returns a dictionary": (
        TypeError,
        lambda: diagnose(Named(3, 2), nn.MSELoss(), [(X, Y)]),
        r"^model must return one tensor, got dict; .* fits the wrapper",
    ),
    "L1": (
        NotImplementedError,
        lambda: diagnose(nn.Linear(3, 2), nn.L1Loss(), [(X, Y)]),
        r"^loss_func: L1Loss has no curvature in the model's predictions .* optimizer\.describe",
    ),
    "NLL": (
        ValueError,
        lambda: diagnose(nn.Linear(3, 2), nn.NLLLoss(), [(X, torch.zeros(9).long())]),
        r"^loss_func: nn\.NLLLoss .* Return logits from model and",
    ),
    "dictionaries as batches": (
        ValueError,
        lambda: diagnose(nn.Linear(3, 2), nn.MSELoss(), [{"x": X, "y": Y}]),
        r'^data: .* \[\(b, b\["y"\]\) for b in loader\]',
    ),
    "batches of three": (
        ValueError,
        lambda: diagnose(nn.Linear(3, 2), nn.MSELoss(), [(X, X, Y)]),
        r"^data: .* \[\(\(a, b\), y\) for a, b, y in loader\]",
    ),
    "half precision": (
        ValueError,
        lambda: diagnose(nn.Linear(3, 2).bfloat16(), nn.MSELoss(), [(X, Y)]),
        r"^model: .* Call model\.float\(\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_arguments_that_there_are_and_cures_that_help(name):
    kind, call, pattern = ERRORS[name]
    with pytest.raises(kind, match=pattern) as caught:
        call()
    for wrong in ("model_func", "check_deterministic", "fisher_type", "model.eval()"):
        assert wrong not in str(caught.value)


def test_half_precision_is_looked_at_as_the_error_says_with_its_optimizer():
    model, data = classifier()
    model = model.bfloat16()
    low = [(X.bfloat16(), y) for X, y in data]
    optimizer = trained(model, low, 12)
    kept = [p.detach().clone() for p in model.parameters()]
    report = diagnose(model.float(), nn.CrossEntropyLoss(), data, optimizer)
    assert "optimizer" in [s.step for s in report.steps]
    model.to(torch.bfloat16)
    assert all(map(torch.equal, model.parameters(), kept))
    F.cross_entropy(model(low[0][0]), low[0][1]).backward()
    optimizer.step()


def test_words_of_others_are_left_alone():
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), words.own_words():
        raise RuntimeError("mat1 and mat2 must have the same dtype")


MODES = {
    "batch norm": (nn.BatchNorm1d(3), "with running statistics of normalisations."),
    "dropout": (nn.Dropout(0.5), "evaluation mode: without dropout."),
    "no dropout": (nn.Dropout(0.0), None),
    "batch statistics": (nn.BatchNorm1d(3, track_running_stats=False), None),
}


@pytest.mark.parametrize("name", MODES)
def test_what_evaluation_mode_changes_is_told(name):
    module, words = MODES[name]
    report = diagnose(nn.Sequential(module, nn.Linear(3, 2)), nn.MSELoss(), [(X, Y)])
    notes = [note for note in report.notes if "training mode" in note]
    assert len(notes) == (words is not None)
    assert words is None or notes[0].endswith(words)


def test_a_model_that_is_a_layer_has_a_name_in_the_tables():
    text = str(diagnose(nn.Linear(3, 2), nn.MSELoss(), [(X, Y)], damping=100.0))
    assert "(model)  formed" in text
    assert "above all curvature of the only block (" in text
