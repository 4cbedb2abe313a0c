"""lr="auto": step size, momentum and damping from the quadratic model, against dense oracles."""

import copy
import gc
import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from dense import dense_ggn
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACLinearOperator, KFACOptimizer, KFACWarning
from kfacopt.optim.steps.self_tuning import (
    DAMPING_DECAY,
    DAMPING_INTERVAL,
    damping_floor,
    reduction_ratio_damping,
)
from kfacopt.optim.steps.update import DECAY_PER_LR

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
DAMPING = 0.05
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
TARGETS = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def make(model, **options):
    defaults = {
        "lr": "auto",
        "fisher_type": "type-2",
        "damping": DAMPING,
        "ema_decay": 0.0,
        "factor_update_interval": 1,
        "inverse_update_interval": 1,
    }
    return KFACOptimizer(model.parameters(), **(defaults | options))


def step(model, optimizer, loss_of):
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss.item()


def flat(params):
    return torch.cat([p.detach().flatten() for p in params])


def statistics(optimizer):
    return SimpleNamespace(**optimizer.statistics())


# The quadratic model ----------------------------------------------------------------------------

LOSSES = {
    # name: (module, targets, the loss as a user would write it)
    "ce": (nn.CrossEntropyLoss(), LABELS, lambda m: F.cross_entropy(m(X), LABELS)),
    "ce-of-views": (
        nn.CrossEntropyLoss(),
        LABELS,
        lambda m: F.cross_entropy(m(X).unsqueeze(0).squeeze(0).view(-1, 3)[:6], LABELS),
    ),
    "mse-sum": (
        nn.MSELoss(reduction="sum"),
        TARGETS,
        lambda m: F.mse_loss(m(X), TARGETS, reduction="sum"),
    ),
    "mse-times-3": (None, TARGETS, lambda m: 3 * F.mse_loss(m(X), TARGETS)),
    "bce": (
        nn.BCEWithLogitsLoss(),
        TARGETS,
        lambda m: F.binary_cross_entropy_with_logits(m(X), TARGETS),
    ),
    "two-halves": (
        nn.MSELoss(),
        TARGETS,
        lambda m: (F.mse_loss(m(X[:3]), TARGETS[:3]) + F.mse_loss(m(X[3:]), TARGETS[3:])) / 2,
    ),
    "reduction-none": (
        nn.MSELoss(),
        TARGETS,
        lambda m: F.mse_loss(m(X), TARGETS, reduction="none").mean(),
    ),
}


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
@pytest.mark.parametrize("name", LOSSES)
def test_two_steps_minimise_the_damped_quadratic_model(name, fisher_type):
    """α and μ, the step, and the predicted change, with a dense GGN and the operator's inverse."""
    module, y, loss_of = LOSSES[name]
    factor = 3.0 if module is None else 1.0
    module = module or nn.MSELoss()
    model = mlp()
    params = list(model.parameters())
    optimizer = make(model, fisher_type=fisher_type)
    last = None
    for _ in range(2):
        before = flat(params)
        F_exact = factor * dense_ggn(model, module, params, X, y)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        g = flat([p.grad for p in params])
        optimizer.step()
        d, record = flat(params) - before, statistics(optimizer)
        inverse = dense_inverse(optimizer, params)
        columns = [-inverse @ g] + ([] if last is None else [last])
        D = torch.stack(columns, 1)
        damped = F_exact + DAMPING * torch.eye(len(g))
        c = torch.linalg.solve(D.T @ damped @ D, -D.T @ g)
        assert torch.allclose(d, D @ c, atol=TOLERANCE)
        assert math.isclose(record.step_size, c[0], rel_tol=1e-7)
        assert math.isclose(record.momentum, c[1] if len(c) > 1 else 0.0, rel_tol=1e-6)
        assert math.isclose(record.loss, loss.item(), rel_tol=TOLERANCE)
        assert math.isclose(record.predicted_change, g @ d + d @ F_exact @ d / 2, rel_tol=1e-7)
        change = loss_of(model).item() - loss.item()
        assert math.isclose(record.change, change, rel_tol=1e-7)
        assert math.isclose(record.reduction_ratio, change / record.predicted_change, rel_tol=1e-7)
        last = d


