"""The exact operators equal dense matrices in float64."""

import dense_curvature as dense
import pytest
import torch
from curvature_cases import (
    BATCHES,
    DTYPE,
    LOSSES,
    MODELS,
    NUM_CLASSES,
    WEIGHTED,
    Recurrent,
    make_data,
    make_loss,
    make_model,
    params_of,
)
from torch import nn

import kfacopt

# Of the largest entry: round-off of two derivatives in float64.
RELATIVE_TOLERANCE = 1e-10

CASES = [
    pytest.param(model, loss, reduction, batches, id=f"{model}-{loss}-{reduction}-{batches}")
    for model in MODELS
    for loss in LOSSES
    for reduction in ("mean", "sum")
    for batches in BATCHES
    # every loss on one model; on the others the three losses, alternating the rest
    if model in ("mlp", "sequence")
    or (loss in ("ce", "mse", "bce") and (reduction == "mean") == (batches == "unequal-batches"))
]


def assert_equal(actual, expected):
    scale = float(expected.abs().max())
    assert scale > 0, "this case cannot fail: the matrix is 0"
    torch.testing.assert_close(actual, expected, rtol=0, atol=RELATIVE_TOLERANCE * scale)


def make_case(model_name, loss_name, reduction, batches):
    model = make_model(model_name)
    return (
        model,
        make_loss(loss_name, reduction),
        make_data(model_name, loss_name, BATCHES[batches]),
    )


def dense_form(operator):
    return operator @ torch.eye(operator.shape[1], dtype=operator.torch_dtype)


@pytest.mark.parametrize(("model", "loss", "reduction", "batches"), CASES)
def test_hessian(model, loss, reduction, batches):
    model, loss_func, data = make_case(model, loss, reduction, batches)
    params = params_of(model)
    H = kfacopt.HessianLinearOperator(model, loss_func, params, data)
    assert_equal(dense_form(H), dense.hessian(model, loss_func, params, data))


@pytest.mark.parametrize(("model", "loss", "reduction", "batches"), CASES)
def test_ggn(model, loss, reduction, batches):
    model, loss_func, data = make_case(model, loss, reduction, batches)
    params = params_of(model)
    G = kfacopt.GGNLinearOperator(model, loss_func, params, data)
    assert_equal(dense_form(G), dense.ggn(model, loss_func, params, data))


def counted(loss_name, loss_func, data):
    """Return N and Z, as the empirical Fisher's documentation defines them."""
    y = dense.targets(data)
    weights = torch.ones(NUM_CLASSES, dtype=DTYPE)
    if loss_func.weight is not None:
        weights = loss_func.weight
    kept = (y != loss_func.ignore_index).to(DTYPE)
    return kept.sum() / y[0].numel(), (weights[y] * kept).sum()


@pytest.mark.parametrize(("model", "loss", "reduction", "batches"), CASES)
def test_empirical_fisher(model, loss, reduction, batches):
    name = loss
    model, loss_func, data = make_case(model, loss, reduction, batches)
    params = params_of(model)
    EF = kfacopt.EFLinearOperator(model, loss_func, params, data)
    if name in WEIGHTED:
        count = counted(name, loss_func, data)
        expected = dense.weighted_empirical_fisher(model, loss_func, params, data, *count)
    else:
        expected = dense.empirical_fisher(model, loss_func, params, data)
    assert_equal(dense_form(EF), expected)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_jacobian_and_its_transpose(name, batches):
    model, data = make_model(name), make_data(name, "mse", BATCHES[batches])
    params = params_of(model)
    expected = dense.jacobian(model, params, data)
    J = kfacopt.JacobianLinearOperator(model, params, data)
    JT = kfacopt.TransposedJacobianLinearOperator(model, params, data)
    assert J.shape == tuple(expected.shape)
    assert JT.shape == tuple(expected.T.shape)
    for operator, matrix in ((J, expected), (J.T, expected.T), (JT, expected.T), (JT.T, expected)):
        assert_equal(dense_form(operator), matrix)
        assert_equal(operator @ torch.ones(matrix.shape[1], dtype=DTYPE), matrix.sum(1))


def test_jacobian_gives_lists_in_the_shape_of_the_predictions():
    model, data = make_model("sequence"), make_data("sequence", "mse", (2, 3))
    J = kfacopt.JacobianLinearOperator(model, params_of(model), data)
    (tangent,) = J @ [torch.ones_like(p) for p in model.parameters()]
    assert tangent.shape == (5, NUM_CLASSES, 3)
    back = J.T @ [tangent]
    assert [t.shape for t in back] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_cells_in_single_precision(cell):
    torch.manual_seed(0)
    model = Recurrent(cell)
    data = [(torch.randn(4, 3, 2), torch.randint(NUM_CLASSES, (4,)))]
    double = [(X.double(), y) for X, y in data]
    H = kfacopt.HessianLinearOperator(model, nn.CrossEntropyLoss(), params_of(model), data)
    actual = dense_form(H)
    model = model.double()
    expected = dense.hessian(model, nn.CrossEntropyLoss(), params_of(model), double)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def scalar_loss(z, y):
    return (z.sin() * y).pow(3).sum() + z.mean()


def test_hessian_of_any_scalar_valued_callable():
    model, data = make_model("mlp"), make_data("mlp", "mse", (4,))
    params = params_of(model)
    H = kfacopt.HessianLinearOperator(model, scalar_loss, params, data)
    assert_equal(dense_form(H), dense.hessian(model, scalar_loss, params, data))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.SmoothL1Loss, nn.PoissonNLLLoss, nn.SoftMarginLoss])
def test_losses_that_are_no_known_likelihood(loss, reduction):
    model, data = make_model("mlp"), make_data("mlp", "mse", (3, 2))
    params, loss_func = params_of(model), loss(reduction=reduction)
    oracles = {
        kfacopt.HessianLinearOperator: dense.hessian,
        kfacopt.GGNLinearOperator: dense.ggn,
        kfacopt.EFLinearOperator: dense.empirical_fisher,
    }
    for operator, oracle in oracles.items():
        actual = dense_form(operator(model, loss_func, params, data))
        assert_equal(actual, oracle(model, loss_func, params, data))


def test_data_whose_positions_are_rows_of_the_predictions():
    """`logits.view(-1, classes)`: the gradient of a datum sums over its rows."""
    model, data = make_model("sequence"), make_data("sequence", "ce", (3, 2))
    flat = [(X, y.reshape(-1)) for X, y in data]
    params, loss_func = params_of(model), nn.CrossEntropyLoss()

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, X):
            return self.model(X).movedim(1, -1).reshape(-1, NUM_CLASSES)

    for operator in (
        kfacopt.HessianLinearOperator,
        kfacopt.GGNLinearOperator,
        kfacopt.EFLinearOperator,
    ):
        expected = operator(model, loss_func, params, data)
        actual = operator(Flat(), loss_func, params, flat)
        assert_equal(dense_form(actual), dense_form(expected))


def test_a_batch_without_any_counted_target_adds_nothing():
    model, data = make_model("mlp"), make_data("mlp", "ce", (3, 2))
    ignored = torch.full((2,), -100)
    loss_func, params = nn.CrossEntropyLoss(), params_of(model)
    for operator in (
        kfacopt.HessianLinearOperator,
        kfacopt.GGNLinearOperator,
        kfacopt.EFLinearOperator,
        kfacopt.FisherMCLinearOperator,
    ):
        expected = operator(model, loss_func, params, data[:1])
        actual = operator(model, loss_func, params, [data[0], (data[1][0], ignored)])
        assert_equal(dense_form(actual), dense_form(expected))
