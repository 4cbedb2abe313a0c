"""Uses of a weight that are no products: it is named and trained by the fallback."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACLinearOperator, KFACOptimizer, KFACWarning

pytestmark = pytest.mark.usefixtures("float64")

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
OPTIONS = {
    "mc": {},
    "type-2": {"fisher_type": "type-2"},
    "empirical": {"fisher_type": "empirical"},
    "ekfac": {"preconditioner": "ekfac"},
    "stated loss": {"loss_func": nn.CrossEntropyLoss()},
    "auto": {"lr": "auto"},
}


class Network(nn.Module):
    """A layer whose weight is used as `use` says, and a head."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.use = nn.Linear(4, 4), nn.Linear(4, 3), use

    def forward(self, x):
        return self.head(self.use(self.layer, x))


def scaled(layer, x):
    return F.linear(layer(x).tanh(), 2 * layer.weight)


def in_a_sum(layer, x):
    return F.linear(layer(x).tanh(), layer.weight + torch.eye(4))


def turned(layer, x):
    return layer(x).tanh() @ layer.weight


def every_second_input(layer, x):
    return F.linear(layer(x).tanh()[:, :2], layer.weight[:, ::2])


def every_second_output(layer, x):
    return layer(x) + F.linear(x, layer.weight[::2]).sum(1, keepdim=True)


def chosen_outputs(layer, x):
    return layer(x) + F.linear(x, layer.weight[torch.tensor([3, 1])]).sum(1, keepdim=True)


def its_own_square(layer, x):
    return layer(x) + (layer.weight @ layer.weight).sum()


def an_input(layer, x):
    return layer(x) + layer(layer.weight).sum(0)


def first_past_the_module(layer, x):
    return layer(F.linear(x, 2 * layer.weight).tanh())


def the_bias(layer, x):
    return layer(x).tanh() + layer.bias


def in_a_checkpoint(layer, x):
    return checkpoint(lambda h: layer(h).tanh() @ layer.weight, x, use_reentrant=False)


def gradient_by_the_input(layer, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)[0] + layer(x)


BOTH_WAYS = [scaled, in_a_sum, turned, every_second_input, every_second_output, chosen_outputs]
BOTH_WAYS += [its_own_square, an_input, first_past_the_module, the_bias, in_a_checkpoint]
BOTH_WAYS += [gradient_by_the_input]


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()


def assert_by_the_fallback(optimizer, layer):
    for p in layer.parameters():
        assert "exp_avg" in optimizer.state[p]
    with pytest.raises(KeyError):
        optimizer.factors("layer")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_weight_that_is_used_both_ways(options):
    model = Network(scaled)
    optimizer = KFACOptimizer(model.parameters(), **options)
    with pytest.warns(KFACWarning, match=r"'layer': .*a sum.*AdamW fallback") as caught:
        train(model, optimizer)
    assert len(caught) == 1
    assert_by_the_fallback(optimizer, model.layer)
    assert optimizer.factors("head").input_factor.trace() > 0


@pytest.mark.parametrize("use", BOTH_WAYS, ids=[use.__name__ for use in BOTH_WAYS])
def test_other_uses_are_seen_through_whatever_lies_between(use):
    model = Network(use)
    optimizer = KFACOptimizer(model.parameters())
    with pytest.warns(KFACWarning, match="'layer': the loss depends on its parameters in other"):
        train(model, optimizer)
    assert_by_the_fallback(optimizer, model.layer)


@pytest.mark.parametrize("use", [scaled, lambda layer, x: layer(layer(x).tanh())])
def test_autocast_weights_are_seen_through_their_cast(use):
    model = Network(use).float()
    optimizer = KFACOptimizer(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(X.float()), LABELS)
    loss.backward()
    expected = pytest.warns(KFACWarning, match="'layer': ") if use is scaled else nullcontext()
    with expected:
        optimizer.step()
    assert ("exp_avg" in optimizer.state[model.layer.weight]) == (use is scaled)


def scaled_alone(layer, x):
    return F.linear(x, 2 * layer.weight, layer.bias)


def checkpointed_alone(layer, x):
    return checkpoint(lambda h: F.linear(h, 2 * layer.weight), x, use_reentrant=False) + layer.bias


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("use", [scaled_alone, checkpointed_alone])
def test_a_weight_whose_module_is_never_called(use, options):
    model = Network(use)
    optimizer = KFACOptimizer(model.parameters(), **options)
    with pytest.warns(KFACWarning, match="'layer': the loss depends on its parameters in other"):
        train(model, optimizer)
    assert_by_the_fallback(optimizer, model.layer)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_model_whose_only_layer_is_never_called(options):
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return F.linear(x, 2 * self.layer.weight, self.layer.bias)

    model = Only()
    optimizer = KFACOptimizer(model.parameters(), **options)
    with pytest.warns(KFACWarning, match="'layer': the loss depends on its parameters in other"):
        train(model, optimizer)
    assert_by_the_fallback(optimizer, model.layer)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.twin, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.twin.weight, self.twin.bias = self.layer.weight, self.layer.bias

    def forward(self, x):
        return self.head(self.twin(self.layer(x).relu_()))


def called_twice(layer, x):
    return layer(layer(x).relu_()[None])[0]


def with_a_dead_term(layer, x):
    """As people keep DDP from complaining of unused parameters."""
    return layer(x) + 0 * layer.weight.sum()


