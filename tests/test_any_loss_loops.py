"""Any loss in loops as people write them: scalers, closures, compilers, wrappers, inner losses."""

import copy
import logging
import warnings

import pytest
import torch
from dense_losses import absolute_value, dense_factors
from test_any_loss import (
    LABELS,
    LOSSES,
    TARGETS,
    WITHOUT,
    X,
    assert_factors,
    layers_of,
    make,
    mlp,
    positive_part,
)
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

KINDS = {"exact": "Huber", "mixed rows": "Dice", "empirical": "L1"}
BOTH = LOSSES | WITHOUT


def compared(model, optimizer, kind, atol=None):
    twin, loss = copy.deepcopy(model), BOTH[KINDS[kind]]
    curvature = None if kind == "empirical" else positive_part
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), loss, curvature)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scale_has_no_part_in_the_factors(kind):
    model = mlp()
    optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(BOTH[KINDS[kind]](model(X))).backward()
    scaler.step(optimizer)
    scaler.update()
    compared(model, optimizer, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_closures(kind):
    model = mlp()
    optimizer = make(model)

    def closure():
        optimizer.zero_grad()
        loss = BOTH[KINDS[kind]](model(X))
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    compared(model, optimizer, kind)


# Compiled code ------------------------------------------------------------------------------------


def whole_step(model, loss):
    return torch.compile(lambda x: loss(model(x)), backend="eager")(X)


COMPILED = {
    "model": lambda model, loss: loss(torch.compile(model, backend="eager")(X)),
    "loss": lambda model, loss: torch.compile(loss, backend="eager")(model(X)),
    "both": whole_step,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_and_losses(name, kind):
    model = mlp()
    optimizer = make(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs uncompiled on steps.*")
        for _ in range(2):
            optimizer.zero_grad()
            COMPILED[name](model, BOTH[KINDS[kind]]).backward()
            optimizer.step()
    compared(model, optimizer, kind)


# Precision ----------------------------------------------------------------------------------------


BFLOAT16 = {
    "exact": lambda z: F.huber_loss(z, TARGETS.to(z), delta=1.5),
    "rows": lambda z: -z.log_softmax(1).gather(1, LABELS[:, None]).mean(),
    "mixed rows": BOTH["Dice"],
    "empirical": lambda z: F.l1_loss(z, TARGETS.to(z)),
}


@pytest.mark.parametrize("kind", BFLOAT16)
def test_autocast(kind):
    """In bfloat16 the factors are those of float64 but for some of its round-offs, 2⁻⁸."""
    model, twin = mlp().float(), mlp()
    optimizer, loss = make(model), BFLOAT16[kind]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model(X.float()))
    value.backward()
    optimizer.step()
    curvature = None if kind == "empirical" else positive_part
    for name, layer in layers_of(twin).items():
        _, G = dense_factors(lambda: (twin(X),), layer, loss, curvature)
        got = optimizer.factors(name).grad_output_factor.double()
        assert float((got - G).norm() / G.norm()) < 8 * 2.0**-8, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_in_float64_on_a_model_in_float32(kind):
    """Its products are compared to float32's round-off, as z has that: 64 eps^(3/4)."""
    model, twin = mlp().float(), mlp()
    optimizer, loss = make(model), BOTH[KINDS[kind]]
    loss(model(X.float()).double()).backward()
    optimizer.step()
    curvature = None if kind == "empirical" else positive_part
    for name, layer in layers_of(twin).items():
        _, G = dense_factors(lambda: (twin(X),), layer, loss, curvature)
        got = optimizer.factors(name).grad_output_factor.double()
        assert float((got - G).norm() / G.norm()) < 64 * torch.finfo(torch.float32).eps ** 0.75


# Losses inside the model --------------------------------------------------------------------------


class Inner(nn.Module):
    """Computes its own loss, and returns it in a way of its own."""

    def __init__(self, loss, give=lambda loss, z: loss):
        super().__init__()
        self.net, self.loss, self.give = mlp(), loss, [give]

    def forward(self, x):
        z = self.net(x)
        return self.give[0](self.loss(z), z)


class AsModule(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = [loss]

    def forward(self, z):
        return self.loss[0](z)


GIVEN = {
    "alone": (lambda loss, z: loss, lambda out: out),
    "in a dict": (lambda loss, z: {"loss": loss, "logits": z}, lambda out: out["loss"]),
    "as a vector": (lambda loss, z: loss[None], lambda out: out.mean()),
}


@pytest.mark.parametrize("wrap", [lambda loss: loss, AsModule], ids=["function", "module"])
@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_inside_the_model(kind, name, wrap):
    give, take = GIVEN[name]
    model = Inner(wrap(BOTH[KINDS[kind]]), give)
    twin, optimizer = copy.deepcopy(model.net), make(model)
    take(model(X)).backward()
    optimizer.step()
    layers = {f"net.{n}": layer for n, layer in layers_of(twin).items()}
    curvature = None if kind == "empirical" else positive_part
    assert_factors(optimizer, lambda: (twin(X),), layers, BOTH[KINDS[kind]], curvature)


@pytest.mark.parametrize("bias", [True, False])
def test_a_likelihood_is_found_inside_the_model(bias, caplog):
    """A cross entropy by hand of forty classes, with a sign for each datum: no blocks, labels."""
    head = nn.Linear(5, 40, bias=bias)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), head)
    weights = torch.tensor([1.0, -2, 0.5, 0.3, -0.7, 1.1])
    loss = lambda z: -(z.log_softmax(1)[torch.arange(6), LABELS] * weights).mean()  # noqa: E731
    model = Inner(loss)
    model.net = net
    twin, optimizer = copy.deepcopy(net), make(model)
    with caplog.at_level(logging.INFO, "kfacopt"):
        model(X).backward()
    optimizer.step()
    assert "categorical at (N, 40)" in caplog.text
    layers = {"net.0": twin[0], "net.2": twin[2]} if bias else {"net.0": twin[0]}
    assert_factors(optimizer, lambda: (twin(X),), layers, loss, absolute_value)


@pytest.mark.parametrize("wrap", [lambda loss: loss, AsModule], ids=["function", "module"])
def test_a_known_loss_beside_an_unknown_one_inside_the_model(wrap):
    def both(z):
        return F.cross_entropy(z, LABELS) + 0.5 * F.huber_loss(z, TARGETS, delta=1.5)

    model = Inner(wrap(both))
    twin, optimizer = copy.deepcopy(model.net), make(model)
    model(X).backward()
    optimizer.step()
    layers = {f"net.{n}": layer for n, layer in layers_of(twin).items()}
    assert_factors(optimizer, lambda: (twin(X),), layers, both)


def test_an_inner_loss_of_features_on_the_way():
    """A term on what the first layer returns, and one on a sum of both layers' outputs."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x, outputs_alone=False):
            h = self.first(x)
            s = self.second(h.tanh())
            return (h, s) if outputs_alone else loss(h, s)

    def loss(h, s):
        return F.huber_loss(h + s, TARGETS, delta=1.5) + 0.1 * h.cosh().log().mean()

    model, twin = Residual(), Residual()
    optimizer = make(model)
    model(X).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: twin(X, True), layers_of(twin), loss)


def test_an_inner_loss_of_a_checkpointed_model():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            z = checkpoint(self.net, x, use_reentrant=False)
            return LOSSES["Huber"](z)

    model = Checkpointed()
    twin, optimizer = copy.deepcopy(model.net), make(model)
    model(X).backward()
    optimizer.step()
    layers = {f"net.{n}": layer for n, layer in layers_of(twin).items()}
    assert_factors(optimizer, lambda: (twin(X),), layers, LOSSES["Huber"])


# Training -----------------------------------------------------------------------------------------


STEPS, SHARE = 40, 0.4  # of what AdamW takes off in five times as many steps


def taken_off(make_optimizer, loss, steps):
    model, values = mlp().float(), []
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(X.float()).double())
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values[0] - values[-1]


# Without PPO, whose old policy would have to stay behind.
@pytest.mark.parametrize("name", [n for n in BOTH if n != "PPO"])
def test_the_defaults_train_any_loss(name):
    # What has no minimum falls faster and faster: it is compared after as many steps, with all.
    steps, share = (STEPS, 1.0) if name == "linear" else (5 * STEPS, SHARE)
    adam = taken_off(lambda p: torch.optim.AdamW(p, 1e-2), BOTH[name], steps)
    assert taken_off(KFACOptimizer, BOTH[name], STEPS) > share * adam > 0


def test_a_policy_gradient_trains():
    """A bandit with six contexts: the expected reward rises to that of the best arm."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    contexts, rewards = torch.eye(6, dtype=torch.float32), F.one_hot(LABELS, 3).float()
    optimizer = KFACOptimizer(model.parameters())
    draws = torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        logits = model(contexts)
        actions = torch.multinomial(logits.softmax(1).detach(), 16, True, generator=draws)
        gained = rewards.gather(1, actions)
        log_probs = Categorical(logits=logits[:, None]).log_prob(actions)
        (-(log_probs * (gained - gained.mean(1, True))).mean()).backward()
        optimizer.step()
    expected = (model(contexts).softmax(1) * rewards).sum(1).mean()
    assert float(expected.detach()) > 0.9