def dense_inverse(optimizer, params):
    """The block-diagonal damped inverse that the optimizer's state describes."""
    blocks = []
    for weight in params[::2]:
        state = optimizer.state[weight]
        G, A = state["grad_output_inverse"][0], state["input_inverse"][0]
        d_out, d_in = weight.shape
        joint = torch.kron(G, A)
        index = torch.arange(d_out * (d_in + 1)).reshape(d_out, d_in + 1)
        order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
        blocks.append(joint[order][:, order])
    return torch.block_diag(*blocks)


def test_the_inverse_is_the_operators():
    model = mlp()
    params = list(model.parameters())
    kfac = KFACLinearOperator(
        model,
        nn.MSELoss(),
        params,
        [(X, TARGETS)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    inverse = kfac.inverse(DAMPING)
    optimizer = make(model)
    step(model, optimizer, LOSSES["two-halves"][2])
    size = sum(p.numel() for p in params)
    expected = inverse @ torch.eye(size)
    assert torch.allclose(dense_inverse(optimizer, params), expected, atol=TOLERANCE)


def test_a_quadratic_objective_is_predicted_exactly():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, d, generator=generator) for d in (4, 3))
    model = nn.Linear(4, 3)
    optimizer = make(model)
    for _ in range(10):
        loss = step(model, optimizer, lambda m: F.mse_loss(m(x), y))
        record = statistics(optimizer)
        assert math.isclose(record.change, record.predicted_change, rel_tol=1e-6, abs_tol=1e-15)
    ones = torch.cat([x, torch.ones(20, 1)], 1)
    residual = y - ones @ torch.linalg.lstsq(ones, y).solution
    assert math.isclose(loss, residual.square().mean(), rel_tol=1e-6)


def test_small_steps_of_a_network_are_predicted_nearly():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    ratios = {}
    for factor in (1.0, 1e-3):
        twin = copy.deepcopy(model)
        optimizer = make(twin, ema_decay=0.5)
        optimizer.param_groups[0]["lr"] = factor
        own = []
        for _ in range(5):
            step(twin, optimizer, lambda m: F.cross_entropy(m(X), LABELS))
            own.append(abs(statistics(optimizer).reduction_ratio - 1))
        ratios[factor] = max(own)
    assert ratios[1e-3] < 1e-3
    assert ratios[1.0] > 1e-2  # a network is not quadratic


# Where the losses are ---------------------------------------------------------------------------


class WithLoss(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, labels):
        z = self.inner(x)
        return {"logits": z, "loss": F.cross_entropy(z, labels)}


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner[2](checkpoint(self.inner[:2], x, use_reentrant=False))


FORMS = {
    "plain": (lambda m: m, lambda m: F.cross_entropy(m(X), LABELS)),
    "inside": (WithLoss, lambda m: m(X, labels=LABELS)["loss"]),
    "in parts": (lambda m: m, lambda m: F.cross_entropy(m[2](m[1](m[0](X))), LABELS)),
    "checkpointed": (Checkpointed, lambda m: F.cross_entropy(m(X), LABELS)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_loop_give_the_same_steps(name):
    torch.manual_seed(0)
    inner = mlp()
    reference = copy.deepcopy(inner)
    wrap, loss_of = FORMS[name]
    model = wrap(inner)
    optimizers = make(model), make(reference)
    for _ in range(3):
        step(model, optimizers[0], loss_of)
        step(reference, optimizers[1], FORMS["plain"][1])
    assert torch.allclose(flat(inner.parameters()), flat(reference.parameters()), atol=TOLERANCE)


def test_micro_batches_are_one_batch():
    results = []
    for sizes in ([6], [2, 3, 1]):
        torch.manual_seed(0)
        model = mlp()
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in zip(X.split(sizes), LABELS.split(sizes), strict=True):
                (F.cross_entropy(model(x), y) * len(x) / len(X)).backward()
            optimizer.step()
        results.append(flat(model.parameters()))
    assert torch.allclose(*results, atol=TOLERANCE)


def test_a_loss_that_is_only_looked_at_and_old_gradients_do_not_count():
    torch.manual_seed(0)
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    F.cross_entropy(model(X), LABELS)
    F.cross_entropy(model(5 * X), LABELS).backward()
    model.zero_grad()  # past the optimizer
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    step(twin, other, lambda m: F.cross_entropy(m(X), LABELS))
    assert torch.allclose(flat(model.parameters()), flat(twin.parameters()), atol=TOLERANCE)


def test_dropout_and_batch_norm_are_evaluated_alike_and_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)
    )
    twin = copy.deepcopy(model)
    optimizer = make(model)
    for i in range(4):
        torch.manual_seed(i)
        twin.load_state_dict(model.state_dict())
        twin(X + i)
        expected = torch.get_rng_state()
        torch.manual_seed(i)
        loss = step(model, optimizer, lambda m, i=i: F.cross_entropy(m(X + i), LABELS))
        assert math.isclose(statistics(optimizer).loss, loss, rel_tol=TOLERANCE)
        assert torch.equal(torch.get_rng_state(), expected)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name))
        assert statistics(optimizer).change < 0


