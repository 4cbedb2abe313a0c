"""Functions around modules leave no trace, as modules do; models that differentiate by inputs."""

from functools import partial, wraps

import dense_curvature as dense
import pytest
import torch
from torch import nn

import kfacopt

DTYPE = torch.float64
ROUND_OFF = 1e-12

NETWORK: nn.Module | None = None


def make_network():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).to(
        DTYPE
    )


def through_a_global(net):
    global NETWORK
    NETWORK = net
    return lambda X: NETWORK(X)


def through_a_decorator(net):
    def decorated(function):
        @wraps(function)
        def wrapper(X):
            return function(X)

        return wrapper

    return decorated(lambda X: net(X))


class Holder:
    __slots__ = ("nets",)

    def __init__(self, net):
        self.nets = {"first": [net]}

    def __call__(self, X):
        return self.nets["first"][0](X)

    def predict(self, X):
        return self(X)


def out_of_sight(net):
    """The module is found by its parameters alone."""
    source = iter([net])
    found = []

    def function(X):
        if not found:
            found.extend(source)
        return found[0](X)

    return function


FUNCTIONS = {
    "module": lambda net: net,
    "closure": lambda net: lambda X: net(X),
    "default": lambda net: lambda X, model=net: model(X),
    "global": through_a_global,
    "forward": lambda net: net.forward,
    "partial": lambda net: partial(lambda model, X: model(X), net),
    "functional_call": lambda net: lambda X: torch.func.functional_call(net, {}, (X,)),
    "decorator": through_a_decorator,
    "object": Holder,
    "method": lambda net: Holder(net).predict,
    "out of sight": out_of_sight,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_norm_and_dropout_in_training_mode(name):
    net = make_network()
    net[2].eval()
    X, y = torch.randn(8, 5, dtype=DTYPE), torch.randint(3, (8,))
    function, params = FUNCTIONS[name](net), list(net.parameters())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    loss = nn.CrossEntropyLoss()
    V = torch.randn(47, 9, dtype=DTYPE)
    expected = {"GGN": dense.ggn(net, loss, params, [(X, y)])}
    net.load_state_dict(before)
    state = torch.get_rng_state()
    G = kfacopt.GGNLinearOperator(function, loss, params, [(X, y)])
    for _ in range(2):
        torch.testing.assert_close(G @ V, expected["GGN"] @ V, rtol=ROUND_OFF, atol=ROUND_OFF)
    net[2].train()  # dropout draws
    for operator in (kfacopt.HessianLinearOperator, kfacopt.EFLinearOperator):
        operator(function, loss, params, [(X, y)], check_deterministic=False) @ V
    kfacopt.JacobianLinearOperator(function, params, [(X, y)], check_deterministic=False) @ V
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_loss_around_a_module_in_training_mode():
    net, critic = nn.Linear(5, 4).to(DTYPE), nn.BatchNorm1d(4).to(DTYPE)
    X, y = torch.randn(8, 5, dtype=DTYPE), torch.randn(8, 4, dtype=DTYPE)
    before = {key: value.clone() for key, value in critic.state_dict().items()}
    params = list(net.parameters())
    H = kfacopt.HessianLinearOperator(
        net, lambda z, t: ((critic(z) - t) ** 4).sum(), params, [(X, y)]
    )
    H @ torch.eye(24, dtype=DTYPE)
    for key, value in critic.state_dict().items():
        assert torch.equal(value, before[key]), key


class Forces(nn.Module):
    """−∂u/∂x."""

    def __init__(self, u, copies=True):
        super().__init__()
        self.u, self.copies = u, copies

    def forward(self, x):
        x = x.detach().requires_grad_() if self.copies else x.requires_grad_()
        return -torch.autograd.grad(self.u(x).sum(), x, create_graph=True)[0]


def test_models_that_differentiate_by_their_input():
    u = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).to(DTYPE)
    params, loss = list(u.parameters())[:-1], nn.MSELoss()
    X, Y = torch.randn(6, 1, dtype=DTYPE), torch.randn(6, 1, dtype=DTYPE)
    eye = torch.eye(12, dtype=DTYPE)
    ggn = dense.ggn(Forces(u), loss, params, [(X, Y)])
    hessian = dense.hessian(Forces(u), loss, params, [(X, Y)])
    jacobian = dense.jacobian(Forces(u), params, [(X, Y)])
    for checks in (True, False):
        for copies in (True, False):
            model, data = Forces(u, copies), [(X.clone(), Y)]
            cases = (
                (kfacopt.GGNLinearOperator(model, loss, params, data, False, checks), ggn),
                (kfacopt.HessianLinearOperator(model, loss, params, data, False, checks), hessian),
                (kfacopt.JacobianLinearOperator(model, params, data, False, checks), jacobian),
                (
                    kfacopt.TransposedJacobianLinearOperator(model, params, data, False, checks),
                    jacobian.T,
                ),
            )
            for A, expected in cases:
                for _ in range(3):
                    torch.testing.assert_close(
                        A @ eye[: A.shape[1], : A.shape[1]], expected, rtol=1e-10, atol=1e-12
                    )
    EF = kfacopt.EFLinearOperator(Forces(u), loss, params, [(X, Y)]) @ eye
    expected = dense.empirical_fisher(Forces(u), loss, params, [(X, Y)])
    torch.testing.assert_close(EF, expected, rtol=1e-10, atol=1e-12)
    kfacopt.FisherMCLinearOperator(Forces(u), loss, params, [(X, Y)])


def test_errors_of_a_model_are_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        kfacopt.GGNLinearOperator(
            net := nn.Linear(3, 2), nn.MSELoss(), list(net.parameters()), [(torch.ones(2, 4), None)]
        )
