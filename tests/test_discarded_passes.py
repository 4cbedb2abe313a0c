"""Backward passes that are no part of a step, and steps that miss a layer's pass."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kfacopt import KFACOptimizer, KFACWarning

pytestmark = pytest.mark.usefixtures("float64")

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
EVERY_STEP = {"factor_update_interval": 1, "inverse_update_interval": 1}
FISHERS = ["mc", "type-2", "empirical"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def objective(model, scale=1.0):
    return F.cross_entropy(model(X * scale), LABELS)


def step(model, optimizer):
    optimizer.zero_grad()
    objective(model).backward()
    optimizer.step()


def zero_grads(model):
    for p in model.parameters():
        p.grad.zero_()


def zero_data(model):
    for p in model.parameters():
        p.grad.data.zero_()


def new_zeros(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


RESETS = {
    "None": lambda model: model.zero_grad(),
    "model": lambda model: model.zero_grad(set_to_none=False),
    "grad": zero_grads,
    "grad.data": zero_data,
    "new zeros": new_zeros,
}


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(
    "options", [{"fisher_type": f} for f in FISHERS] + [{"lr": "auto"}], ids=[*FISHERS, "auto"]
)
def test_statistics_go_with_gradients_that_others_reset(options, reset):
    """A discarded backward pass leaves neither moments nor labels, nor a term of the objective."""
    models = network(), network()
    optimizers = [KFACOptimizer(m.parameters(), **options) for m in models]
    objective(models[0], 3.0).backward()
    RESETS[reset](models[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        objective(model).backward()
        optimizer.step()
    for got, want in zip(*(o.factors("2") for o in optimizers), strict=True):
        assert torch.equal(got, want)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("between", [None, "clip"])
def test_gradients_that_are_changed_in_between_go_on_accumulating(between):
    """Clipping each micro-batch's gradient is no reset, nor is a gradient of zero in one layer."""
    models = network(), network()
    for model in models:
        nn.init.zeros_(model[4].weight)  # the gradients of all layers below are zero
    optimizers = [KFACOptimizer(m.parameters(), fisher_type="type-2") for m in models]
    for half in (slice(0, 3), slice(3, 6)):
        (F.cross_entropy(models[0](X[half]), LABELS[half]) / 2).backward()
        if between == "clip":
            nn.utils.clip_grad_norm_(models[0].parameters(), 1e-3)
    optimizers[0].step()
    step(models[1], optimizers[1])
    for name in ("0", "2", "4"):
        for got, want in zip(*(o.factors(name) for o in optimizers), strict=True):
            assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("end", ["step", "zero_grad"])
def test_a_derivative_after_the_backward_pass_leaves_the_labels_alone(end):
    models = network(), network()
    optimizers = [KFACOptimizer(m.parameters(), **EVERY_STEP) for m in models]
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        objective(model).backward()
        if i == 0:
            torch.autograd.grad(objective(model, 2.0), list(model.parameters()))
        if end == "step":
            optimizer.step()
        step(model, optimizer)
        step(model, optimizer)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


class Switched(nn.Module):
    """Calls its middle layer's module, or goes around it, or leaves it out."""

    def __init__(self):
        super().__init__()
        self.first, _, self.middle, _, self.head = network()
        self.how = "module"

    def forward(self, x):
        h = self.first(x).tanh()
        if self.how == "module":
            h = self.middle(h)
        elif self.how == "function":
            h = F.linear(h, 1.0 * self.middle.weight, self.middle.bias)
        return self.head(h.tanh())


@pytest.mark.parametrize("fisher_type", FISHERS)
def test_a_layer_that_is_no_longer_captured_is_named_once(fisher_type):
    model = Switched()
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type, **EVERY_STEP)
    step(model, optimizer)
    model.how = "function"
    with pytest.warns(KFACWarning, match="layer 'middle' has a gradient .* of earlier steps"):
        step(model, optimizer)
    assert optimizer.statistics()["middle/factor_age"] == 1
    step(model, optimizer)  # warnings are errors here


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_that_is_left_out_is_no_fault(set_to_none):
    model = Switched()
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    step(model, optimizer)
    model.how = "left out"
    optimizer.zero_grad(set_to_none)
    objective(model).backward()
    optimizer.step()
    assert optimizer.statistics()["middle/factor_age"] == 1


