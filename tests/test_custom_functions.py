"""Custom autograd functions: derivatives that do not exist are computed another way, or refused."""

import warnings

import dense_curvature as dense
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import kfacopt
from kfacopt.experimental import ActivationHessianLinearOperator

DTYPE = torch.float64
ROUND_OFF = 1e-12  # of sums of at most a hundred terms of order 1
COLUMNS = 17  # two chunks of columns, the first of which takes forward mode
FIRST_ORDER = (
    kfacopt.GGNLinearOperator,
    kfacopt.EFLinearOperator,
    kfacopt.FisherMCLinearOperator,
    kfacopt.JacobianLinearOperator,
)


def slope(x):
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


class Swish(torch.autograd.Function):
    """Twice differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * slope(x)


class Once(Swish):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Swish.backward(ctx, g)


class NumPy(Swish):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * slope(x.detach()).numpy())


class Intermediate(Swish):
    """Its backward pass is linear in g, but takes the slope for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(slope(x))
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (factor,) = ctx.saved_tensors
        return g * factor


class WithContext(torch.autograd.Function):
    """Twice differentiable, and for `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * slope(x)


class WrongJvp(WithContext):
    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent * slope(ctx.saved_tensors[0])


class DetachedWithContext(WithContext):
    @staticmethod
    def backward(ctx, g):
        return WithContext.backward(ctx, g).detach()


class Clipping(Swish):
    @staticmethod
    def backward(ctx, g):
        return Swish.backward(ctx, g.clamp(-1e-3, 1e-3))


TWICE = (Swish, WithContext, WrongJvp)
NOT_TWICE = (Once, NumPy, Intermediate, DetachedWithContext)


class Activation(nn.Module):
    """A custom function, for batches of more than `least` data."""

    def __init__(self, function, least=0):
        super().__init__()
        self.function, self.least = function, least

    def forward(self, x):
        return self.function.apply(x) if len(x) > self.least else nn.functional.silu(x)


class Loader:
    """Batches that are new tensors in every pass."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([(X.clone(), y.clone()) for X, y in self.data])


SOURCES = {
    "list": lambda data: (data, {}),
    "loader": lambda data: (Loader(data), {}),
    "nothing kept": lambda data: (data, {"cache_bytes": 0}),
}


def problem(function, least=0, dtype=DTYPE):
    model = nn.Sequential(nn.Linear(3, 4), Activation(function, least), nn.Linear(4, 2)).to(dtype)
    same = nn.Sequential(model[0], nn.SiLU(), model[2])
    data = [(torch.randn(n, 3, dtype=dtype), torch.randint(2, (n,))) for n in (4, 5)]
    return model, same, data


def make(operator, model, data, **options):
    loss = () if operator is kfacopt.JacobianLinearOperator else (nn.CrossEntropyLoss(),)
    return operator(model, *loss, list(model.parameters()), data, **options)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


@pytest.mark.filterwarnings("ignore:model_func. .* once only:UserWarning")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("function", TWICE + NOT_TWICE, ids=lambda f: f.__name__)
def test_first_order_matrices_are_right(function, source):
    model, same, data = problem(function, least=4)  # in one of two batches
    batches, options = SOURCES[source](data)
    params = list(model.parameters())
    V = torch.randn(26, COLUMNS, dtype=DTYPE)
    for operator in FIRST_ORDER:
        A = make(operator, model, batches, **options)
        if operator is kfacopt.GGNLinearOperator:
            expected = dense.ggn(same, nn.CrossEntropyLoss(), params, data) @ V
        elif operator is kfacopt.JacobianLinearOperator:
            expected = dense.jacobian(same, params, data) @ V
        else:
            expected = make(operator, same, data) @ V
        for columns in (1, COLUMNS, 1, COLUMNS):  # by double backward, in forward mode, by rows
            assert_close(A @ V[:, :columns], expected[:, :columns])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("function", TWICE + NOT_TWICE, ids=lambda f: f.__name__)
def test_the_hessian_is_right_or_refused(function, source):
    model, same, data = problem(function, least=4)
    batches, options = SOURCES[source](data)
    V = torch.randn(26, COLUMNS, dtype=DTYPE)
    H = make(kfacopt.HessianLinearOperator, model, batches, **options)
    if function in NOT_TWICE:
        for columns in (1, COLUMNS, 1):
            with pytest.raises(RuntimeError, match=f"model_func.* {function.__name__} is not diff"):
                H @ V[:, :columns]
        return
    params = list(model.parameters())
    expected = dense.hessian(same, nn.CrossEntropyLoss(), params, data) @ V
    for columns in (1, COLUMNS, 1, COLUMNS):
        assert_close(H @ V[:, :columns], expected[:, :columns])


