"""Any loss in odd loops: nothing is silently wrong, nothing is kept, nothing is left behind."""

import copy
import gc
import logging
import warnings

import pytest
import torch
from dense_losses import dense_factors
from test_any_loss import (
    LABELS,
    LOSSES,
    TARGETS,
    WITHOUT,
    TwoHeads,
    X,
    assert_factors,
    compared,
    layers_of,
    make,
    mlp,
    policy_gradient,
    positive_part,
    row_huber,
    row_l1,
)
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer, KFACWarning

pytestmark = pytest.mark.usefixtures("float64")

BOTH = LOSSES | WITHOUT


# Functions that hide what they do -----------------------------------------------------------------


class Opaque(torch.autograd.Function):
    """½ Σ z² / N of several tensors, with one derivative."""

    @staticmethod
    def forward(ctx, *zs):
        ctx.save_for_backward(*zs)
        return sum(0.5 * z.pow(2).sum() for z in zs) / len(zs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return tuple(upstream * z / len(ctx.saved_tensors[0]) for z in ctx.saved_tensors)


def visible(*zs):
    return sum(0.5 * z.pow(2).sum() for z in zs) / len(zs[0])


OPAQUE = {
    "last": lambda *zs: Opaque.apply(*zs),
    "not last": lambda *zs: 1 * Opaque.apply(*(1 * z for z in zs)),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_custom_functions_of_one_output(name, caplog):
    with caplog.at_level(logging.INFO, "kfacopt"):
        model = mlp()
        twin, optimizer = copy.deepcopy(model), make(model)
        OPAQUE[name](model(X)).backward()
        optimizer.step()
        assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), visible, None)
    assert "empirical at (N, 3) (" in caplog.text


@pytest.mark.parametrize("name", OPAQUE)
def test_custom_functions_of_several_outputs(name):
    model, twin = TwoHeads(), TwoHeads()
    optimizer = make(model)
    OPAQUE[name](*model(X)).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: twin(X), layers_of(twin), visible, None)


@pytest.mark.parametrize("name", OPAQUE)
def test_custom_functions_of_several_forward_passes(name):
    model, twin = mlp(), mlp()
    optimizer = make(model)
    OPAQUE[name](model(X), model(X.flip(0).cos())).backward()
    optimizer.step()
    run = lambda: (twin(X), twin(X.flip(0).cos()))  # noqa: E731
    assert_factors(optimizer, run, layers_of(twin), visible, None)


@pytest.mark.parametrize("name", OPAQUE)
def test_custom_functions_in_micro_batches(name):
    model, twin = mlp(), mlp()
    optimizer = make(model)
    for x in X.split((2, 4)):
        OPAQUE[name](model(x)).backward(torch.tensor(len(x) / 6))
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), visible, None)


def test_a_scaled_custom_function():
    model, twin = mlp(), mlp()
    optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=2.0**9)
    scaler.scale(Opaque.apply(model(X))).backward()
    scaler.step(optimizer)
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), visible, None)


# Known losses -------------------------------------------------------------------------------------


def test_a_known_loss_beside_others_keeps_its_labels():
    """Beside a penalty and a term whose gradient stands in, the draws are those without them."""
    factors = []
    for extra in (False, True):
        model = mlp()
        optimizer = make(model, fisher_type="mc")
        z = model(X)
        loss = F.cross_entropy(z, LABELS)
        if extra:
            loss = loss + 0.1 * sum(p.pow(2).sum() for p in model.parameters())
            loss = loss + 0.3 * F.l1_loss(z, TARGETS)
        loss.backward()
        optimizer.step()
        factors.append(optimizer.factors("2").grad_output_factor)
    twin = mlp()
    _, stand_in = dense_factors(lambda: (twin(X),), twin[2], BOTH["L1"], None)
    torch.testing.assert_close(factors[1] - factors[0], 0.09 * stand_in, atol=1e-15, rtol=0)


NONLINEAR = {
    "root": (lambda z: F.mse_loss(z, TARGETS).sqrt(), lambda z: F.mse_loss(z, TARGETS)),
    "square": (
        lambda z: 3 * F.cross_entropy(z, LABELS) ** 2,
        lambda z: F.cross_entropy(z, LABELS),
    ),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_functions_of_known_losses(name):
    """A known loss counts with the derivative of the objective by it; no more is promised."""
    function, known = NONLINEAR[name]
    model, twin = mlp(), mlp()
    optimizer = make(model)
    function(model(X)).backward()
    optimizer.step()
    value = float(known(twin(X)).detach())
    scale = 0.5 / value**0.5 if name == "root" else 6 * value
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), known, scale=scale)


