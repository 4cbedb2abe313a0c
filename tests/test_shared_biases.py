"""A weight that modules with and without its bias share, with blocks of W and b of their own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator, KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
OTHERS = {
    "no bias": lambda: nn.Linear(4, 3, bias=False),
    "another bias": lambda: nn.Linear(4, 3),
}
OPERATORS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}


class Shared(nn.Module):
    def __init__(self, other="no bias", functional=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.functional = nn.Linear(4, 3), OTHERS[other](), functional
        self.b.weight = self.a.weight

    def forward(self, x):
        parts = [self.a(x), self.b(x.sin())]
        if self.functional:
            parts.append(F.linear(x.cos(), self.a.weight, self.a.bias))
        return torch.cat(parts, dim=1)


def exact_and(operator, model, params):
    data = [(X, torch.zeros_like(model(X)))]
    eye = torch.eye(sum(p.numel() for p in params))
    K = operator(model, nn.MSELoss(), params, data, fisher_type="type-2") @ eye
    return GGNLinearOperator(model, nn.MSELoss(), params, data) @ eye, K


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("other", OTHERS)
def test_the_bias_has_the_gradients_of_its_own_uses(other, operator):
    model = Shared(other)
    exact, K = exact_and(OPERATORS[operator], model, [model.a.weight, model.a.bias])
    assert torch.allclose(K[12:, 12:], exact[12:, 12:], rtol=1e-12)


def test_a_product_beside_the_calls_is_refused():
    model = Shared(functional=True)
    with pytest.raises(NotImplementedError, match=r"a\.bias"):
        exact_and(KFACLinearOperator, model, [model.a.weight, model.a.bias])


def test_the_optimizer_has_the_operators_factors():
    model = Shared()
    optimizer = KFACOptimizer(
        model.parameters(),
        lr=0.0,
        fisher_type="type-2",
        factor_update_interval=1,
        separate_weight_and_bias=True,
    )
    target = torch.zeros_like(model(X))
    F.mse_loss(model(X), target).backward()
    optimizer.step()
    args = model, nn.MSELoss(), list(model.parameters()), [(X, target)]
    K = KFACLinearOperator(*args, fisher_type="type-2")
    for p in (model.a.weight, model.a.bias):
        for own, other in zip(optimizer.factors(p), K.factors(p), strict=True):
            assert torch.allclose(own, other, rtol=1e-12)