def test_a_model_that_is_not_repeatable_is_refused():
    generator = torch.Generator().manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return self.inner(x + 0.1 * torch.randn(x.shape, generator=generator))

    model = Noisy()
    with pytest.raises(RuntimeError, match=r'lr="auto": the forward pass, evaluated again'):
        step(model, make(model), lambda m: F.cross_entropy(m(X), LABELS))


def test_outputs_changed_in_place_are_noticed():
    model = mlp()

    def loss_of(m):
        z = m(X)
        z[0] = 0.5 * z[0]
        return F.cross_entropy(z, LABELS)

    with pytest.raises(RuntimeError, match=r'lr="auto": the forward pass, evaluated again'):
        step(model, make(model), loss_of)


def test_attention_and_autocast():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True).float()
    head = nn.Linear(4, 3).float()
    both = nn.Sequential(model, head)
    optimizer = make(both)
    x, y = torch.randn(5, 6, 4, dtype=torch.float32), torch.randint(3, (5, 6))

    def loss_of(m):
        with torch.autocast("cpu", torch.bfloat16):
            z = m(x)
        return F.cross_entropy(z.float().flatten(0, 1), y.flatten())

    losses = [step(both, optimizer, loss_of) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert statistics(optimizer).rejected_steps == 0


# Damping, schedules, faults ---------------------------------------------------------------------


def test_the_damping_rule():
    assert reduction_ratio_damping(0.1, 0.76, 0.0) == DAMPING_DECAY * 0.1
    assert reduction_ratio_damping(0.1, 0.24, 0.0) == 0.1 / DAMPING_DECAY
    assert reduction_ratio_damping(0.1, 0.5, 0.0) == 0.1
    assert reduction_ratio_damping(0.1, math.nan, 0.0) == 0.1
    assert reduction_ratio_damping(0.1, 1.0, 0.09) == 0.09
    assert math.isclose(DAMPING_DECAY, 0.95**5)
    floors = [damping_floor(t) for t in (torch.bfloat16, torch.float32, torch.float64)]
    assert floors[0] == floors[1] > floors[2] > 0


def test_the_damping_follows_the_ratio():
    model = nn.Linear(4, 3)
    optimizer = make(model)
    dampings = []
    for _ in range(2 * DAMPING_INTERVAL):
        step(model, optimizer, lambda m: F.mse_loss(m(X), TARGETS))
        dampings.append(optimizer.param_groups[0]["damping"])
    expected = [DAMPING, DAMPING * DAMPING_DECAY, DAMPING * DAMPING_DECAY**2]
    own = dict(itertools.groupby(dampings))
    assert [math.isclose(a, b) for a, b in zip(own, expected, strict=True)] == [True] * 3
    assert dampings[DAMPING_INTERVAL - 2] == DAMPING
    assert statistics(optimizer).damping == dampings[-1]


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_schedules_multiply(factor):
    torch.manual_seed(0)
    model = mlp()
    start = flat(model.parameters())
    twin = copy.deepcopy(model)
    step(model, make(model), LOSSES["ce"][2])
    optimizer = make(twin)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: factor)
    step(twin, optimizer, LOSSES["ce"][2])
    full, scaled = flat(model.parameters()) - start, flat(twin.parameters()) - start
    assert full.norm() > 0
    assert torch.allclose(scaled, factor * full, atol=TOLERANCE)


def test_a_group_with_a_smaller_lr_moves_less():
    torch.manual_seed(0)
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = KFACOptimizer(groups, lr="auto", fisher_type="type-2")
    step(model, optimizer, LOSSES["ce"][2])
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]
    record = statistics(optimizer)
    assert math.isclose(record.reduction_ratio, 1.0, rel_tol=0.5)


