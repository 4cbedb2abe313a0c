"""Weight normalisation, whose fused form in torch has a wrong double derivative."""

import warnings

import pytest
import torch
from dense_curvature import derivative, flatten, gradient
from torch import nn
from torch.nn.utils import parametrizations

import kfacopt
from kfacopt.curvature.differentiable_functions import normalized_weight

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
PRODUCTS = 3  # the first measures, the second keeps, the third uses what was kept
AXES = [0, 1, -1]


def lengths(v, dim):
    shape = [1] * v.ndim if dim != -1 else []
    if dim != -1:
        shape[dim] = v.shape[dim]
    return torch.rand(shape) + 0.5


# torch says it where gradcheck needs forward-mode formulas for the first time
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("dim", AXES)
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 2)], ids=str)
def test_normalized_weight_is_torchs_and_has_derivatives(shape, dim):
    v = torch.randn(shape, requires_grad=True)
    g = lengths(v, dim).requires_grad_()
    assert torch.allclose(normalized_weight(v, g, dim), torch._weight_norm(v, g, dim))

    def function(v, g):
        return normalized_weight(v, g, dim)

    assert torch.autograd.gradcheck(function, (v, g), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (v, g))


def hooked(layer, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and in use
        return nn.utils.weight_norm(layer, dim=dim)


FORMS = {
    "hook": (hooked, ("weight_v", "weight_g")),
    "parametrization": (
        lambda layer, dim: parametrizations.weight_norm(layer, dim=dim),
        ("parametrizations.weight.original1", "parametrizations.weight.original0"),
    ),
}


def norm_along(v, dim):
    """‖v‖ with one entry for each index along an axis, by a loop."""
    if dim is None:
        return (v**2).sum().sqrt()
    slices = [(v.select(dim, i) ** 2).sum().sqrt() for i in range(v.shape[dim])]
    shape = [1] * v.ndim
    shape[dim] = -1
    return torch.stack(slices).reshape(shape)


class Problem:
    """A network of one normalised layer, and its risk written out without torch's version."""

    def __init__(self, form, dim):
        torch.manual_seed(0)
        wrap, (v_name, g_name) = FORMS[form]
        self.model = nn.Sequential(wrap(nn.Linear(3, 4), dim), nn.Tanh(), nn.Linear(4, 2))
        named = dict(self.model.named_parameters())
        self.v, self.g = named[f"0.{v_name}"], named[f"0.{g_name}"]
        self.params, self.dim = list(self.model.parameters()), dim
        with torch.no_grad():
            self.g.mul_(torch.rand_like(self.g) + 0.5)
        self.X, self.y = torch.randn(5, 3), torch.randn(5, 2)
        self.args = self.params, [(self.X, self.y)]

    def predict(self):
        weight = self.g * self.v / norm_along(self.v, self.dim)
        hidden = (self.X @ weight.T + self.model[0].bias).tanh()
        return hidden @ self.model[2].weight.T + self.model[2].bias

    def risk(self):
        return ((self.predict() - self.y) ** 2).mean()


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("form", FORMS)
def test_hessian_ggn_and_jacobian(form, dim):
    problem = Problem(form, dim)
    hessian = derivative(gradient(problem.risk(), problem.params), problem.params)
    jacobian = derivative(problem.predict(), problem.params)
    loss_func, model = nn.MSELoss(), problem.model
    for function in (model, lambda X: model(X)):
        pairs = [
            (kfacopt.HessianLinearOperator(function, loss_func, *problem.args), hessian),
            (
                kfacopt.GGNLinearOperator(function, loss_func, *problem.args),
                jacobian.T @ jacobian * 2 / problem.y.numel(),
            ),
            (kfacopt.JacobianLinearOperator(function, *problem.args), jacobian),
        ]
        for operator, expected in pairs:
            for columns in [1, 3, operator.shape[1]] * PRODUCTS:
                product = operator @ torch.eye(operator.shape[1])[:, :columns]
                assert torch.allclose(product, expected[:, :columns], atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_left_as_it_was(form):
    problem = Problem(form, 0)
    before = problem.model[0].weight
    operator = kfacopt.HessianLinearOperator(problem.model, nn.MSELoss(), *problem.args)
    operator @ torch.eye(operator.shape[1])
    assert torch.equal(problem.model[0].weight, before)
    grads = torch.autograd.grad(nn.MSELoss()(problem.model(problem.X), problem.y), problem.params)
    expected = gradient(problem.risk(), problem.params)
    assert torch.allclose(flatten(grads), expected, atol=TOLERANCE)
