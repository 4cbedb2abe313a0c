"""What was found out about a derivative holds where it was seen, and nowhere else."""

import dense_curvature as dense
import pytest
import torch
from test_custom_functions import Intermediate, Once, Swish
from torch import nn
from torch.nn import functional as F

import kfacopt

DTYPE = torch.float64
ROUND_OFF = 1e-11  # of sums of about a hundred terms of order 1
LOSS = nn.CrossEntropyLoss()
ONCE = pytest.mark.filterwarnings("ignore:model_func. .* once only:UserWarning")
COLUMNS = 9  # forward mode
MATRICES = {
    kfacopt.JacobianLinearOperator: lambda net, data: dense.jacobian(net, params_of(net), data),
    kfacopt.GGNLinearOperator: lambda net, data: dense.ggn(net, LOSS, params_of(net), data),
}
BY_LOSS = {kfacopt.GGNLinearOperator: dense.ggn, kfacopt.HessianLinearOperator: dense.hessian}


def params_of(net):
    return list(net.parameters())


def make(operator, net, data, **options):
    losses = () if operator is kfacopt.JacobianLinearOperator else (LOSS,)
    return operator(net, *losses, params_of(net), data, **options)


class Act(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def net_of(function):
    return nn.Sequential(nn.Linear(3, 4, bias=False), Act(function), nn.Linear(4, 2))


class Gated(nn.Module):
    """A branch that a parameter, a buffer or an attribute opens."""

    def __init__(self, function, gate):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.function, self.gate = function, gate

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.out(h + self.gate * self.function(self.b(h)))


class Constant(nn.Module):
    """A product with a constant that is made without gradients."""

    def __init__(self, function, gate):
        super().__init__()
        self.b, self.function, self.gate = nn.Linear(3, 2), function, gate

    def forward(self, x):
        with torch.set_grad_enabled(self.function is None):
            factor = self.b(x)
        factor = factor.detach()
        return self.b(x) + self.gate * self.b(x) * factor


def gate_of(kind, value):
    value = torch.tensor(value, dtype=DTYPE)
    return {"parameter": nn.Parameter(value), "buffer": nn.Buffer(value), "number": float(value)}[
        kind
    ]


def open_gate(net):
    if isinstance(net.gate, float):
        net.gate = 1.0
    else:
        net.gate.data.fill_(1.0)  # without a version


SOURCES = {
    "list": lambda data: (data, {}),
    "nothing kept": lambda data: (data, {"cache_bytes": 0}),
    "iterable": lambda data: (Batches(data), {}),
}


class Batches:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([(X.clone(), y.clone()) for X, y in self.data])


def assert_is(A, expected):
    V = torch.randn(A.shape[1], COLUMNS, dtype=DTYPE)
    for columns in (1, COLUMNS):
        v = V[:, :columns]
        torch.testing.assert_close(A @ v, expected @ v, rtol=ROUND_OFF, atol=ROUND_OFF)


@ONCE
@pytest.mark.parametrize("function", [Once, Intermediate], ids=lambda f: f.__name__)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("operator", MATRICES, ids=lambda c: c.__name__)
def test_a_batch_of_zeros_says_nothing_of_others(operator, source, function):
    net, same = net_of(function.apply).to(DTYPE), net_of(F.silu).to(DTYPE)
    same.load_state_dict(net.state_dict())
    y = torch.randint(2, (5,))
    zeros, X = torch.zeros(5, 3, dtype=DTYPE), torch.randn(5, 3, dtype=DTYPE)
    data = [(zeros, y), (X, y)]
    batches, options = SOURCES[source](data)
    assert_is(make(operator, net, batches, **options), MATRICES[operator](same, data))


@ONCE
@pytest.mark.parametrize("kind", ["parameter", "buffer", "number"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("first", [0.0, 1e-12])
@pytest.mark.parametrize("make_net", [Gated, Constant], ids=lambda c: c.__name__)
def test_gates_that_open_later(make_net, first, source, kind):
    function, other = (Intermediate.apply, F.silu) if make_net is Gated else (True, None)
    net = make_net(function, gate_of(kind, first)).to(DTYPE)
    same = make_net(other, gate_of(kind, first)).to(DTYPE)
    same.load_state_dict(net.state_dict())
    data = [(torch.randn(5, 3, dtype=DTYPE), torch.randint(2, (5,)))]
    batches, options = SOURCES[source](data)
    for operator, matrix in MATRICES.items():
        A = make(operator, net, batches, **options)
        assert_is(A, matrix(same, data))
        before = net.gate if isinstance(net.gate, float) else net.gate.detach().clone()
        open_gate(net)
        open_gate(same)
        for _ in range(2):
            assert_is(A, matrix(same, data))
        for gated in (net, same):
            if isinstance(gated.gate, float):
                gated.gate = before
            else:
                gated.gate.data.copy_(before)


@pytest.mark.parametrize("first", [0.0, 1e-12])
def test_gates_that_open_later_before_functions_without_second_derivatives(first):
    net = Gated(Intermediate.apply, gate_of("parameter", first)).to(DTYPE)
    data = [(torch.randn(5, 3, dtype=DTYPE), torch.randint(2, (5,)))]
    H = make(kfacopt.HessianLinearOperator, net, data, cache_bytes=0)
    v = torch.ones(H.shape[1], dtype=DTYPE)
    if first == 0:
        assert (H @ v).isfinite().all()
    open_gate(net)
    with pytest.raises(RuntimeError, match="Intermediate is not differentiable"):
        H @ v


@ONCE
@pytest.mark.parametrize("scale", [1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_branches_do_not_hide(dtype, scale):
    net, same = Gated(Once.apply, scale).to(dtype), Gated(F.silu, scale).to(DTYPE)
    same.load_state_dict(net.state_dict())
    X = torch.randn(6, 3, dtype=dtype)
    expected = dense.jacobian(same, params_of(same), [(X.to(DTYPE), None)])
    J = kfacopt.JacobianLinearOperator(net, params_of(net), [(X, None)])
    branch = torch.zeros(J.shape[1], dtype=dtype)
    start = sum(p.numel() for p in net.a.parameters())
    branch[start : start + net.b.weight.numel()] = 1
    digits = 1e2 * torch.finfo(dtype).eps  # some products of some ten terms
    assert ((J @ branch).to(DTYPE) - expected @ branch.to(DTYPE)).norm() <= digits * (
        expected @ branch.to(DTYPE)
    ).norm()


def test_small_branches_without_second_derivatives_do_not_hide():
    net = Gated(Intermediate.apply, 1e-6).to(DTYPE)
    data = [(torch.randn(6, 3, dtype=DTYPE), torch.randint(2, (6,)))]
    H = make(kfacopt.HessianLinearOperator, net, data)
    with pytest.raises(RuntimeError, match="Intermediate is not differentiable"):
        H @ torch.ones(H.shape[1], dtype=DTYPE)


@ONCE
@pytest.mark.parametrize("kind", ["custom", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, kind):
    """Wrong by chance in none of some models: one vector let one of six pass."""
    for seed in range(12):
        torch.manual_seed(seed)
        function, other = (Once.apply, F.silu) if kind == "custom" else (True, None)
        if kind == "custom":
            net, same = net_of(function).to(dtype), net_of(other).to(DTYPE)
        else:
            net, same = Constant(function, 1.0).to(dtype), Constant(other, 1.0).to(DTYPE)
        same.load_state_dict(net.state_dict())
        X = torch.randn(5, 3).to(dtype)
        expected = dense.jacobian(same, params_of(same), [(X.to(DTYPE), None)])
        J = kfacopt.JacobianLinearOperator(net, params_of(net), [(X, None)])
        found = (J @ torch.eye(J.shape[1], dtype=dtype)).to(DTYPE)
        # rounded after each of a few operations; wrong ones miss by 0.2 to 1
        bound = 8 * torch.finfo(dtype).eps
        assert (found - expected).norm() <= bound * expected.norm(), seed


def test_right_functions_in_half_precision_are_no_alarm():
    for dtype in (torch.bfloat16, torch.float16):
        layers = [m for _ in range(6) for m in (nn.Linear(16, 16), Act(Swish.apply), nn.ReLU())]
        net = nn.Sequential(*layers, nn.Linear(16, 3)).to(dtype)
        X = torch.randn(20, 16).to(dtype)
        J = kfacopt.JacobianLinearOperator(net, params_of(net), [(X, None)])
        for columns in (1, COLUMNS):  # would warn
            assert (J @ torch.ones(J.shape[1], columns, dtype=dtype)).isfinite().all()


class Quartic(torch.autograd.Function):
    """A loss for each entry, with a wrong second derivative."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(z, y)
        return (z - y) ** 4

    @staticmethod
    def backward(ctx, g):
        z, y = ctx.saved_tensors
        return (g * 4 * (z - y) ** 3).detach(), None


class RightQuartic(Quartic):
    @staticmethod
    def backward(ctx, g):
        z, y = ctx.saved_tensors
        return g * 4 * (z - y) ** 3, None


COUNTED = {
    "all": range(8),
    "not the last": range(7),
    "none of the ends": range(1, 7),
    "one": [5],
    "two others": [2, 6],
}


def masked(function, counted):
    mask = torch.zeros(8, 1, dtype=DTYPE)
    mask[list(counted)] = 1
    return lambda z, y: (function(z, y) * mask).mean()


def mixed(function, counted):
    """Others have a loss of torch."""
    mask = torch.zeros(8, 1, dtype=torch.bool)
    mask[list(counted)] = True
    return lambda z, y: torch.where(mask, function(z, y), (z - y).square()).mean()


def quartic(z, y):
    return (z - y) ** 4


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("form", [masked, mixed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("operator", BY_LOSS, ids=lambda c: c.__name__)
def test_losses_of_some_data(operator, form, counted):
    net = nn.Linear(3, 2).to(DTYPE)
    data = [(torch.randn(8, 3, dtype=DTYPE), torch.randn(8, 2, dtype=DTYPE))]
    wrong = operator(net, form(Quartic.apply, COUNTED[counted]), params_of(net), data)
    with pytest.raises(RuntimeError, match=r"loss_func: .* Quartic is not diff"):
        wrong @ torch.ones(8, dtype=DTYPE)
    right = operator(net, form(RightQuartic.apply, COUNTED[counted]), params_of(net), data)
    expected = BY_LOSS[operator](net, form(quartic, COUNTED[counted]), params_of(net), data)
    assert_is(right, expected)


def test_a_loss_that_counts_nothing_at_first():
    net = nn.Linear(3, 2).to(DTYPE)
    data = [(torch.randn(8, 3, dtype=DTYPE), torch.randn(8, 2, dtype=DTYPE))]
    weight = torch.zeros((), dtype=DTYPE)
    loss = lambda z, y: (Quartic.apply(z, y) * weight + (z - y).square()).mean()  # noqa: E731
    G = kfacopt.GGNLinearOperator(net, loss, params_of(net), data)
    v = torch.ones(8, dtype=DTYPE)
    torch.testing.assert_close(
        G @ v, dense.ggn(net, lambda z, y: (z - y).square().mean(), params_of(net), data) @ v
    )
    weight.fill_(1)
    with pytest.raises(RuntimeError, match=r"loss_func: .* Quartic is not diff"):
        G @ v


ROWS = {"last": [-1], "first": [0], "ends and middle": [0, 4, -1], "all but one": range(1, 8)}


@pytest.mark.parametrize("function", [Once, Intermediate], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", ROWS)
def test_data_of_zeros_confirm_no_hessian(rows, function):
    net = net_of(function.apply).to(DTYPE)
    X, y = torch.randn(8, 3, dtype=DTYPE), torch.randint(2, (8,))
    X[list(ROWS[rows])] = 0
    H = make(kfacopt.HessianLinearOperator, net, [(X, y)])
    with pytest.raises(RuntimeError, match=f"model_func.* {function.__name__} is not diff"):
        H @ torch.ones(H.shape[1], dtype=DTYPE)
    net, same = net_of(Swish.apply).to(DTYPE), net_of(F.silu).to(DTYPE)
    same.load_state_dict(net.state_dict())
    H = make(kfacopt.HessianLinearOperator, net, [(X, y)])
    assert_is(H, dense.hessian(same, LOSS, params_of(same), [(X, y)]))


class SquaredHinge(torch.autograd.Function):
    """Twice differentiable, but for a kink of its gradient."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(z, y)
        return (z - y).relu() ** 2

    @staticmethod
    def backward(ctx, g):
        z, y = ctx.saved_tensors
        return g * 2 * (z - y).relu(), None


def test_data_at_a_kink_are_no_alarm():
    net = nn.Linear(3, 2, bias=False).to(DTYPE)
    X, Y = torch.randn(8, 3, dtype=DTYPE), torch.randn(8, 2, dtype=DTYPE)
    X[[0, 4, 7]], Y[[0, 4, 7]] = 0, 0  # exactly there
    params = params_of(net)
    A = kfacopt.GGNLinearOperator(
        net, lambda z, y: SquaredHinge.apply(z, y).mean(), params, [(X, Y)]
    )
    expected = dense.ggn(net, lambda z, y: ((z - y).relu() ** 2).mean(), params, [(X, Y)])
    assert_is(A, expected)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), Act(Swish.apply)).to(DTYPE)
    nn.init.zeros_(net[0].bias)  # data of zeros are at the kink of the first layer
    data = [(X, torch.randint(4, (8,)))]
    H = make(kfacopt.HessianLinearOperator, net, data)
    same = nn.Sequential(*net[:3], nn.SiLU())
    assert_is(H, dense.hessian(same, LOSS, params_of(same), data))


@pytest.mark.parametrize("operator", MATRICES, ids=lambda c: c.__name__)
def test_what_was_seen_is_not_asked_again(operator):
    data = [(torch.randn(n, 3, dtype=DTYPE), torch.randint(2, (n,))) for n in (4, 5)]
    counted, passes = [], []

    class Counting(Swish):
        @staticmethod
        def backward(ctx, g):
            counted.append(1)
            return Swish.backward(ctx, g)

    A = make(operator, net_of(Counting.apply).to(DTYPE), Batches(data))
    for _ in range(3):
        A @ torch.ones(A.shape[1], dtype=DTYPE)
        passes.append(len(counted))
    first, second, third = passes[0], passes[1] - passes[0], passes[2] - passes[1]
    assert second == third < first
