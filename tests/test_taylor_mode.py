"""`input_derivatives`: its values against torch.func, and what K-FAC sees of them."""

import math
import warnings

import dense_curvature as dense
import pytest
import torch
from torch import nn
from torch.func import hessian, jacrev, vmap
from torch.nn import functional as F

import kfacopt
from kfacopt import KFACOptimizer, KFACWarning, input_derivatives
from kfacopt.elementwise_derivatives import ELEMENTWISE

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # by torch.func.hessian
]

TOLERANCE = 1e-11  # of float64 sums of products with entries of about 1, over two or three layers
TRAJECTORY = 1e-7  # the same after ten steps, each of which solves systems of condition up to 1e4
WEIGHTS = torch.tensor([[1.0, 0.0], [0.5, -2.0], [0.0, 1.0]], dtype=torch.float64)
SECOND = {
    "laplacian": ("laplacian", torch.ones(1, 2, dtype=torch.float64)),
    "one sum": (WEIGHTS[1], WEIGHTS[1:2]),
    "sums": (WEIGHTS, WEIGHTS),
    "none": (None, WEIGHTS[:0]),
}


def oracle(model, x, weights):
    """Return u, ∂u and the weighted sums of ∂²u `[N, m, R]` by torch.func, point by point."""

    def f(point):
        return model(point[None])[0]

    second = vmap(hessian(f))(x).diagonal(dim1=-2, dim2=-1)
    return model(x), vmap(jacrev(f))(x), second @ weights.T


def assert_right(model, x, second="laplacian"):
    argument, weights = SECOND[second]
    found = input_derivatives(model, x, argument)
    u, gradient, sums = oracle(model, x, weights)
    want = {"none": None, "sums": sums}.get(second, sums[..., 0] if len(weights) else None)
    for a, b in zip(found, (u, gradient, want), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
            probe = torch.randn_like(a)
            for p, q in zip(*(by_parameters(z * probe, model) for z in (a, b)), strict=True):
                torch.testing.assert_close(p, q, rtol=TOLERANCE, atol=10 * TOLERANCE)


def by_parameters(terms, model):
    """Return the gradients of a sum, zeros where it does not depend on parameters."""
    own = list(model.parameters())
    total = terms.sum() + sum(0 * p.sum() for p in own)
    return torch.autograd.grad(total, own, retain_graph=True) if own else ()


ACTIVATIONS = {
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu, tanh": nn.GELU("tanh"),
    "softplus": nn.Softplus(),
    "softplus, linear above": nn.Softplus(2.0, 0.5),
    "elu": nn.ELU(0.7),
    "mish": nn.Mish(),
    "relu": nn.ReLU(),
    "leaky relu": nn.LeakyReLU(0.2),
    "identity": nn.Identity(),
    "flatten": nn.Flatten(),
    "dropout, evaluated": nn.Dropout(0.5).eval(),
    "nested": nn.Sequential(nn.Tanh(), nn.Sequential(nn.Identity(), nn.Sigmoid())),
}


def mlp(activation=None, outputs=2):
    act = activation or nn.Tanh()
    return nn.Sequential(nn.Linear(2, 5), act, nn.Linear(5, 4), act, nn.Linear(4, outputs))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_stock_modules(name):
    assert_right(mlp(ACTIVATIONS[name]), 2 * torch.randn(6, 2))


@pytest.mark.parametrize("second", SECOND)
def test_all_second_derivatives_that_are_asked_for(second):
    assert_right(mlp(), torch.randn(6, 2), second)


class Written(nn.Module):
    """A network of its own forward pass, as `write` says."""

    def __init__(self, write):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 3)
        self.scale, self.B = nn.Parameter(torch.randn(3)), torch.randn(2, 3)
        self.write = write

    def forward(self, x):
        return self.write(self, x)