ALLOWED = {
    "called twice": lambda: Network(called_twice),
    "tied": Tied,
    "a dead term": lambda: Network(with_a_dead_term),
    "a checkpoint": lambda: Network(lambda m, x: checkpoint(m, x, use_reentrant=False)),
    "a product in a checkpoint": lambda: Network(
        lambda m, x: checkpoint(lambda h: m(m(h) + h @ m.weight.T), x, use_reentrant=False)
    ),
    "on the left": lambda: Network(lambda m, x: (m.weight @ x.T).T + m(x).sin()),
    "parts of the inputs": lambda: Network(
        lambda m, x: x[:, :1] @ m.weight[:, :1].T + F.linear(m(x)[:, 2:], m.weight[:, 2:])
    ),
    "a frozen use": lambda: Network(lambda m, x: F.linear(m(x), m.weight.detach())),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_uses_that_factors_count_are_no_fault(name):
    model = ALLOWED[name]()
    options = {"fisher_type": "type-2", "factor_update_interval": 1, "ema_decay": 0.0, "lr": 0.0}
    optimizer = KFACOptimizer(model.parameters(), **options)
    penalty = sum(p.square().sum() for p in model.parameters())
    (F.cross_entropy(model(X), LABELS) + 1e-2 * penalty).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    kfac = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(X, LABELS)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    for one, two in zip(optimizer.factors("layer"), kfac.factors("layer"), strict=True):
        assert torch.allclose(one, two, rtol=1e-10)


def test_a_layer_that_is_used_otherwise_later_keeps_its_curvature_and_is_named():
    model = Network(lambda layer, x: layer(x).tanh())
    optimizer = KFACOptimizer(model.parameters(), factor_update_interval=2)
    train(model, optimizer, 2)
    before = [f.clone() for f in optimizer.factors("layer")]
    model.use = scaled
    with pytest.warns(KFACWarning, match="'layer' has a gradient but its curvature was not"):
        train(model, optimizer, 2)
    for one, two in zip(optimizer.factors("layer"), before, strict=True):
        assert torch.equal(one, two)
    model.use = lambda layer, x: layer(x).tanh()
    train(model, optimizer, 1)
    assert not torch.equal(optimizer.factors("layer").grad_output_factor, before[1])


class Checkpointed(nn.Module):
    """Has products alone, in a checkpoint or not."""

    def __init__(self, **checkpointing):
        super().__init__()
        torch.manual_seed(0)
        self.W, self.V = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 3))
        self.b = nn.Parameter(torch.randn(4))
        self.checkpointing = checkpointing

    def block(self, x):
        return torch.addmm(self.b, x, self.W).tanh() @ self.V

    def forward(self, x):
        if self.checkpointing:
            return checkpoint(self.block, x.requires_grad_(), **self.checkpointing)
        return self.block(x)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "auto"])
def test_products_in_a_checkpoint_are_those_without_it(name):
    nets = [Checkpointed(use_reentrant=False), Checkpointed()]
    for net in nets:
        optimizer = KFACOptimizer(net.parameters(), factor_update_interval=2, **OPTIONS[name])
        train(net, optimizer, 5)
        assert optimizer.describe().preconditioned_share == 1.0
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_products_that_reentrant_checkpointing_hides_are_named():
    net = Checkpointed(use_reentrant=True)
    optimizer = KFACOptimizer(net.parameters())
    with pytest.warns(
        KFACWarning, match="'W', 'V' are not to be seen.*use_reentrant=False"
    ) as said:
        train(net, optimizer)
    assert len(said) == 1
    assert optimizer.describe().preconditioned_share == 0.0


# Models without a layer that K-FAC knows ----------------------------------------------------------


class WithoutLayers(nn.Module):
    """Returns its loss: a tied head, and a matrix that is scaled before it is multiplied."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.matrix = nn.Embedding(3, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, labels, reduction="mean"):
        h = torch.addmm(torch.zeros(4), self.embedding(labels), 2 * self.matrix).tanh()
        logits = h @ self.embedding.weight.T
        return {"loss": F.cross_entropy(logits, labels, reduction=reduction), "logits": logits}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "stated loss"])
def test_a_model_without_layers_is_trained_by_adamw(name):
    options = OPTIONS[name]
    model, reference = WithoutLayers(), WithoutLayers()
    optimizer = KFACOptimizer(model.parameters(), fallback_lr=0.01, **options)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.0)
    named = pytest.warns(KFACWarning, match="none of the parameters is in a layer that K-FAC knows")
    for trained, own in ((model, optimizer), (reference, adamw)):
        for i in range(12):
            own.zero_grad()
            loss = trained(LABELS)["loss"]
            loss.backward()
            with named if own is optimizer and i == 0 else nullcontext():
                own.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:.*none of the parameters is in a layer")
def test_losses_without_curvature_are_no_concern_of_a_model_without_layers():
    model = WithoutLayers()
    optimizer = KFACOptimizer(model.parameters(), fisher_type="empirical")
    model(LABELS, reduction="none")["loss"].sum().backward()  # refused where it is looked at
    optimizer.step()
    other = KFACOptimizer([*model.parameters(), *nn.Linear(4, 3).parameters()])
    F.l1_loss(model(LABELS)["logits"], torch.zeros(6, 3)).backward()
    other.step()
