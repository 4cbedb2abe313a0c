"""Jacobians of single data that are kept in place of graphs give the same matrices."""

import copy
import weakref

import dense_curvature as dense
import pytest
import torch
from curvature_cases import MODELS, make_data, make_model, params_of
from torch import nn
from torch.nn import functional as F

import kfacopt

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-11
NUM_CLASSES = 3
PRODUCTS = 4  # the first measures, the second keeps graphs, later ones keep rows


class Shared(nn.Module):
    """A layer that is used twice, one without a bias, and a parameter of no layer."""

    def __init__(self):
        super().__init__()
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, X):
        return self.head(self.twice(self.twice(X).tanh()).relu_() * self.scale)


class TwoWays(nn.Module):
    """A weight that a layer uses, and at other axes or past the layer."""

    def __init__(self, other):
        super().__init__()
        self.layer, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, NUM_CLASSES), other

    def forward(self, X):
        return self.head(self.layer(X).tanh() + self.other(self.layer, X))


class Centered(nn.Module):
    """Mixes the rows of a batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, NUM_CLASSES)

    def forward(self, X):
        Z = self.first(X)
        return self.last((Z - Z.mean(0)).tanh())


def frozen_weight():
    model = make_model("mlp")
    model[0].weight.requires_grad_(False)
    return model


def batch_norm(training):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))
    model(torch.randn(20, 4) + 1)
    return model.train(training)


CASES = {
    **{name: lambda name=name: make_model(name) for name in MODELS},
    "layer used twice": Shared,
    "other axes": lambda: TwoWays(lambda layer, X: layer(X.unsqueeze(1)).squeeze(1).sin()),
    "past the layer": lambda: TwoWays(lambda layer, X: F.linear(X, layer.weight).sin()),
    "mixed rows": Centered,
    "batch norm, evaluation": lambda: batch_norm(False),
    "batch norm, training": lambda: batch_norm(True),
    "frozen weight": frozen_weight,
}
KEPT = ("mlp", "grouped-cnn", "attention", "layer used twice", "other axes", "frozen weight")


def problem(name):
    torch.manual_seed(0)
    model = CASES[name]()
    data_of = name if name in MODELS else "mlp"
    return model, params_of(model), make_data(data_of, "ce", (4, 2))


def assert_matrix(operator, expected):
    identity = torch.eye(operator.shape[1])
    for product in range(PRODUCTS):
        for columns in (1, 5, operator.shape[1]):
            error = (operator @ identity[:, :columns] - expected[:, :columns]).abs().max()
            assert error < TOLERANCE, (product, columns)


def concatenated(data):
    return [(torch.cat([X for X, _ in data]), torch.cat([y for _, y in data]))]


@pytest.mark.parametrize("name", CASES)
class TestMatrices:
    def test_jacobians(self, name):
        model, params, data = problem(name)
        expected = torch.cat([dense.jacobian(model, params, [batch]) for batch in data])
        J = kfacopt.JacobianLinearOperator(model, params, data, check_deterministic=False)
        assert_matrix(J, expected)
        assert_matrix(J.T, expected.T)
        JT = kfacopt.TransposedJacobianLinearOperator(model, params, data)
        assert_matrix(JT, expected.T)

    def test_ggn(self, name):
        model, params, data = problem(name)
        loss_func = nn.CrossEntropyLoss(reduction="sum")
        expected = sum(dense.ggn(model, loss_func, params, [batch]) for batch in data)
        assert_matrix(kfacopt.GGNLinearOperator(model, loss_func, params, data), expected)

    def test_outer_products(self, name):
        model, params, data = problem(name)
        loss_func = nn.CrossEntropyLoss(reduction="sum")
        expected = torch.zeros(())
        for X, y in data:  # J_nᵀ u_n with the batch's J, also where rows are mixed
            J = dense.jacobian(model, params, [(X, y)])
            z = model(X).detach().requires_grad_()
            (u,) = torch.autograd.grad(loss_func(z, y), z)
            G = (u.reshape(-1, 1) * J).reshape(len(X), -1, J.shape[1]).sum(1)
            expected = expected + G.T @ G
        assert_matrix(kfacopt.EFLinearOperator(model, loss_func, params, data), expected)
        fisher = kfacopt.FisherMCLinearOperator(model, loss_func, params, data, mc_samples=2)
        assert_matrix(fisher, fisher @ torch.eye(fisher.shape[1]))  # the first through the network

    def test_dict_of_other_tensors(self, name):
        model, _, data = problem(name)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in params_of(other):
                p.add_(0.1)
        known = {id(p) for p in params_of(other)}
        named = {n: p.detach() for n, p in other.named_parameters() if id(p) in known}
        J = kfacopt.JacobianLinearOperator(model, named, data)
        expected = [dense.jacobian(other, params_of(other), [batch]) for batch in data]
        assert_matrix(J, torch.cat(expected))


@pytest.mark.parametrize("kind", [kfacopt.GGNLinearOperator, kfacopt.EFLinearOperator])
@pytest.mark.parametrize("name", KEPT)
def test_rows_take_the_place_of_graphs(name, kind):
    """Their graphs are freed, and products need no pass through the model."""
    model, params, data = problem(name)
    operator = kind(model, nn.CrossEntropyLoss(), params, data)
    outputs = []
    model.register_forward_hook(lambda m, args, out: outputs.append(weakref.ref(out)))
    for _ in range(PRODUCTS):
        operator @ torch.eye(operator.shape[1])
    assert all(ref() is None for ref in outputs)
    outputs.clear()
    operator @ torch.eye(operator.shape[1])
    assert not outputs


@pytest.mark.parametrize("name", KEPT)
def test_chunks_give_the_same_rows(name):
    model, params, data = problem(name)
    loss_func = nn.CrossEntropyLoss(reduction="sum")
    expected = sum(dense.ggn(model, loss_func, params, [batch]) for batch in data)
    ggn = kfacopt.GGNLinearOperator(model, loss_func, params, data, chunk_size=2)
    assert_matrix(ggn, expected)


def test_mixed_rows_go_through_the_network():
    """What single data would give is another matrix, which must not be taken."""
    model, params, data = problem("mixed rows")
    loss_func = nn.CrossEntropyLoss(reduction="sum")
    right = dense.ggn(model, loss_func, params, data[:1])
    single = [(X[None], y[None]) for X, y in zip(*data[0], strict=True)]
    wrong = sum(dense.ggn(model, loss_func, params, [batch]) for batch in single)
    assert (right - wrong).norm() > 0.1 * right.norm()


def test_many_outputs_keep_graphs():
    """J of 2,000 outputs a datum is larger than the graphs by far, and is not made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2000))
    data = [(torch.randn(2, 3), None)]
    J = kfacopt.JacobianLinearOperator(model, list(model.parameters()), data)
    outputs = []
    model.register_forward_hook(lambda m, args, out: outputs.append(weakref.ref(out)))
    for _ in range(PRODUCTS):
        product = J @ torch.eye(J.shape[1], 600)
    assert any(ref() is not None for ref in outputs)
    expected = kfacopt.JacobianLinearOperator(model, list(model.parameters()), data, cache_bytes=0)
    assert torch.allclose(product, expected @ torch.eye(J.shape[1], 600), atol=TOLERANCE)