def test_hand_written_twins_have_the_factors_of_known_losses():
    twins = {
        "mean square": (lambda z: F.mse_loss(z, TARGETS), LOSSES["mean square"]),
        "cross entropy": (lambda z: F.cross_entropy(z, LABELS), LOSSES["gathered log-softmax"]),
    }
    for known, by_hand in twins.values():
        factors = []
        for loss in (known, by_hand):
            model = mlp()
            optimizer = make(model)
            loss(model(X)).backward()
            optimizer.step()
            factors.append(optimizer.factors("0"))
        for one, other in zip(*factors, strict=True):
            torch.testing.assert_close(one, other, atol=1e-15, rtol=1e-13)


def test_the_empirical_fisher_of_a_known_and_an_unknown_loss_on_two_models():
    """Each on its own forward pass: the one's gradients tell nothing of the other's."""
    one, other = nn.ModuleDict({"a": mlp()}), nn.ModuleDict({"b": mlp()})
    twins = copy.deepcopy((one, other))
    optimizer = make(one, other, fisher_type="empirical")
    (F.cross_entropy(one["a"](X), LABELS) + row_l1(other["b"](X))).backward()
    optimizer.step()
    for name, twin, loss in (
        ("a", twins[0]["a"], lambda z: F.cross_entropy(z, LABELS)),
        ("b", twins[1]["b"], row_l1),
    ):
        layers = {f"{name}.{n}": layer for n, layer in layers_of(twin).items()}
        assert_factors(optimizer, lambda twin=twin: (twin(X),), layers, loss, None)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_full_backward_hooks_on_the_model():
    model = mlp()
    seen = []
    model.register_full_backward_hook(lambda module, before, after: seen.append(1))
    twin, optimizer = mlp(), make(model)
    LOSSES["Huber"](model(X)).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), LOSSES["Huber"])
    optimizer.zero_grad()
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    known = lambda z: F.cross_entropy(z, LABELS)  # noqa: E731
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), known)


# Outputs ------------------------------------------------------------------------------------------


def test_outputs_changed_in_place():
    model, twin = mlp(), mlp()
    optimizer = make(model)
    z = model(X)
    F.huber_loss(z.mul_(2).tanh_(), TARGETS, delta=5.0).backward()
    optimizer.step()
    loss = lambda z: F.huber_loss((2 * z).tanh(), TARGETS, delta=5.0)  # noqa: E731
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), loss)


def test_a_part_that_is_detached():
    def loss(z):
        return F.huber_loss(z * z.detach().exp(), TARGETS, delta=5.0)

    model, twin = mlp(), mlp()
    optimizer = make(model)
    loss(model(X)).backward()
    optimizer.step()
    held = twin(X).detach().exp()
    fixed = lambda z: F.huber_loss(z * held, TARGETS, delta=5.0)  # noqa: E731
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), fixed)


def test_one_output_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            z = self.net(x)
            return {"a": z, "b": z}

    model = Twice()
    twin, optimizer = copy.deepcopy(model.net), make(model)
    out = model(X)
    (F.huber_loss(out["a"], TARGETS) + (out["b"] - TARGETS).cosh().log().mean()).backward()
    optimizer.step()
    both = lambda a, b: F.huber_loss(a, TARGETS) + (b - TARGETS).cosh().log().mean()  # noqa: E731
    layers = {f"net.{n}": layer for n, layer in layers_of(twin).items()}
    assert_factors(optimizer, lambda: (twin(X),) * 2, layers, both)


def test_outputs_that_a_module_without_parameters_of_ours_takes():
    model, head = mlp(), nn.Linear(3, 3)
    twin, optimizer = copy.deepcopy(model), make(model)
    other = torch.optim.SGD(head.parameters(), 0.1)
    F.huber_loss(head(model(X)), TARGETS, delta=5.0).backward()
    loss = lambda z: F.huber_loss(head(z), TARGETS, delta=5.0)  # noqa: E731
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), loss)
    assert other is not None


def test_two_optimizers_on_two_parts_of_a_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    optimizers = make(model[:2], model=model), make(model[2:], model=model)
    LOSSES["Huber"](model(X)).backward()
    for optimizer in optimizers:
        optimizer.step()
    own = layers_of(twin)
    run = lambda: (twin(X),)  # noqa: E731
    assert_factors(optimizers[0], run, {"0": own["0"]}, LOSSES["Huber"])
    assert_factors(optimizers[1], run, {"2": own["2"], "4": own["4"]}, LOSSES["Huber"])