class Cliff(nn.Module):
    """NaN where an entry of the weight is beyond a bound."""

    def __init__(self, bound):
        super().__init__()
        self.layer, self.bound = nn.Linear(4, 3), bound
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        z = self.layer(x)
        return z if bool((self.layer.weight.abs() <= self.bound).all()) else torch.nan * z


@pytest.mark.parametrize("bound", [0.05, 0.0], ids=["shortened", "left-out"])
def test_steps_into_nan_are_shortened_or_left_out(bound):
    model = Cliff(bound)
    optimizer = make(model, damping=1e-4)
    before = flat(model.parameters())
    step(model, optimizer, lambda m: F.mse_loss(m(X), TARGETS))
    record = statistics(optimizer)
    assert record.rejected_steps > 0
    assert optimizer.param_groups[0]["damping"] > 1e-4
    assert torch.isfinite(model(X)).all()
    assert torch.equal(flat(model.parameters()), before) == (bound == 0.0)
    if bound:
        assert record.change < 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_are_not_finite_change_nothing(bad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = make(model, ema_decay=0.5)
    for _ in range(2):
        step(model, optimizer, LOSSES["ce"][2])
    before, factor = flat(model.parameters()), optimizer.factors("0").input_factor.clone()
    damping = optimizer.param_groups[0]["damping"]
    with pytest.warns(KFACWarning, match="the step is skipped"):
        step(model, optimizer, lambda m: F.cross_entropy(m(X * bad), LABELS))
    for _ in range(5):
        step(model, optimizer, lambda m: F.cross_entropy(m(X * bad), LABELS))
    assert torch.equal(flat(model.parameters()), before)
    assert torch.equal(optimizer.factors("0").input_factor, factor)
    assert optimizer.param_groups[0]["damping"] == damping
    losses = [step(model, optimizer, LOSSES["ce"][2]) for _ in range(20)]
    assert losses[-1] < 0.85 * losses[0]


def test_a_bad_preconditioner_never_raises_the_loss():
    """A step that raises the loss on its own data is tried again with more damping."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    optimizer = make(model, damping=1e-12)
    losses = [step(model, optimizer, lambda m: 100 * F.mse_loss(m(X), TARGETS)) for _ in range(30)]
    assert statistics(optimizer).rejected_steps > 0
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))


def test_closures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS)
        loss.backward()
        return loss

    for i in range(3):
        torch.manual_seed(i)
        returned = optimizer.step(closure)
        torch.manual_seed(i)
        assert returned.item() == step(twin, other, lambda m: F.cross_entropy(m(X), LABELS))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    assert calls == 3  # all of the objective is recognised: it is replayed


PENALTIES = {
    "by hand": lambda m: 0.1 * sum(p.square().sum() for p in m.parameters()),
    "of one layer": lambda m: m[0].weight.norm(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_terms_that_are_not_seen_need_a_closure(name):
    model = mlp()
    with pytest.raises(RuntimeError, match=r'lr="auto": the objective has terms besides .*closure'):
        step(model, make(model), lambda m: F.mse_loss(m(X), TARGETS) + PENALTIES[name](m))


def past_its_module(m):
    return F.mse_loss(m(X) + X @ m[0].weight[:3].T, TARGETS)


def test_a_weight_that_is_used_past_its_module_needs_a_closure():
    """Losses that are evaluated again do not see it move there."""
    model = mlp()
    with pytest.raises(RuntimeError, match=r"outside of the forward pass .* closure"):
        step(model, make(model), past_its_module)


def test_with_a_closure_a_weight_that_is_used_past_its_module_moves_there_too():
    model = mlp()
    optimizer = make(model)

    def closure():
        optimizer.zero_grad()
        loss = past_its_module(model)
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizer.step(closure).item()
        change = past_its_module(model).item() - loss
        assert change < 0
        assert math.isclose(statistics(optimizer).change, change, rel_tol=TOLERANCE)


@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later"])
def test_clipped_gradients_change_nothing(first):
    """The step size is that of the objective, not of the gradient's length."""
    torch.manual_seed(0)
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    if not first:
        step(model, optimizer, LOSSES["mse-sum"][2])
        step(twin, other, LOSSES["mse-sum"][2])
    step(model, optimizer, LOSSES["mse-sum"][2])
    other.zero_grad()
    LOSSES["mse-sum"][2](twin).backward()
    assert nn.utils.clip_grad_norm_(twin.parameters(), 0.1) > 0.2
    other.step()
    assert torch.allclose(flat(model.parameters()), flat(twin.parameters()), atol=1e-6)
    assert math.isclose(
        statistics(optimizer).reduction_ratio, statistics(other).reduction_ratio, rel_tol=1e-4
    )


@pytest.mark.parametrize("ulps", [-30.0, -11.0, 0.0, 1.0, 11.0, 30.0])
def test_a_closure_that_clips_may_sum_in_another_order(ulps):
    """Its value and that of the losses, evaluated again, agree but for rounding."""
    torch.manual_seed(0)
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    step(model, optimizer, LOSSES["mse-sum"][2])

    def closure():
        other.zero_grad()
        loss = LOSSES["mse-sum"][2](twin)
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        return loss * (1 + ulps * torch.finfo(loss.dtype).eps)

    other.step(closure)
    assert torch.allclose(flat(model.parameters()), flat(twin.parameters()), atol=1e-6)


def test_gradients_that_were_changed_otherwise_are_refused():
    model = mlp()
    optimizer = make(model)
    optimizer.zero_grad()
    LOSSES["ce"][2](model).backward()
    model[0].weight.grad.mul_(0.1)
    with pytest.raises(RuntimeError, match=r'lr="auto": the objective has terms besides'):
        optimizer.step()


def test_a_closure_that_returns_a_part_of_what_it_differentiates():
    """All of the objective is recognised, so that its own value is not needed."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model)

    def closure():
        optimizer.zero_grad()
        for half in (slice(0, 3), slice(3, 6)):
            loss = F.cross_entropy(model(X[half]), LABELS[half]) / 2
            loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
        record = statistics(optimizer)
        assert record.rejected_steps == 0
        assert 0.2 < record.reduction_ratio < 2


def test_closures_without_a_loss_and_interrupted_ones():
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model)
    with pytest.raises(ValueError, match=r"closure must return the loss .* got NoneType"):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS).backward())
    before, calls = flat(model.parameters()), []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS) + model[0].weight.square().sum()
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), before)


def test_weight_decay_groups_and_momentum():
    torch.manual_seed(0)
    start = mlp()
    results = {}
    for decay in (0.0, 0.5):
        model = copy.deepcopy(start)
        optimizer = make(model, weight_decay=decay)
        step(model, optimizer, LOSSES["ce"][2])
        results[decay] = flat(model.parameters()), min(abs(statistics(optimizer).step_size), 1.0)
    (plain, size), (decayed, _) = results[0.0], results[0.5]
    assert torch.allclose(decayed, (1 - DECAY_PER_LR * 0.5 * size) * plain, atol=TOLERANCE)

    model = copy.deepcopy(start)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = KFACOptimizer(groups, lr="auto", fisher_type="type-2")
    for _ in range(3):
        step(model, optimizer, LOSSES["ce"][2])
    assert statistics(optimizer).momentum != 0
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    step(model, optimizer, LOSSES["ce"][2])
    assert statistics(optimizer).momentum == 0
    optimizer.param_groups[0] |= {"lr": 0.0, "momentum": 0.9}
    before = flat(model[0].parameters())
    step(model, optimizer, LOSSES["ce"][2])
    assert torch.equal(flat(model[0].parameters()), before)
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    dampings = [group["damping"] for group in optimizer.param_groups]
    assert dampings[2] == dampings[0] != 1e-3


def test_damping_does_not_drift_where_changes_are_round_off():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).float()
    optimizer = make(model, damping=1e-3)
    x, y = torch.randn(20, 4).float(), torch.randn(20, 3).float()
    for _ in range(100):
        step(model, optimizer, lambda m: F.mse_loss(m(x), y))
    assert optimizer.param_groups[0]["damping"] <= 1e-3


def test_norms_under_autocast():
    """Forward mode has no rules for autocasting: replays are in full precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).float()
    optimizer = make(model)

    def loss_of(m):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(m(X.float()), LABELS)

    losses = [step(model, optimizer, loss_of) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


def test_what_autograd_does_inside_is_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def loss_of(m):
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return F.mse_loss(m(x) + slope[:, :1], TARGETS[:, :1])

    optimizer = make(model)
    with pytest.warns(KFACWarning, match="derivative of the model by its input") as caught:
        step(model, optimizer, loss_of)
    assert len(caught) == 1
    assert all("exp_avg" in optimizer.state[p] for p in model.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_changes_nothing(reduction):
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model)
    step(model, optimizer, LOSSES["mse-sum"][2])
    before = flat(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KFACWarning)
        step(model, optimizer, lambda m: F.mse_loss(m(X[:0]), TARGETS[:0], reduction=reduction))
    assert torch.isfinite(flat(model.parameters())).all()
    assert torch.allclose(flat(model.parameters()), before, atol=1e-3)
    step(model, optimizer, LOSSES["mse-sum"][2])
    assert statistics(optimizer).change < 0


def test_a_closure_knows_terms_that_are_not_recognised():
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model)
    grads = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS) + 0.1 * sum(
            p.square().sum() for p in model.parameters()
        )
        loss.backward()
        grads.append(model[0].weight.grad.clone())
        return loss

    for _ in range(5):
        before = optimizer.step(closure).item()
        record = statistics(optimizer)
        assert math.isclose(record.loss, before, rel_tol=TOLERANCE)
        with torch.enable_grad():
            gradient = model[0].weight.grad.clone()
        assert any(torch.equal(gradient, g) for g in grads[:-1])  # of the start, not of the end
        after = F.cross_entropy(model(X), LABELS) + 0.1 * sum(
            p.square().sum() for p in model.parameters()
        )
        assert math.isclose(record.change, after.item() - before, rel_tol=1e-6)
        grads.clear()