WRITTEN = {
    "residual": lambda n, x: (h := n.first(x).tanh()) + n.last(h).tanh(),
    "gates": lambda n, x: (1 - n.first(x).sigmoid()) * n.last(n.first(x)) - n.scale,
    "learned scale": lambda n, x: n.last((n.scale * n.first(x)).tanh() / n.scale.exp()),
    "Fourier features": lambda n, x: n.last(torch.sin(x @ n.B)) + torch.cos(torch.mm(x, n.B)),
    "concatenation": lambda n, x: torch.cat([n.first(x), x, torch.ones(len(x), 1), x[:, 1:]], -1),
    "hard constraint": lambda n, x: x[:, :1] * (1 - x[..., :1]) * n.first(x).tanh(),
    "each coordinate": lambda n, x: n.first(torch.cat([x[:, [1]], x[:, 0:1].exp()], dim=1)),
    "quotients": lambda n, x: n.first(x) / (3 + x[:, :1] ** 2) + 1 / (2 + n.first(x).square()),
    "roots": lambda n, x: (1 + n.first(x) ** 2).sqrt() + (2 + n.last(n.first(x)).sin()) ** 1.5,
    "constants of a point": lambda n, x: torch.ones(6, 3) - n.first(x) * torch.ones(6, 1) * 2,
    "numbers": lambda n, x: 1 + -n.first(x) * 2 - 3,
    "input by name": lambda n, x: torch.tanh(input=n.last(input=n.first(x))),
    "no layer": lambda n, x: x.sin() * torch.arange(2, dtype=x.dtype, device=x.device),
    "what it stands for": lambda n, x: n.first(x) * x.shape[1] * x.ndim * (len(x) > 0),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("second", ["laplacian", "sums"])
def test_written_networks(name, second):
    assert_right(Written(WRITTEN[name]), torch.randn(6, 2), second)


def test_dropout_drops_a_feature_with_its_derivatives():
    x = torch.randn(400, 2)
    u, gradient, _ = input_derivatives(nn.Dropout(0.25), x)
    kept = u != 0
    torch.testing.assert_close(u, kept * x / 0.75, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(gradient, kept.unsqueeze(-1) * torch.eye(2) / 0.75)
    assert 500 < kept.sum() < 700  # of 800, each with probability 3/4


def test_no_points_and_one_input():
    u, gradient, laplacian = input_derivatives(mlp(), torch.zeros(0, 2))
    assert (u.shape, gradient.shape, laplacian.shape) == ((0, 2), (0, 2, 2), (0, 2))
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(4, 1)
    want = oracle(model, x, torch.ones(1, 1))[2][..., 0]
    torch.testing.assert_close(input_derivatives(model, x).second, want, atol=TOLERANCE, rtol=0)


# Refusals -----------------------------------------------------------------------------------------


class ThroughFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()


def without_gradients(n, x):
    with torch.no_grad():
        return n.first(x)


def in_place(n, x):
    x += 1
    return x


REFUSED = {
    "layer_norm in LayerNorm": lambda n, x: nn.LayerNorm(2)(x),
    "BatchNorm1d": lambda n, x: nn.BatchNorm1d(2)(x),
    r"register_elementwise_derivatives\(torch.nn.functional.hardtanh": lambda n, x: F.hardtanh(x),
    r"register_elementwise_derivatives\(torch.erfc": lambda n, x: torch.erfc(x),
    "relu in place in ReLU": lambda n, x: nn.ReLU(inplace=True)(x),
    "mul in place": lambda n, x: x.mul_(2),
    "iadd in place": in_place,
    "no_grad": without_gradients,
    "custom autograd.Function": lambda n, x: ThroughFunction.apply(x),
    "detach": lambda n, x: x.detach(),
    "getitem with these arguments": lambda n, x: x[:, 0],
    "getitem with": lambda n, x: x[:3, :1],
    "cat with": lambda n, x: torch.cat([x, x]),
    "matmul with": lambda n, x: x @ x,
    "add with": lambda n, x: x + torch.ones(1, 6, 2),
    "power of 1": lambda n, x: x**1,
    "flatten with": lambda n, x: x.flatten(),
    "sum in Written": lambda n, x: x.sum(1, keepdim=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_rule_is_named(message):
    with pytest.raises(NotImplementedError, match=message):
        input_derivatives(Written(REFUSED[message]), torch.randn(6, 2))


@pytest.mark.parametrize("write", [lambda n, x: (x, x), lambda n, x: n.scale, lambda n, x: x.dtype])
def test_the_output_is_one_tensor_that_depends_on_the_points(write):
    with pytest.raises(TypeError, match="model must return one tensor that depends on x"):
        input_derivatives(Written(write), torch.randn(6, 2))


@pytest.mark.parametrize(
    ("x", "second", "message"),
    [
        (torch.zeros(2), "laplacian", r"x must be points \[N, d\]"),
        (torch.zeros(3, 2, dtype=torch.long), "laplacian", r"x must be points \[N, d\]"),
        (torch.zeros(3, 2), "hessian", "got 'hessian'"),
        (torch.zeros(3, 2), torch.ones(3), r"\[2\] or \[R, 2\]; got \(3,\)"),
    ],
)
def test_arguments_are_checked(x, second, message):
    with pytest.raises(ValueError, match=message):
        input_derivatives(mlp(), x, second)


def test_a_rule_can_be_registered(monkeypatch):
    monkeypatch.setattr("kfacopt.elementwise_derivatives.ELEMENTWISE", dict(ELEMENTWISE))
    monkeypatch.setattr(
        "kfacopt.taylor_mode.ELEMENTWISE", kfacopt.elementwise_derivatives.ELEMENTWISE
    )

    def erf(z):
        slope = 2 / math.pi**0.5 * (-z * z).exp()
        return torch.erf(z), slope, -2 * z * slope

    kfacopt.register_elementwise_derivatives(torch.erf, erf)
    assert_right(Written(lambda n, x: n.last(n.first(x).erf()).erf()), torch.randn(6, 2))


# What K-FAC sees ----------------------------------------------------------------------------------


class All(nn.Module):
    """u, ∂u and second derivatives side by side, `[N, m (1 + d + R)]`."""

    def __init__(self, net, derive):
        super().__init__()
        self.net, self.derive = net, derive

    def forward(self, x):
        return torch.cat([part.flatten(1) for part in self.derive(self.net, x)], 1)


def by_helper(net, x):
    return input_derivatives(net, x, WEIGHTS)


def by_func(net, x):
    return oracle(net, x, WEIGHTS)


def case(activation):
    net = nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 2))
    data = [(torch.randn(n, 2), torch.randn(n, 12)) for n in (3, 4)]
    return net, data


def blocks(matrix, net):
    sizes = [layer.weight.numel() + layer.bias.numel() for layer in (net[0], net[2])]
    ends = [sizes[0], sum(sizes)]
    return [matrix[a:b, a:b] for a, b in zip((0, ends[0]), ends, strict=True)]


def matrix(operator):
    return operator @ torch.eye(operator.shape[1])


@pytest.mark.parametrize("operator", [kfacopt.KFACLinearOperator, kfacopt.EKFACLinearOperator])
def test_kfac_is_exact_for_linear_networks_and_only_for_them(operator):
    """Also in the columns of biases, whose input is 1 at values and 0 at derivatives."""
    for activation, exact in ((nn.Identity(), True), (nn.Tanh(), False)):
        net, data = case(activation)
        options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
        model = All(net, by_helper)
        found = matrix(operator(model, nn.MSELoss(), list(net.parameters()), data, **options))
        want = dense.ggn(All(net, by_func), nn.MSELoss(), list(net.parameters()), data)
        for i, (a, b) in enumerate(zip(blocks(found, net), blocks(want, net), strict=True)):
            # The last layer's g is the same at all points, whatever comes before.
            close = torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
            assert close == (exact or i == 1)


def test_a_bias_on_its_own_has_its_exact_block():
    net, data = case(nn.Tanh())
    bias = [net[0].bias]
    model, loss = All(net, by_helper), nn.MSELoss()
    for operator in (kfacopt.KFACLinearOperator, kfacopt.EKFACLinearOperator):
        found = matrix(operator(model, loss, bias, data, fisher_type="type-2"))
        want = dense.ggn(All(net, by_func), loss, bias, data)
        torch.testing.assert_close(found, want, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_bias_beside_its_weight_is_refused():
    net, data = case(nn.Tanh())
    model, own = All(net, by_helper), list(net.parameters())
    K = kfacopt.KFACLinearOperator(model, nn.MSELoss(), own, data, fisher_type="type-2")
    with pytest.raises(NotImplementedError, match=r"'net.0'.*separate_weight_and_bias=False"):
        K.trace()


def test_reduce_averages_the_constant():
    net, data = case(nn.Identity())
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False, "kfac_approx": "reduce"}
    own = list(net.parameters())
    K = kfacopt.KFACLinearOperator(All(net, by_helper), nn.MSELoss(), own, data, **options)
    a = torch.cat([X for X, _ in data])
    mean = torch.cat([a + 1, torch.ones(7, 1)], 1) / 6  # x, two unit vectors, three zeros; 1, 0, …
    torch.testing.assert_close(
        K.factors("net.0").input_factor, mean.T @ mean / 7, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_exact_operators():
    net, data = case(nn.Tanh())
    model, loss, own = All(net, by_helper), nn.MSELoss(), list(net.parameters())
    for operator, expected in (
        (kfacopt.HessianLinearOperator, dense.hessian),
        (kfacopt.GGNLinearOperator, dense.ggn),
        (kfacopt.EFLinearOperator, dense.empirical_fisher),
    ):
        own_operator = operator(model, loss, own, data)
        want = expected(All(net, by_func), loss, own, data)
        for _ in range(3):  # the first measures, later ones keep graphs
            found = matrix(own_operator)
            torch.testing.assert_close(found, want, rtol=TOLERANCE, atol=TOLERANCE)


# The optimizer ------------------------------------------------------------------------------------


class HandWritten(nn.Module):
    """The network of `net()` with value, gradient and Laplacian written out by hand.

    The bias is the last column of the weight, whose input is 1 for the value and 0 for derivatives.
    """

    def __init__(self, net):
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in net[::2]:
            own = nn.Linear(layer.in_features + 1, layer.out_features, bias=False)
            own.weight.data = torch.cat([layer.weight.data, layer.bias.data[:, None]], 1)
            self.layers.append(own)

    def forward(self, x):
        unit = torch.eye(2).expand(len(x), 2, 2)
        z = torch.cat([x.unsqueeze(1), unit, torch.zeros(len(x), 1, 2)], 1)
        one = torch.tensor([1.0, 0, 0, 0]).reshape(1, 4, 1).expand(len(x), 4, 1)
        for i, layer in enumerate(self.layers):
            if i:
                h = z[:, :1].tanh()
                s, first = 1 - h**2, z[:, 1:3]
                last = s * z[:, 3:] - 2 * h * s * first.square().sum(1, keepdim=True)
                z = torch.cat([h, s * first, last], 1)
            z = layer(torch.cat([z, one], -1))
        return z[:, 0], z[:, 1:3].mT, z[:, 3]


POINTS, SOURCE = torch.rand(30, 2, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
OPTIONS = {
    "defaults": {},
    "type-2": {"fisher_type": "type-2"},
    "empirical": {"fisher_type": "empirical"},
    "ekfac": {"preconditioner": "ekfac", "fisher_type": "type-2"},
    "reduce": {"kfac_approx": "reduce", "fisher_type": "type-2"},
    "diagonal": {"max_factor_dim": 3, "fisher_type": "type-2"},
    "subsampled": {"factor_batch_fraction": 0.5},
    "auto": {"lr": "auto"},
}


def losses_of_training(derive, parameters, options, made_before=True):
    if not made_before:
        derive(POINTS)
    optimizer = KFACOptimizer(parameters, factor_update_interval=1, **options)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        u, gradient, laplacian = derive(POINTS)
        equation = F.mse_loss(laplacian + u * gradient[..., 0], SOURCE)
        loss = equation + 3 * F.mse_loss(u[:5], SOURCE[:5])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), optimizer


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("made_before", [True, False])
def test_training_is_that_of_a_network_with_derivatives_by_hand(name, made_before):
    torch.manual_seed(0)
    net = mlp(outputs=1)
    by_hand = HandWritten(net)
    want, other = losses_of_training(by_hand, by_hand.parameters(), OPTIONS[name])

    def derive(x):
        return input_derivatives(net, x)

    found, optimizer = losses_of_training(derive, net.parameters(), OPTIONS[name], made_before)
    torch.testing.assert_close(found, want, rtol=TRAJECTORY, atol=0)
    assert found.diff().abs().min() > 0  # every step moves
    for ours, theirs in zip((0, 2, 4), (0, 1, 2), strict=True):
        pairs = zip(optimizer.factors(str(ours)), other.factors(f"layers.{theirs}"), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=TRAJECTORY, atol=TRAJECTORY)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # by torch.compile, of its own doing
def test_inside_a_model():
    """Also in a module whose forward pass takes the derivatives, and in a compiled one."""
    reference = None
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        torch.manual_seed(0)
        net = mlp(outputs=1)
        model = All(net, input_derivatives)
        optimizer = KFACOptimizer(net.parameters(), factor_update_interval=2)
        called, found = wrap(model), []
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.mse_loss(called(POINTS)[:, 3:], SOURCE)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        reference = reference or found
        assert found == pytest.approx(reference, rel=TRAJECTORY)


def test_a_compiled_model_runs_eagerly():
    model, x = mlp(), torch.randn(6, 2)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for a, b in zip(input_derivatives(compiled, x), input_derivatives(model, x), strict=True):
        assert torch.equal(a, b)


def test_other_derivatives_are_named_once_with_this_way_out():
    net = mlp(outputs=1)
    optimizer = KFACOptimizer(net.parameters())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            x = POINTS.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            F.mse_loss(gradient, torch.ones(30, 2)).backward()
            optimizer.step()
    (message,) = [str(w.message) for w in seen if issubclass(w.category, KFACWarning)]
    assert "layers '0', '2', '4'" in message
    assert "kfacopt.input_derivatives(model, x)" in message
