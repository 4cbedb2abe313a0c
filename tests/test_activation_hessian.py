"""The Hessian by a feature equals a dense matrix."""

import dense_curvature as dense
import pytest
import torch
from curvature_cases import DTYPE, close, columns_for
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfacopt.experimental import ActivationHessianLinearOperator


class Residual(nn.Module):
    """A feature that reaches the loss on two ways, one through an in-place activation."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)

    def forward(self, X):
        Z = self.first(X)
        return self.last(Z.exp() + self.act(Z))


class TestActivationHessian:
    @pytest.mark.parametrize(
        "activation", [("first", "output", 0), ("act", "input", 0), ("last", "input", 0)]
    )
    @pytest.mark.parametrize("frozen", [False, True])
    def test_equals_the_dense_matrix(self, activation, frozen):
        model = Residual().to(DTYPE).requires_grad_(not frozen)
        X, y = torch.randn(4, 4, dtype=DTYPE), torch.randn(4, 2, dtype=DTYPE)
        loss_func = nn.MSELoss()
        H = ActivationHessianLinearOperator(model, loss_func, activation, [(X, y)])
        Z = model.first(X)

        def risk_of(value):
            rest = value if activation[0] == "last" else value.exp() + value.relu()
            return loss_func(model.last(rest), y)

        if activation[0] == "last":
            Z = Z.exp() + Z.relu()
        expected = dense.activation_hessian(risk_of, Z)
        for _ in range(3):
            close(H @ torch.eye(12, dtype=DTYPE), expected)
        (product,) = H @ [torch.ones(4, 3, dtype=DTYPE)]
        close(product.flatten(), expected.sum(1))

    def test_element_of_a_tuple(self):
        lstm = nn.LSTM(2, 3, dtype=DTYPE)

        class Last(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = lstm

            def forward(self, X):
                return self.lstm(X)[0]

        data = [(torch.randn(3, 2, 2, dtype=DTYPE), torch.randn(3, 2, 3, dtype=DTYPE))]
        H = ActivationHessianLinearOperator(Last(), nn.MSELoss(), ("lstm", "output", 0), data)
        close(H @ torch.eye(18, dtype=DTYPE), 2 / 18 * torch.eye(18, dtype=DTYPE))

    def test_weights_may_change(self):
        model = Residual().to(DTYPE)
        data = [(torch.randn(4, 4, dtype=DTYPE), torch.randn(4, 2, dtype=DTYPE))]
        args = model, nn.MSELoss(), ("first", "output", 0), data
        H = ActivationHessianLinearOperator(*args)
        V = columns_for(H)
        for _ in range(3):
            before = H @ V
        with torch.no_grad():
            model.last.weight.mul_(2)
        close(H @ V, ActivationHessianLinearOperator(*args) @ V)
        assert not torch.allclose(H @ V, before)

    @pytest.mark.parametrize(
        ("activation", "batches", "message"),
        [
            (("first", "output", 0), 2, "exactly one batch"),
            (("first", "output", 0), 0, "exactly one batch"),
            (("none", "output", 0), 1, "no layer 'none'"),
            (("first", "weight", 0), 1, "second entry"),
            (("first", "output", -1), 1, "third entry"),
            (("first", "output", 1), 1, "must be a floating tensor"),
            (("first", "output", True), 1, "third entry"),
            (("first", "output"), 1, "activation must have three entries"),
            ("0", 1, "activation must have three entries"),
            (None, 1, "activation must have three entries"),
        ],
    )
    def test_refused(self, activation, batches, message):
        model = Residual()
        data = [(torch.randn(4, 4), torch.randn(4, 2))] * batches
        with pytest.raises(ValueError, match=message):
            ActivationHessianLinearOperator(model, nn.MSELoss(), activation, data)

    def test_a_function_has_no_layers(self):
        data = [(torch.randn(4, 4), torch.randn(4, 2))]
        with pytest.raises(ValueError, match=r"model_func must be an nn\.Module"):
            ActivationHessianLinearOperator(torch.tanh, nn.MSELoss(), ("", "output", 0), data)

    def test_another_feature_than_at_first_is_refused(self):
        model, X, y = Residual(), torch.randn(4, 4), torch.randn(4, 2)
        data = [(X, y)]
        H = ActivationHessianLinearOperator(model, nn.MSELoss(), ("first", "output", 0), data)
        data[0] = (X[:2], y[:2])
        with pytest.raises(ValueError, match="make a new operator"):
            H @ torch.ones(H.shape[1])

    def test_a_layer_that_runs_twice_names_no_feature(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, X):
                return self.layer(self.layer(X))

        data = [(torch.randn(4, 3), torch.randn(4, 3))]
        with pytest.raises(ValueError, match="ran 2 times"):
            ActivationHessianLinearOperator(Twice(), nn.MSELoss(), ("layer", "output", 0), data)


def test_construction_leaves_the_global_generator_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    loader = DataLoader(TensorDataset(torch.randn(5, 3), torch.randn(5, 2)), batch_size=5)
    before = torch.get_rng_state()
    ActivationHessianLinearOperator(model, nn.MSELoss(), ("0", "output", 0), loader)
    assert torch.equal(torch.get_rng_state(), before)