def test_a_module_that_is_called_many_times():
    """Twelve calls of an outermost module, each on the output of the one before."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(7, 3)

        def forward(self, x, h):
            return self.layer(torch.cat([x, h], 1)).tanh()

    def unrolled(cell, steps=12):
        h, states = torch.zeros(6, 3), []
        for t in range(steps):
            h = cell(X * (1 + t / 10), h)
            states.append(h)
        return tuple(states)

    def loss(*states):
        return sum((h - TARGETS).cosh().log().mean() for h in states)

    cell, twin = Cell(), Cell()
    optimizer = make(cell)
    loss(*unrolled(cell)).backward()
    optimizer.step()
    uses = unrolled(twin)
    # Uses of one datum's twelve steps are positions: G is Σ over uses, each with all later states.
    assert len(uses) == 12
    assert_factors(optimizer, lambda: unrolled(twin), layers_of(twin), loss)


def test_complex_outputs():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(4)

        def forward(self, x):
            return torch.view_as_complex(self.net(x).reshape(-1, 2, 2))

    def loss(w):
        return (w.abs() ** 2).cosh().log().mean()

    model = Spectrum()
    twin, optimizer = copy.deepcopy(model.net), make(model)
    loss(model(X)).backward()
    optimizer.step()
    layers = {f"net.{n}": layer for n, layer in layers_of(twin).items()}
    real = lambda z: loss(torch.view_as_complex(z.reshape(-1, 2, 2)))  # noqa: E731
    assert_factors(optimizer, lambda: (twin(X),), layers, real)


def test_batches_of_one_and_of_none():
    model, twin = mlp(), mlp()
    optimizer = make(model)
    loss = lambda z: F.huber_loss(z, TARGETS[: len(z)], delta=5.0)  # noqa: E731
    loss(model(X[:1])).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X[:1]),), layers_of(twin), loss)
    optimizer.zero_grad()
    (model(X[:0]) ** 2).sum().backward()
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X[:1]),), layers_of(twin), loss)


# Passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("name", ["Huber", "Dice", "L1", "cosine", "CTC"])
def test_gradients_are_untouched(name, fisher_type):
    gradients = []
    for ours in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(mlp(), nn.Dropout(0.3))
        if ours:
            optimizer = make(model, fisher_type=fisher_type)
        BOTH[name](model(X)).backward()
        gradients.append([p.grad for p in model.parameters()] + [torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    del optimizer


def test_derivatives_by_inputs_do_not_count():
    model = mlp()
    twin, optimizer = copy.deepcopy(model), make(model)
    x = X.clone().requires_grad_()
    loss = row_huber(model(x))
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(inputs=[x], retain_graph=True)
    loss.backward()
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), row_huber)


def test_a_gradient_penalty_leaves_the_rest_and_is_named(caplog):
    with caplog.at_level(logging.INFO, "kfacopt"):
        model = mlp(1)
        twin, optimizer = copy.deepcopy(model), make(model)
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        fit = lambda z: F.huber_loss(z, TARGETS[:, :1], delta=5.0)  # noqa: E731
        (fit(model(X)) + ((slope.norm(dim=1) - 1) ** 2).mean()).backward()
        with pytest.warns(KFACWarning, match=r"derivatives of the model.*input_derivatives"):
            optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), fit)
    assert "of derivatives of the model: not counted" in caplog.text


KEYWORDS = {
    "grad": lambda loss, params: torch.autograd.grad(inputs=params, outputs=loss),
    "backward": lambda loss, params: torch.autograd.backward(inputs=params, tensors=loss),
    "a tensor's": lambda loss, params: loss.backward(None, None, False, params),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_in_any_order(name):
    model, twin = mlp(), mlp()
    optimizer, params = make(model), list(model.parameters())
    found = KEYWORDS[name](row_huber(model(X)), params)
    for p, g in zip(params, found or (), strict=bool(found)):
        p.grad = g
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), row_huber)


class Once(torch.autograd.Function):
    """½ z² whose backward pass fails in its own way where a second derivative is wanted."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return 0.5 * z**2

    @staticmethod
    def backward(ctx, upstream):
        if upstream.requires_grad or torch.is_grad_enabled():
            raise KeyError("no second derivative is known")
        return upstream * ctx.saved_tensors[0]


def test_functions_that_fail_when_they_are_differentiated_twice(caplog):
    with caplog.at_level(logging.INFO, "kfacopt"):
        model, twin = mlp(), mlp()
        optimizer = make(model)
        z = model(X)
        (Once.apply(z).mean() + 0 * z.sum()).backward()
        optimizer.step()
    squares = lambda z: 0.5 * (z**2).mean()  # noqa: E731
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), squares, None)
    assert "(no second derivative: 'no second derivative is known')" in caplog.text


