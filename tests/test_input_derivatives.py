"""Models that differentiate by their input: forces, physics-informed networks."""

import dense_curvature as dense
import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, jvp, vmap

import kfacopt

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # by torch.func.jvp
]

TOLERANCE = 1e-12  # of float64 products with entries of about 1


class Derivative(nn.Module):
    def __init__(self, derive):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self._derive = derive

    def forward(self, x):
        return self._derive(self.u, x)


def by_autograd(u, x):
    x = x.detach().requires_grad_()
    return -torch.autograd.grad(u(x).sum(), x, create_graph=True)[0]


def of_second_order(u, x):
    x = x.detach().requires_grad_()
    g = torch.autograd.grad(u(x).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(g.sum(), x, create_graph=True)[0] + u(x)


DERIVATIVES = {
    "autograd.grad": by_autograd,
    "twice": of_second_order,
    "func.grad": lambda u, x: grad(lambda x: u(x).sum())(x),
    "func.jacrev": lambda u, x: vmap(jacrev(lambda x: u(x).sum()))(x),
    "func.vmap": lambda u, x: vmap(grad(lambda x: u(x).sum()))(x) + vmap(u)(x),
    "func.jvp": lambda u, x: jvp(u, (x,), (torch.ones_like(x),))[1].expand(-1, 2),
}


def make(name):
    model = Derivative(DERIVATIVES[name])
    data = [(torch.randn(n, 2), torch.randn(n, 2)) for n in (3, 2)]
    # The last bias shifts u, and no derivative of u.
    return model, list(model.parameters())[:3], data


def matrix(operator):
    return operator @ torch.eye(operator.shape[1])


@pytest.mark.parametrize("name", DERIVATIVES)
def test_operators_are_made_and_exact(name):
    """The check of determinism gives models the graph that they need; so do all products."""
    model, params, data = make(name)
    loss = nn.MSELoss()
    for operator, expected in (
        (kfacopt.HessianLinearOperator, dense.hessian),
        (kfacopt.GGNLinearOperator, dense.ggn),
        (kfacopt.EFLinearOperator, dense.empirical_fisher),
    ):
        found = operator(model, loss, params, data)
        want = expected(model, loss, params, data)
        for _ in range(3):  # the third product has rows or graphs that were kept
            torch.testing.assert_close(matrix(found), want, rtol=TOLERANCE, atol=TOLERANCE)
    want = dense.jacobian(model, params, data)
    for check in (True, False):
        J = kfacopt.JacobianLinearOperator(model, params, data, check_deterministic=check)
        torch.testing.assert_close(matrix(J), want, rtol=TOLERANCE, atol=TOLERANCE)


# What torch.func.jvp computes are products with the weights, further uses of the layers.
@pytest.mark.parametrize("name", [name for name in DERIVATIVES if name != "func.jvp"])
@pytest.mark.parametrize("operator", [kfacopt.KFACLinearOperator, kfacopt.EKFACLinearOperator])
def test_kfac_names_the_weights_whose_path_it_does_not_see(operator, name):
    model, params, data = make(name)
    K = operator(model, nn.MSELoss(), params, data, fisher_type="type-2")
    with pytest.raises(NotImplementedError, match=r"'u\.0\.weight'.*'u\.2\.weight'.*by the input"):
        K.trace()


def test_a_bias_of_a_derivative_has_its_whole_block():
    """By torch.autograd.grad it acts through the output of its layer alone, which K-FAC sees."""
    model, params, data = make("autograd.grad")
    bias, loss = [params[1]], nn.MSELoss()
    K = kfacopt.KFACLinearOperator(model, loss, bias, data, fisher_type="type-2")
    expected = dense.ggn(model, loss, bias, data)
    torch.testing.assert_close(matrix(K), expected, rtol=TOLERANCE, atol=TOLERANCE)