def test_a_grad_scaler_changes_nothing():
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = mlp().float()
        optimizer = make(model, ema_decay=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(X.float()), LABELS)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(flat(model.parameters()))
        assert math.isclose(statistics(optimizer).reduction_ratio, 1.0, rel_tol=0.5)
    assert torch.allclose(*results, atol=1e-5)


def test_resumed_and_copied_runs_are_bit_exact():
    def train(model, optimizer, steps):
        for _ in range(steps):
            step(model, optimizer, LOSSES["ce"][2])

    torch.manual_seed(0)
    options = {"fisher_type": "mc", "inverse_update_interval": 3, "factor_update_interval": 2}
    whole = mlp()
    optimizer = make(whole, ema_decay=0.9, **options)
    train(whole, optimizer, 4)
    resumed, copied = mlp(), copy.deepcopy((whole, optimizer))
    resumed.load_state_dict(whole.state_dict())
    other = make(resumed, ema_decay=0.9, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, own in ((whole, optimizer), (resumed, other), copied):
        train(model, own, 6)
    assert torch.equal(flat(whole.parameters()), flat(resumed.parameters()))
    assert torch.equal(flat(whole.parameters()), flat(copied[0].parameters()))
    assert statistics(copied[1]).loss == statistics(optimizer).loss


def test_records_go_away_with_the_graph():
    model = mlp()
    optimizer = make(model)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for _ in range(3):
        step(model, optimizer, LOSSES["ce"][2])
    optimizer.zero_grad()
    before = tensors()
    for _ in range(20):
        F.cross_entropy(model(X) * 2, LABELS)
    assert tensors() <= before
    for _ in range(5):
        step(model, optimizer, LOSSES["ce"][2])
    optimizer.zero_grad()
    assert tensors() <= before


def test_what_cannot_be_evaluated_is_refused():
    with pytest.raises(ValueError, match=r'loss_func must be None for lr="auto"'):
        make(mlp(), loss_func=nn.MSELoss())
    model = mlp()
    with pytest.raises(RuntimeError, match="no backward pass from the model's outputs was seen"):
        step(model, make(model), lambda m: m[0].weight.norm() + m(X).detach().sum())


@pytest.mark.parametrize("clip", [None, 1e-2], ids=["as it is", "clipped"])
def test_what_is_computed_under_no_grad_is_a_constant(clip):
    """Forward mode does not see `no_grad`; slopes that are twice as large look like clipping."""

    class Net(nn.Module):
        def __init__(self, constant):
            super().__init__()
            self.hidden, self.head, self.constant = nn.Linear(4, 5), nn.Linear(5, 3), constant

        def forward(self, x):
            h = self.hidden(x).tanh()
            return self.head(h) * self.constant(self.head, h)

    def no_grad(head, h):
        with torch.no_grad():
            return head(h).add_(0)

    models = [Net(no_grad), Net(lambda head, h: head(h).detach())]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(X), LABELS).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    torch.testing.assert_close(flat(models[0].parameters()), flat(models[1].parameters()))
