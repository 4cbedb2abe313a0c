"""lr="auto" with losses that nobody named: its quadratic model against dense derivatives."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-8  # of forward mode, twice differentiated pieces and their eigenvalues in float64
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
TARGETS = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def dice(z):
    p, t = z.sigmoid(), (TARGETS > 0.5).to(z)
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def focal(z):
    log_p = z.log_softmax(-1)[torch.arange(6), LABELS]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


LOSSES = {
    "diagonal": lambda z: F.huber_loss(z, TARGETS, delta=0.3),
    "blocks": focal,
    "mixed rows": dice,
    "a part beside a known loss": lambda z: F.mse_loss(z, TARGETS) + 0.3 * dice(z),
    "times a number": lambda z: focal(z) / 3,
    "saturated": lambda z: F.binary_cross_entropy((40 * z).sigmoid(), (TARGETS > 0.5).to(z)),
}


class WithLoss(nn.Module):
    """Computes a loss that nobody named itself."""

    def __init__(self, body, loss):
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x):
        return {"loss": self.loss(self.body(x))}


def make(model, **options):
    defaults = {"lr": "auto", "fisher_type": "type-2", "ema_decay": 0.0}
    return KFACOptimizer(model.parameters(), **(defaults | options))


def flat(params):
    return torch.cat([p.detach().flatten() for p in params])


def positive(H):
    values, vectors = torch.linalg.eigh(H)
    return (vectors * values.clamp(min=0)) @ vectors.T


def predicted(before, loss, d):
    """Return gᵀd + ½ dᵀ Jᵀ H⁺ J d, with the GGN of a known loss being part of H⁺."""
    names = [name for name, _ in before.named_parameters()]
    params = {name: p.detach() for name, p in before.named_parameters()}
    outputs = lambda own: functional_call(before, own, (X,))  # noqa: E731
    jacobians = jacrev(outputs)(params)
    J = torch.cat([jacobians[name].flatten(2).flatten(0, 1) for name in names], 1)
    z = outputs(params).detach()
    gradient = torch.func.grad(lambda own: loss(outputs(own)))(params)
    g = torch.cat([gradient[name].flatten() for name in names])
    if loss is LOSSES["a part beside a known loss"]:
        H = 2 / 18 * torch.eye(18) + positive(0.3 * hessian(dice)(z).reshape(18, 18))
    else:
        H = positive(hessian(loss)(z).reshape(18, 18))
    return (g @ d + 0.5 * d @ J.T @ H @ J @ d).item()


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside the model"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_quadratic_model_is_that_of_the_positive_part(name, inside):
    loss, body = LOSSES[name], mlp()
    model = WithLoss(body, loss) if inside else body
    optimizer = make(model)
    before = copy.deepcopy(body)
    for _ in range(2):
        start = flat(body.parameters())
        before.load_state_dict(body.state_dict())
        optimizer.zero_grad()
        value = model(X)["loss"] if inside else loss(model(X))
        value.backward()
        optimizer.step()
        d, record = flat(body.parameters()) - start, optimizer.statistics()
        assert math.isclose(record["loss"], value.item(), rel_tol=TOLERANCE)
        expected = predicted(before, loss, d)
        assert math.isclose(record["predicted_change"], expected, rel_tol=TOLERANCE)
        after = loss(body(X)).item()
        assert math.isclose(record["change"], after - value.item(), rel_tol=1e-6)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside the model"])
def test_steps_whose_factors_are_not_due_have_the_objective_too(inside):
    loss, body = LOSSES["diagonal"], mlp()
    model = WithLoss(body, loss) if inside else body
    optimizer = make(model, factor_update_interval=3)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        value = model(X)["loss"] if inside else loss(model(X))
        value.backward()
        optimizer.step()
        values.append(value.item())
        assert math.isclose(optimizer.statistics()["loss"], values[-1], rel_tol=TOLERANCE)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["diagonal", "blocks", "mixed rows"])
def test_it_trains_in_other_precisions(name, dtype):
    model, loss = mlp().to(dtype), LOSSES[name]
    optimizer = make(model, fisher_type="mc")
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        value = loss(model(X.to(dtype)).double())
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


def test_where_the_second_derivative_is_zero_the_empirical_fisher_predicts():
    model, optimizer = (model := mlp()), make(model)
    before, start = copy.deepcopy(model), flat(model.parameters())
    F.l1_loss(model(X), TARGETS).backward()
    optimizer.step()
    d = flat(model.parameters()) - start
    names = [name for name, _ in before.named_parameters()]
    params = {name: p.detach() for name, p in before.named_parameters()}
    outputs = lambda own: functional_call(before, own, (X,))  # noqa: E731
    jacobians = jacrev(outputs)(params)
    J = torch.cat([jacobians[name].flatten(2) for name in names], 2)  # [N, C, D]
    rows = torch.func.grad(lambda z: F.l1_loss(z, TARGETS))(outputs(params))
    along = torch.einsum("nc,ncd,d->n", rows, J, d)  # ∇L_n · d
    expected = (along.sum() + 0.5 * 6 * along.square().sum()).item()
    record = optimizer.statistics()
    assert math.isclose(record["predicted_change"], expected, rel_tol=TOLERANCE)
