"""Legitimate input that once gave wrong numbers without an error, or failed: none does now."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import (
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFACOptimizer,
    KFACWarning,
)

pytestmark = pytest.mark.usefixtures("float64")

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
TARGETS = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)
PLAIN = {"lr": 0.0, "fisher_type": "type-2", "factor_update_interval": 1, "ema_decay": 0.0}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def expected(model, loss=None, **options):
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False} | options
    loss = nn.CrossEntropyLoss() if loss is None else loss
    y = LABELS if isinstance(loss, nn.CrossEntropyLoss) else TARGETS
    params = list(model.parameters())
    return KFACLinearOperator(model, loss, params, [(X, y)], **options).factors("0")


def assert_close(got, want):
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-12)


# Passes that are not steps ------------------------------------------------------------------------


def penalty(model, optimizer):
    x = X.clone().requires_grad_()
    loss = F.cross_entropy(model(x), LABELS)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + 0.1 * gradient.pow(2).sum()).backward()


def attack(model, optimizer):
    x = X.clone()
    for _ in range(3):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), LABELS), x)
        x = (x + gradient.sign()).detach()
    F.cross_entropy(model(X), LABELS).backward()


def logged_norm(model, optimizer):
    loss = F.cross_entropy(model(X), LABELS)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()


def two_backwards(model, optimizer):
    x = X.clone().requires_grad_()
    loss = F.cross_entropy(model(x), LABELS)
    loss.backward(inputs=[x], retain_graph=True)
    loss.backward(inputs=list(model.parameters()))


def discarded(model, optimizer):
    F.cross_entropy(model(3 * X), LABELS).backward()
    model.zero_grad()
    F.cross_entropy(model(X), LABELS).backward()


def by_hand(model, optimizer):
    params = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(X), LABELS), params)
    for p, g in zip(params, grads, strict=True):
        p.grad = g


PASSES = [penalty, attack, logged_norm, two_backwards, discarded, by_hand]


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("loop", PASSES, ids=[loop.__name__ for loop in PASSES])
def test_only_passes_that_make_gradients_count(loop, fisher_type):
    model = mlp()
    optimizer = KFACOptimizer(model.parameters(), **(PLAIN | {"fisher_type": fisher_type}))
    loop(model, optimizer)
    with pytest.warns(KFACWarning, match="derivatives") if loop is penalty else nullcontext():
        optimizer.step()
    if loop is penalty and fisher_type == "empirical":
        # the gradients are those of the penalised objective, whose Fisher is not compared
        assert bool(optimizer.factors("0").grad_output_factor.isfinite().all())
        return
    assert_close(optimizer.factors("0"), expected(model, fisher_type=fisher_type))


# Objectives ---------------------------------------------------------------------------------------


def test_an_unknown_term_beside_a_known_one_counts_once():
    """G is that of cross entropy and that of the unknown term, whose H is diagonal."""
    model = mlp()
    optimizer = KFACOptimizer(model.parameters(), **PLAIN)
    for _ in range(2):
        z = model(X)
        F.smooth_l1_loss(z, TARGETS)  # looked at only
        (F.cross_entropy(z, LABELS) + F.huber_loss(z, TARGETS, delta=10.0)).backward()
        optimizer.step()
    A, G = expected(model)
    _, squares = expected(model, nn.MSELoss())  # a Huber loss is half of it within delta
    assert_close(optimizer.factors("0"), (A, G + squares / 2))


@pytest.mark.parametrize("parts", [1, 2, 10])
def test_an_empirical_fisher_does_not_depend_on_how_the_objective_is_written(parts):
    model = mlp()
    optimizer = KFACOptimizer(model.parameters(), **(PLAIN | {"fisher_type": "empirical"}))
    z = model(X)
    sum(F.cross_entropy(z, LABELS) / parts for _ in range(parts)).backward()
    optimizer.step()
    assert_close(optimizer.factors("0"), expected(model, fisher_type="empirical"))


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5)])
def test_a_stated_mean_over_micro_batches_is_one_mean(sizes):
    model = mlp()
    optimizer = KFACOptimizer(model.parameters(), **PLAIN, loss_func=nn.MSELoss())
    for x, y in zip(X.split(sizes), TARGETS.split(sizes), strict=True):
        (((model(x) - y) ** 2).mean() * len(x) / 6).backward()
    optimizer.step()
    assert_close(optimizer.factors("0"), expected(model, nn.MSELoss()))


# Layers -------------------------------------------------------------------------------------------


def test_inputs_changed_in_place_are_refused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")

        def forward(self, x):
            x = x.reshape(6, 1, 2, 2) * 1.0
            x += self.conv(x)  # autograd has saved the padded copy and does not complain
            return x.flatten(1)

    model, y = Residual(), torch.rand(6, 4)
    optimizer = KFACOptimizer(model.parameters(), **PLAIN)
    with pytest.raises(RuntimeError, match="layer 'conv': its input was changed in place"):
        F.mse_loss(model(X), y).backward()
    del optimizer
    kfac = KFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), [(X, y)])
    with pytest.raises(RuntimeError, match="layer 'conv': its input was changed in place"):
        kfac.trace()


def test_a_weight_tied_to_an_embedding_gets_the_fallback(caplog):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = nn.Embedding(3, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 3, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(torch.tanh(self.body(self.embedding(tokens))))

    model = Tied()
    with caplog.at_level("INFO", "kfacopt"):
        optimizer = KFACOptimizer(model.parameters())
    assert "fallback: embedding.weight" in caplog.text
    F.cross_entropy(model(LABELS), LABELS).backward()
    optimizer.step()
    assert "exp_avg" in optimizer.state[model.head.weight]
    data = [(LABELS, LABELS)]
    with pytest.raises(NotImplementedError, match="embedding tied to a head"):
        EKFACLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)


def test_modules_that_share_a_weight_but_not_a_bias():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], dim=1)

    model, y = Shared(), torch.rand(6, 6)
    optimizer = KFACOptimizer(model.parameters(), **PLAIN)
    F.mse_loss(model(X), y).backward()
    optimizer.step()
    A, G = optimizer.factors("a")
    ggn = GGNLinearOperator(model, nn.MSELoss(), [model.a.weight], [(X, y)])
    weight_block = torch.kron(G, A[:4, :4])
    assert torch.allclose(weight_block, ggn @ torch.eye(12), atol=1e-12)
    # b's inputs add nothing to the constant's column: half the rows have it
    assert torch.allclose(A[4, 4], torch.tensor(0.5))


def test_a_frozen_bias_is_no_part_of_the_block():
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = KFACOptimizer(model.parameters(), **PLAIN)
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    assert optimizer.factors("0").input_factor.shape == (4, 4)
    model[0].bias.requires_grad_(True)
    model[2].weight.requires_grad_(False)
    optimizer.zero_grad()
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    assert optimizer.factors("0").input_factor.shape == (5, 5)
    assert optimizer.factors("2").input_factor.shape == (1, 1)
    model[2].weight.requires_grad_(True)
    assert_close(optimizer.factors("0"), expected(model))


def test_a_hook_that_changes_a_layers_output():
    model = mlp()
    model[0].register_forward_hook(lambda m, a, out: 3 * out)
    optimizer = KFACOptimizer(model.parameters(), **PLAIN)
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    assert_close(optimizer.factors("0"), expected(model))
    params = [model[0].bias]
    data = [(X, LABELS)]
    ggn = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    assert optimizer.factors("0").grad_output_factor.trace() > 0.1 * (ggn @ torch.eye(5)).trace()


def test_a_hook_that_comes_later_and_goes_first():
    """What it puts in the place of a layer's output is not the layer's; ours look at that first."""
    model = mlp()
    optimizer = KFACOptimizer(model.parameters(), **PLAIN)
    handle = model[0].register_forward_hook(lambda m, a, out: 3 * out.flip(-1), prepend=True)
    model.register_forward_hook(lambda m, a, out: 2 * out, prepend=True)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        wanted = expected(model)
        optimizer.step()
        assert_close(optimizer.factors("0"), wanted)
    handle.remove()
    assert len(model[0]._forward_hooks) == 1  # ours


def test_ambiguous_names():
    one, two = nn.Linear(4, 4), nn.Linear(4, 3)
    optimizer = KFACOptimizer([*one.parameters(), *two.parameters()], **PLAIN)
    F.cross_entropy(two(one(X)), LABELS).backward()
    optimizer.step()
    with pytest.raises(KeyError, match="names 2 layers of different models; give a parameter"):
        optimizer.factors("weight")
    assert optimizer.factors(two.weight).grad_output_factor.shape == (3, 3)


def test_lazy_parameters():
    with pytest.raises(ValueError, match="not initialized yet"):
        KFACOptimizer(nn.LazyLinear(3).parameters())


# Optimizers, batches, precision, interruption -----------------------------------------------------


def test_two_optimizers_in_series():
    whole = mlp()
    backbone, head = whole[:2], whole[2]
    optimizers = [KFACOptimizer(m.parameters(), **PLAIN) for m in (backbone, head)]
    F.cross_entropy(head(backbone(X)), LABELS).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_close(optimizers[0].factors(whole[0].weight), expected(whole))


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_an_expert_without_data(fisher_type):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

        def forward(self, x):
            masks = [torch.ones(6, dtype=bool), torch.zeros(6, dtype=bool)]
            parts = [e(x[mask]) for e, mask in zip(self.experts, masks, strict=True)]
            return torch.cat(parts)

    model = Experts()
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type)
    F.cross_entropy(model(X), LABELS).backward()
    with pytest.warns(KFACWarning, match="layer 'experts.1' has a gradient but no curvature"):
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.MSELoss(), nn.CrossEntropyLoss()])
def test_counts_beyond_float16(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 100)).to(torch.float16)
    x = torch.rand(700, 4).half()
    y = torch.rand(700, 100).half()
    if isinstance(loss, nn.CrossEntropyLoss):
        y = torch.randint(100, (700,))
    optimizer = KFACOptimizer(model.parameters(), factor_update_interval=1, lr=0.0)
    loss(model(x), y).backward()
    optimizer.step()
    wide = nn.Sequential(nn.Linear(4, 100)).float()
    wide.load_state_dict(model.state_dict())
    kfac = KFACLinearOperator(
        wide,
        loss,
        list(wide.parameters()),
        [(x.float(), y.float() if y.is_floating_point() else y)],
        check_deterministic=False,
    )
    trace = optimizer.factors("0").grad_output_factor.trace()
    assert torch.allclose(trace, kfac.factors("0").grad_output_factor.trace(), rtol=0.1)


def test_half_precision_log_probabilities():
    model = nn.Sequential(nn.Linear(4, 1000)).to(torch.bfloat16)
    optimizer = KFACOptimizer(model.parameters())
    logp = F.log_softmax(model(X.bfloat16()), 1)
    F.nll_loss(logp, LABELS).backward()
    optimizer.step()


def test_an_interrupted_forward_pass():
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.stop = mlp(), True

        def forward(self, x):
            z = self.body(x)
            if self.stop:
                raise KeyboardInterrupt
            return z

    model = Interrupted()
    optimizer = KFACOptimizer(model.parameters(), **PLAIN)
    with pytest.raises(KeyboardInterrupt):
        model(3 * X)
    model.stop = False
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    assert_close(optimizer.factors("body.0"), expected(model.body))
