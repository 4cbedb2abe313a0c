"""A module that a model has under two names keeps its parameters, whatever evaluates the model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfacopt

OPERATORS = [
    kfacopt.GGNLinearOperator,
    kfacopt.HessianLinearOperator,
    kfacopt.FisherMCLinearOperator,
    kfacopt.EFLinearOperator,
    kfacopt.KFACLinearOperator,
]


def towers():
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.BatchNorm1d(3), nn.Tanh(), shared), shared


def own(model):
    return [*model.parameters(), *model.buffers()]


def unchanged(model, before):
    return all(x is y for x, y in zip(own(model), before, strict=True))


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda kind: kind.__name__)
def test_operators_leave_parameters_in_the_modules(kind):
    model, shared = towers()
    before = own(model)
    operator = kind(model.eval(), nn.MSELoss(), list(model.parameters()), [(torch.rand(5, 3),) * 2])
    operator @ torch.eye(operator.shape[1])
    assert unchanged(model, before)
    assert shared.weight.requires_grad


@pytest.mark.parametrize("options", [{}, {"lr": "auto"}, {"preconditioner": "ekfac"}])
def test_steps_leave_parameters_in_the_modules(options):
    model, _ = towers()
    before = own(model)
    optimizer = kfacopt.KFACOptimizer(model.parameters(), **options)
    X, losses = torch.rand(16, 3), []
    for _ in range(35):
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), X.flip(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert unchanged(model, before)
    assert losses[-1] < 0.5 * losses[0]


def test_tied_names_take_one_tensor():
    model, _ = towers()
    values = {
        name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)
    }
    data = [(torch.rand(5, 3),) * 2]
    operator = kfacopt.GGNLinearOperator(
        model.eval(), nn.MSELoss(), {k: v for k, v in values.items() if not k.startswith("3")}, data
    )
    plain = kfacopt.GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
    identity = torch.eye(operator.shape[1])
    assert torch.allclose(operator @ identity, plain @ identity, atol=1e-6)
    tied = kfacopt.GGNLinearOperator(model, nn.MSELoss(), values, data, check_deterministic=False)
    with pytest.raises(ValueError, match="is tied to another name"):
        tied @ torch.eye(tied.shape[1])
