"""Forward mode is used where it agrees with backward passes, and nowhere else."""

import warnings

import dense_curvature as dense
import pytest
import torch
from torch import nn

import kfacopt

DTYPE = torch.float64
ROUND_OFF = 1e-11  # of sums of about a hundred terms of order 1
COLUMNS = 9


class Constant(nn.Module):
    """A factor that is a constant to backward passes; forward mode does not see `no_grad`.

    Double backward of `logcumsumexp` is NaN (torch 2.13), so that it cannot tell.
    """

    def __init__(self, first, least=0):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.first, self.least = first, least

    def forward(self, x):
        h = self.first(self.a(x))
        with torch.set_grad_enabled(len(x) <= self.least and torch.is_grad_enabled()):
            factor = self.b(h)
        return self.b(h) * factor


def log_cum_sum_exp(x):
    return torch.logcumsumexp(x, 1)


def written_out(x):
    return torch.stack([torch.logsumexp(x[:, : i + 1], 1) for i in range(x.shape[1])], 1)


def problem(first, least=0):
    model = Constant(first, least).to(DTYPE)
    same = Constant(written_out if first is log_cum_sum_exp else first, least).to(DTYPE)
    same.load_state_dict(model.state_dict())
    data = [(torch.randn(n, 3, dtype=DTYPE), torch.randint(2, (n,))) for n in (4, 5)]
    return model, same, data


def loader_of(data):
    dataset = [pair for X, y in data for pair in zip(X, y, strict=True)]
    sizes = [len(X) for X, _ in data]
    indices = torch.arange(sum(sizes)).split(sizes)
    return torch.utils.data.DataLoader(dataset, batch_sampler=[i.tolist() for i in indices])


@pytest.mark.filterwarnings("ignore:model_func. .* once only:UserWarning")
@pytest.mark.parametrize("source", [list, loader_of], ids=["list", "loader"])
@pytest.mark.parametrize("least", [0, 4], ids=["every batch", "one batch"])
@pytest.mark.parametrize("first", [torch.tanh, log_cum_sum_exp], ids=["tanh", "NaN"])
def test_constants_of_no_grad(first, least, source):
    model, same, data = problem(first, least)
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    same_params = list(same.parameters())
    V = torch.randn(26, COLUMNS, dtype=DTYPE)
    expected = {
        kfacopt.JacobianLinearOperator: dense.jacobian(same, same_params, data),
        kfacopt.GGNLinearOperator: dense.ggn(same, loss, same_params, data),
        kfacopt.HessianLinearOperator: dense.hessian(same, loss, same_params, data),
    }
    for operator, matrix in expected.items():
        losses = () if operator is kfacopt.JacobianLinearOperator else (loss,)
        A = operator(model, *losses, params, source(data))
        for columns in (COLUMNS, 1, COLUMNS, 1):
            V_ = V[:, :columns]
            torch.testing.assert_close(A @ V_, matrix @ V_, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_predictions_that_are_nan_confirm_nothing_and_cost_no_further_passes():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(DTYPE)
    X = torch.randn(200, 3, dtype=DTYPE)
    J = kfacopt.JacobianLinearOperator(model, list(model.parameters()), loader_of([(X, X[:, 0])]))
    with torch.no_grad():
        model[0].bias.fill_(torch.nan)
    V = torch.ones(26, COLUMNS, dtype=DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (J @ V).isnan().any()
    with torch.no_grad():
        model[0].bias.zero_()
    expected = dense.jacobian(model, list(model.parameters()), [(X, None)]) @ V
    torch.testing.assert_close(J @ V, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_jacobians_that_are_zero_at_first():
    """They tell nothing of forward mode, which is asked again."""
    model, _, data = problem(torch.tanh)
    J = kfacopt.JacobianLinearOperator(model, list(model.parameters()), loader_of(data))
    V = torch.randn(26, COLUMNS, dtype=DTYPE)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not (J @ V).any()
    model.load_state_dict(values)
    expected = dense.jacobian(model, list(model.parameters()), data) @ V
    torch.testing.assert_close(J @ V, expected, rtol=ROUND_OFF, atol=ROUND_OFF)