@pytest.mark.parametrize("function", TWICE + NOT_TWICE, ids=lambda f: f.__name__)
def test_the_hessian_by_a_feature_is_right_or_refused(function):
    model, same, data = problem(function)
    eye = torch.eye(20, dtype=DTYPE)

    def hessian(net, layer):
        args = net, nn.CrossEntropyLoss(), (layer, "output", 0), data[1:]
        return ActivationHessianLinearOperator(*args) @ eye

    assert_close(hessian(model, "1"), hessian(same, "1"))  # behind the function
    if function in NOT_TWICE:
        with pytest.raises(RuntimeError, match=f"{function.__name__} is not differentiable"):
            hessian(model, "0")
    else:
        assert_close(hessian(model, "0"), hessian(same, "0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [Swish, Intermediate], ids=lambda f: f.__name__)
def test_kinks_and_round_off_do_not_count_for_wrong_derivatives(function, dtype):
    layers = [nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), Activation(function), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 5)).to(dtype)
    data = [(torch.randn(64, 20, dtype=dtype), torch.randint(5, (64,)))]
    H = make(kfacopt.HessianLinearOperator, model, data)
    v = torch.ones(H.shape[1], dtype=dtype)
    if function is Intermediate:
        with pytest.raises(RuntimeError, match="Intermediate is not differentiable"):
            H @ v
    else:
        assert (H @ v).isfinite().all()


def test_what_is_computed_by_single_backward_passes_is_said_once():
    model, _, data = problem(Once)
    G = make(kfacopt.GGNLinearOperator, model, data)
    with pytest.warns(UserWarning, match="model_func: Once can be differentiated once only"):
        G @ torch.ones(26, dtype=DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        G @ torch.ones(26, dtype=DTYPE)


@pytest.mark.parametrize("operator", FIRST_ORDER, ids=lambda c: c.__name__)
def test_a_backward_pass_that_is_not_linear_is_refused(operator):
    model, _, data = problem(Clipping)
    with pytest.raises(RuntimeError, match="backward pass of Clipping is not linear"):
        make(operator, model, Loader(data)) @ torch.ones(26, dtype=DTYPE)


class Quartic(torch.autograd.Function):
    """A loss that is twice differentiable."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(z, y)
        return ((z - y) ** 4).mean()

    @staticmethod
    def backward(ctx, g):
        z, y = ctx.saved_tensors
        return g * 4 * (z - y) ** 3 / z.numel(), None


class QuarticNumPy(Quartic):
    @staticmethod
    def backward(ctx, g):
        z, y = (x.detach() for x in ctx.saved_tensors)
        return torch.from_numpy((g * 4 * (z - y) ** 3 / z.numel()).detach().numpy()), None


class QuarticOnce(Quartic):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Quartic.backward(ctx, g)


class QuarticIntermediate(Quartic):
    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(4 * (z - y) ** 3 / z.numel())
        return ((z - y) ** 4).mean()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


class Linear(torch.autograd.Function):
    """A loss without curvature."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(y)
        return (z * y).mean()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] / ctx.saved_tensors[0].numel(), None


def quartic(z, y):
    return ((z - y) ** 4).mean()


def linear(z, y):
    return (z * y).mean()


MATRICES = {kfacopt.GGNLinearOperator: dense.ggn, kfacopt.HessianLinearOperator: dense.hessian}


@pytest.mark.parametrize("operator", MATRICES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("function", "same"), [(Quartic, quartic), (Linear, linear)], ids=["quartic", "linear"]
)
def test_losses_that_are_twice_differentiable(operator, function, same):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).to(DTYPE)
    data = [(torch.randn(5, 3, dtype=DTYPE), torch.randn(5, 2, dtype=DTYPE))]
    params = list(model.parameters())
    A, expected = operator(model, function.apply, params, data), MATRICES[operator]
    for _ in range(3):
        found = A @ torch.eye(8, dtype=DTYPE)
        assert_close(found, expected(model, same, params, data))


@pytest.mark.parametrize("operator", MATRICES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "function", [QuarticNumPy, QuarticOnce, QuarticIntermediate], ids=lambda f: f.__name__
)
def test_losses_that_are_not_twice_differentiable_are_refused(operator, function):
    model = nn.Linear(3, 2).to(DTYPE)
    data = [(torch.randn(5, 3, dtype=DTYPE), torch.randn(5, 2, dtype=DTYPE))]
    A = operator(model, function.apply, list(model.parameters()), data)
    for columns in (1, 8):
        with pytest.raises(RuntimeError, match=f"loss_func: .* {function.__name__} is not diff"):
            A @ torch.eye(8, dtype=DTYPE)[:, :columns]


@pytest.mark.parametrize("operator", [*FIRST_ORDER[:3], kfacopt.HessianLinearOperator])
def test_predictions_without_a_graph_are_said_once(operator):
    net = nn.Linear(3, 2).to(DTYPE)
    X, y = torch.randn(5, 3, dtype=DTYPE), torch.randint(2, (5,))
    args = lambda X: net(X).detach(), nn.CrossEntropyLoss(), list(net.parameters())
    A = operator(*args, [(X, y), (X, y)])
    with pytest.warns(UserWarning, match="predictions have no graph") as caught:
        assert not (A @ torch.ones(8, dtype=DTYPE)).any()
    A @ torch.ones(8, dtype=DTYPE)
    assert len(caught) == 1


@pytest.mark.parametrize("operator", MATRICES, ids=lambda c: c.__name__)
def test_a_loss_without_a_graph_is_refused(operator):
    net = nn.Linear(3, 2).to(DTYPE)
    data = [(torch.randn(5, 3, dtype=DTYPE), torch.randn(5, 2, dtype=DTYPE))]
    A = operator(net, lambda z, y: quartic(z.detach(), y), list(net.parameters()), data)
    with pytest.raises(RuntimeError, match="loss_func: its value has no graph"):
        A @ torch.ones(8, dtype=DTYPE)