def head_after_checkpoint(model, x):
    return model[4](checkpoint(model[:4], x, use_reentrant=True))


CHECKPOINTED = {
    "whole": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=True),
    "body": head_after_checkpoint,
}


@pytest.mark.parametrize("how", CHECKPOINTED)
@pytest.mark.parametrize("fisher_type", FISHERS)
def test_reentrant_checkpointing_around_the_model_is_refused_by_name(fisher_type, how):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type)
    x = X.clone().requires_grad_()

    def one_step():
        F.cross_entropy(CHECKPOINTED[how](model, x), LABELS).backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"layer '[024]': .*use_reentrant=False"):
        one_step()


def test_reentrant_checkpointing_in_an_evaluation_is_not_refused():
    model = network()
    optimizer = KFACOptimizer(model.parameters())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        checkpoint(model, X, use_reentrant=True)
    step(model, optimizer)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("fisher_type", FISHERS)
def test_an_empty_batch_of_images_leaves_the_factors_alone(fisher_type, groups, kfac_approx):
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 4, 3, padding=1, groups=groups)
    model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    optimizer = KFACOptimizer(
        model.parameters(), fisher_type=fisher_type, kfac_approx=kfac_approx, **EVERY_STEP
    )
    images = torch.linspace(-1, 1, 192).reshape(6, 2, 4, 4).sin()
    F.cross_entropy(model(images), LABELS).backward()
    optimizer.step()
    before = [f.clone() for f in optimizer.factors("0")]
    optimizer.zero_grad()
    F.cross_entropy(model(images[:0]), LABELS[:0], reduction="sum").backward()
    optimizer.step()
    for factor, old in zip(optimizer.factors("0"), before, strict=True):
        assert torch.equal(factor, old)


# Passes within a pass ----------------------------------------------------------------------------


class Monitored(nn.Module):
    """Its output has a hook that differentiates the same graph by something else."""

    def __init__(self, watch):
        super().__init__()
        self.body, self.watch, self.norms = network(), watch, []

    def forward(self, x):
        x = x.clone().requires_grad_()
        z = self.body(x)
        other, out = z.sum(), z * 1.0
        if self.watch:
            out.register_hook(
                lambda _: self.norms.append(torch.autograd.grad(other, x, retain_graph=True))
            )
        return out


class InnerGraph(torch.autograd.Function):
    """A function that differentiates a graph of its own in its backward pass."""

    @staticmethod
    def forward(ctx, x, function):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = function(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.y, ctx.x, grad, retain_graph=True)[0], None


class CalledTwice(nn.Module):
    """Layers that are called once more with constant weights, within such a function or not."""

    def __init__(self, nested):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head, self.nested = nn.Linear(4, 3), nested

    def forward(self, x):
        h = self.body(x)
        if self.nested:
            return self.head(InnerGraph.apply(h, self.body))
        first, second = self.body[0], self.body[2]
        h = F.linear(h, first.weight.detach(), first.bias.detach()).tanh()
        return self.head(F.linear(h, second.weight.detach(), second.bias.detach()))


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("make", [Monitored, CalledTwice])
def test_a_pass_that_a_hook_or_function_starts_is_not_ours(make, fisher_type, preconditioner):
    found = []
    for nested in (False, True):
        torch.manual_seed(0)
        model = make(nested)
        optimizer = KFACOptimizer(
            model.parameters(), fisher_type=fisher_type, preconditioner=preconditioner
        )
        objective(model).backward()
        optimizer.step()
        found.append([optimizer.factors(name).grad_output_factor for name in ("body.0", "body.2")])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert expected.trace() > 0
        torch.testing.assert_close(actual, expected)
