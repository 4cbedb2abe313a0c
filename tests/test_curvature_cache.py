"""What is kept between products is never stale, and does not change them."""

import pytest
import torch
from curvature_cases import (
    DTYPE,
    RISK_OPERATORS,
    close,
    columns_for,
    make_data,
    make_model,
    params_of,
)
from torch import nn

import kfacopt
from kfacopt.experimental import ActivationHessianLinearOperator


@pytest.fixture(params=RISK_OPERATORS, ids=lambda c: c.__name__)
def risk_operator(request):
    return request.param


@pytest.fixture
def problem():
    """Return a model, its loss and a data set of two unequal batches."""
    return make_model("mlp"), nn.CrossEntropyLoss(), make_data("mlp", "ce", (4, 3))


def fresh(risk_operator, problem):
    model, loss_func, data = problem
    return risk_operator(model, loss_func, params_of(model), data, cache_bytes=0)


def in_place(problem):
    with torch.no_grad():
        problem[0][0].weight.add_(0.1)


def through_data(problem):
    problem[0][2].bias.data.add_(0.1)


def data_replaced(problem):
    problem[0][0].weight.data = problem[0][0].weight.data * 1.1


def same_values_loaded(problem):
    problem[0].load_state_dict(problem[0].state_dict())


def setting_changed(problem):
    problem[1].label_smoothing = 0.3


def batch_changed(problem):
    problem[2][1][0].mul_(2)


def batch_replaced(problem):
    X, y = problem[2][1]
    problem[2][1] = (X * 2, y)


class TestCache:
    @pytest.mark.parametrize(
        "change",
        [
            in_place,
            through_data,
            data_replaced,
            same_values_loaded,
            setting_changed,
            batch_changed,
            batch_replaced,
        ],
        ids=lambda f: f.__name__,
    )
    @pytest.mark.parametrize("columns", [1, 3, 10])
    def test_notices_changes(self, risk_operator, problem, change, columns):
        if change is setting_changed and risk_operator is kfacopt.FisherMCLinearOperator:
            pytest.skip("the likelihood is fixed when the operator is made")
        model, loss_func, data = problem
        operator = risk_operator(model, loss_func, params_of(model), data)
        V = columns_for(operator, columns)
        for _ in range(3):
            close(operator @ V, fresh(risk_operator, problem) @ V)
        change(problem)
        for _ in range(3):
            close(operator @ V, fresh(risk_operator, problem) @ V)

    @pytest.mark.parametrize("cache_bytes", [0, 700, 2**30])
    def test_bound_does_not_change_products(self, risk_operator, problem, cache_bytes):
        model, loss_func, data = problem
        operator = risk_operator(model, loss_func, params_of(model), data, cache_bytes=cache_bytes)
        V = columns_for(operator)
        expected = fresh(risk_operator, problem) @ V
        for _ in range(3):
            close(operator @ V, expected)

    @pytest.mark.parametrize("model_name", ["grouped-cnn", "attention", "lstm", "sequence"])
    def test_later_products_are_the_first(self, risk_operator, model_name):
        """Also where gradients of data take the place of graphs."""
        model, data = make_model(model_name), make_data(model_name, "ce", (3, 2))
        operator = risk_operator(model, nn.CrossEntropyLoss(), params_of(model), data)
        V = columns_for(operator, 3)
        first = operator @ V
        for _ in range(2):
            close(operator @ V, first)

    def test_skips_forward_passes_on_lists_only(self, risk_operator, problem):
        model, loss_func, data = problem
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        for source, expected in ((data, 0), (iter_again(data), len(data))):
            operator = risk_operator(
                model, loss_func, params_of(model), source, check_deterministic=False
            )
            V = columns_for(operator)
            operator @ V
            operator @ V
            calls.clear()
            operator @ V
            assert len(calls) == expected

    def test_survives_batch_norm_in_training_mode(self, risk_operator):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(DTYPE)
        data = make_data("mlp", "ce", (4, 3))
        operator = risk_operator(model, nn.CrossEntropyLoss(), params_of(model), data)
        V = columns_for(operator)
        products = [operator @ V for _ in range(4)]
        for product in products[1:]:
            close(product, products[0])
        model.eval()
        expected = risk_operator(
            model, nn.CrossEntropyLoss(), params_of(model), data, cache_bytes=0
        )
        close(operator @ V, expected @ V)
        assert float((operator @ V - products[0]).abs().max()) > 1e-3

    def test_goes_on_after_an_error(self, problem):
        model, loss_func, data = problem
        broken = [data[0], (data[1][0][:, :2], data[1][1])]
        operator = kfacopt.GGNLinearOperator(
            model, loss_func, params_of(model), broken, check_deterministic=False
        )
        V = columns_for(operator)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                operator @ V
        broken[1] = data[1]
        close(operator @ V, fresh(kfacopt.GGNLinearOperator, problem) @ V)


def iter_again(data):
    class Loader:
        def __iter__(self):
            return iter(data)

    return Loader()


@pytest.mark.parametrize(
    ("attribute", "value", "argument"), [("_seed", 1, "seed"), ("_mc_samples", 3, "mc_samples")]
)
@pytest.mark.parametrize("columns", [1, 10])
def test_samples_follow_their_settings(problem, attribute, value, argument, columns):
    """By the names that curvlinops has; there are no public ones."""
    model, loss_func, data = problem
    args = model, loss_func, params_of(model), data
    operator = kfacopt.FisherMCLinearOperator(*args)
    V = columns_for(operator, columns)
    for _ in range(3):
        operator @ V
    setattr(operator, attribute, value)
    expected = kfacopt.FisherMCLinearOperator(*args, cache_bytes=0, **{argument: value}) @ V
    for _ in range(3):
        close(operator @ V, expected)


def test_a_hessian_by_a_feature_follows_the_feature():
    model, data = make_model("mlp"), make_data("mlp", "ce", (4,))
    args = model, nn.CrossEntropyLoss()
    operator = ActivationHessianLinearOperator(*args, ("0", "output", 0), data)
    eye = torch.eye(operator.shape[1], dtype=DTYPE)
    for _ in range(2):
        operator @ eye
    operator._activation = ("1", "output", 0)
    expected = ActivationHessianLinearOperator(*args, ("1", "output", 0), data) @ eye
    close(operator @ eye, expected)