def test_a_norm_of_a_row_that_is_zero(caplog):
    """Its gradient is finite, its second derivative is not."""
    mask = torch.ones(6, 1)
    mask[2] = 0

    def loss(z):
        return (z * mask).norm(dim=1).mean()

    with caplog.at_level(logging.INFO, "kfacopt"):
        compared(loss, None)
    assert "its second derivative is not finite" in caplog.text


def test_create_graph_of_the_users_own():
    model, twin = mlp(), mlp()
    optimizer = make(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        row_huber(model(X)).backward(create_graph=True)
    optimizer.step()
    for p in model.parameters():
        p.grad = None
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), row_huber)


def test_exceptions_of_the_users_hooks_leave_no_trace():
    model, twin = mlp(), mlp()
    optimizer = make(model)

    def broken(gradient):
        raise KeyError("the user's own")

    z = model(X)
    handle = z.register_hook(broken)
    with pytest.raises(KeyError, match="the user's own"):
        row_huber(z).backward()
    handle.remove()
    del z
    optimizer.zero_grad()
    row_huber(model(X)).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), row_huber)


def test_values_that_are_not_finite_leave_no_trace():
    model, twin = mlp(), mlp()
    optimizer = make(model)
    row_huber(model(X)).backward()
    optimizer.step()
    optimizer.zero_grad()
    z = model(X)
    (row_huber(z) * torch.where(torch.arange(6) == 2, torch.nan, 1.0)).mean().backward()
    with pytest.warns(KFACWarning, match="the step is skipped"):
        optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), row_huber)


# Maximising ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [row_huber, LOSSES["learned variance"], row_l1])
def test_what_is_maximised_has_the_curvature_of_its_opposite(loss):
    model, twin = mlp(), mlp()
    optimizer = make(model, maximize=True)
    (-loss(model(X))).backward()
    optimizer.step()
    curvature = None if loss is row_l1 else positive_part
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), loss, curvature)


def test_a_game_in_one_optimizer():
    """min over one layer, max over the other: each has the positive part for its own direction."""
    model, twin = mlp(), mlp()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "maximize": True},
    ]
    optimizer = KFACOptimizer(
        groups, lr=0.0, fisher_type="type-2", factor_update_interval=1, ema_decay=0.0
    )
    loss = LOSSES["learned variance"]
    loss(model(X)).backward()
    optimizer.step()
    run = lambda: (twin(X),)  # noqa: E731
    assert_factors(optimizer, run, {"0": twin[0]}, loss)
    assert_factors(optimizer, run, {"2": twin[2]}, lambda z: -loss(z))


# What is kept -------------------------------------------------------------------------------------


class InnerLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        z = self.net(x)
        return {"loss": F.cross_entropy(z, LABELS) + row_huber(z), "logits": z}


KEPT = {
    "exact": lambda model: row_huber(model(X)["logits"]),
    "empirical": lambda model: row_l1(model(X)["logits"]),
    "inner": lambda model: model(X)["loss"],
    "opaque": lambda model: Opaque.apply(model(X)["logits"]),
    "both": lambda model: model(X)["loss"] + Opaque.apply(model(X)["logits"]),
    "policy": lambda model: policy_gradient(model(X)["logits"]),
}


def living_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
@pytest.mark.parametrize("name", KEPT)
def test_nothing_is_kept(name, fisher_type):
    model = InnerLoss()
    optimizer = make(model, fisher_type=fisher_type)
    gc.collect()
    gc.disable()
    counts = []
    try:
        for kind in ("step", "discarded", "never differentiated"):
            counts.append([])
            for _ in range(4):
                loss = KEPT[name](model)
                if kind != "never differentiated":
                    loss.backward()
                if kind == "step":
                    optimizer.step()
                del loss
                optimizer.zero_grad()
                counts[-1].append(living_tensors())
    finally:
        gc.enable()
    for own in counts:
        assert own[1] == own[-1]


@pytest.mark.parametrize("name", ["Huber", "L1"])
def test_ekfac_and_a_part_of_the_batch(name):
    """Second moments in the basis of a first step: their sum is the trace of A times that of G."""
    model, twin = mlp(), mlp()
    optimizer = make(model, preconditioner="ekfac", inverse_update_interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        BOTH[name](model(X)).backward()
        optimizer.step()
    curvature = None if name == "L1" else positive_part
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), BOTH[name], curvature)
