"""What happens to data, parameters and model after an operator was made, or inside a forward."""

import functools
import types

import numpy as np
import pytest
import torch
from dense_curvature import hessian as dense_hessian
from dense_curvature import jacobian as dense_jacobian
from torch import nn

import kfacopt
import kfacopt.experimental

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
PRODUCTS = 3  # the first measures, the second keeps, the third uses what was kept
RISKS = [
    kfacopt.HessianLinearOperator,
    kfacopt.GGNLinearOperator,
    kfacopt.EFLinearOperator,
    kfacopt.FisherMCLinearOperator,
]
each_risk = pytest.mark.parametrize("kind", RISKS, ids=lambda c: c.__name__)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(size=6):
    return torch.randn(size, 3), torch.randn(size, 2)


def warm(operator):
    vector = torch.ones(operator.shape[1])
    for _ in range(PRODUCTS):
        operator @ vector
    return vector


class TestParameters:
    @each_risk
    def test_a_dicts_tensor_whose_data_is_replaced(self, kind):
        model, data, loss_func = network(), [batch()], nn.MSELoss()
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        operator = kind(model, loss_func, own, data)
        vector = warm(operator)
        own["0.weight"].data = own["0.weight"] * 2
        expected = kind(model, loss_func, dict(own), data) @ vector
        assert not torch.allclose(warm_product := operator @ vector, 0 * vector)
        assert torch.allclose(warm_product, expected, atol=TOLERANCE)
        with torch.no_grad():
            own["0.weight"].mul_(2)
        expected = kind(model, loss_func, dict(own), data) @ vector
        assert torch.allclose(operator @ vector, expected, atol=TOLERANCE)

    @each_risk
    def test_frozen_afterwards(self, kind):
        model = network()
        operator = kind(model, nn.MSELoss(), list(model.parameters()), [batch()])
        vector = warm(operator)
        model[0].weight.requires_grad_(False)
        with pytest.raises(ValueError, match=r"params\[0\] \(0\.weight\) does not require"):
            operator @ vector
        model[0].weight.requires_grad_()
        operator @ vector

    def test_another_dtype_afterwards(self):
        model = network()
        operator = kfacopt.JacobianLinearOperator(model, list(model.parameters()), [batch()])
        vector = warm(operator)
        model.float()
        with pytest.raises(ValueError, match=r"was .*float64.* and is .*float32.*new operator"):
            operator @ vector

    def test_hutchpp_draws_its_subspace_anew(self):
        model, data = network(), [batch()]
        ggn = kfacopt.GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
        size = ggn.shape[0]
        damped = 0.5 * (ggn + kfacopt.IdentityLinearOperator(ggn)).T
        for matrix in (ggn, damped, kfacopt.SubmatrixLinearOperator(ggn, range(9), range(9))):
            estimator = kfacopt.HutchPPTraceEstimator(matrix, basis_dim=matrix.shape[0])
            for factor in (1.0, 2.0):  # a basis of the whole space makes a sample exact
                model[2].weight.data.mul_(factor)
                expected = (matrix @ torch.eye(matrix.shape[0])).trace()
                assert torch.allclose(estimator.sample(), expected)
        assert size == sum(p.numel() for p in model.parameters())

    def test_hutchpp_of_a_tensor_that_changes(self):
        A = torch.diag(torch.arange(1.0, 5.0))
        estimator = kfacopt.HutchPPTraceEstimator(A, basis_dim=4)
        estimator.sample()
        A.mul_(3)
        assert torch.allclose(estimator.sample(), A.trace())

    @pytest.mark.parametrize("kind", [*RISKS, kfacopt.KFACLinearOperator])
    def test_an_iterator_of_parameters(self, kind):
        model, data = network(), [batch()]
        operator = kind(model, nn.MSELoss(), model.parameters(), data)
        expected = kind(model, nn.MSELoss(), list(model.parameters()), data)
        assert torch.equal(operator @ torch.ones(26), expected @ torch.ones(26))


class TestData:
    def test_a_list_that_changes_its_length_under_a_jacobian(self):
        model, data = network(), [batch(4), batch(2)]
        params = list(model.parameters())
        J = kfacopt.JacobianLinearOperator(model, params, data)
        JT = kfacopt.TransposedJacobianLinearOperator(model, params, data)
        products = [lambda: J @ torch.ones(26), lambda: J.T @ torch.ones(12), lambda: JT @ ones]
        ones = torch.ones(12)
        for change in (lambda: data.append(batch(1)), lambda: data.__delitem__(slice(1, 3))):
            change()
            for product in products:
                with pytest.raises(ValueError, match=r"there were 12 predictions .* new operator"):
                    product()
        data[:] = [batch(1), batch(5)]  # another split of as many
        expected = dense_jacobian(model, params, data)
        assert torch.allclose(J @ torch.eye(26), expected, atol=TOLERANCE)
        assert torch.allclose(JT @ torch.eye(12), expected.T, atol=TOLERANCE)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @each_risk
    def test_no_data(self, kind, reduction):
        model, loss_func = network(), nn.MSELoss(reduction=reduction)
        params = list(model.parameters())
        generator = (b for b in [batch()])
        operator = kind(model, loss_func, params, generator, check_deterministic=False)
        operator @ torch.ones(26)
        with pytest.raises(ValueError, match=r"no batches\. A generator can be read once only"):
            operator @ torch.ones(26)
        with pytest.raises(RuntimeError, match="no batches"):
            kind(model, loss_func, params, [])

    @pytest.mark.parametrize(
        ("wrap", "found"),
        [
            (lambda X, y: (X, y), "a Tensor"),
            (lambda X, y: X, "a Tensor"),
            (lambda X, y: [(X, y, y)], "a tuple of 3"),
            (lambda X, y: [{"X": X, "y": y}], "a dict"),
        ],
        ids=["one batch", "a tensor", "three entries", "a dict"],
    )
    def test_batches_that_are_no_pairs(self, wrap, found):
        """Tensors of two rows could be unpacked as inputs and targets."""
        model, data = network(), wrap(*batch(2))
        params, message = list(model.parameters()), rf"must be a pair \(X, y\), got {found}"
        for kind in (*RISKS, kfacopt.KFACLinearOperator):
            with pytest.raises(ValueError, match=message):
                kind(model, nn.MSELoss(), params, data)
        with pytest.raises(ValueError, match=message):
            kfacopt.JacobianLinearOperator(model, params, data, check_deterministic=False)
        args = model, nn.MSELoss(), ("0", "output", 0), data
        with pytest.raises(ValueError, match=message):
            kfacopt.experimental.ActivationHessianLinearOperator(*args)

    def test_no_data_for_jacobian_and_kfac(self):
        model = network()
        params = list(model.parameters())
        with pytest.raises(ValueError, match="no batches"):
            kfacopt.JacobianLinearOperator(model, params, [], check_deterministic=False)
        for loss_func, average in ((nn.MSELoss(), "batch"), (nn.MSELoss(reduction="sum"), None)):
            kfac = kfacopt.KFACLinearOperator(
                model, loss_func, params, [], check_deterministic=False, loss_average=average
            )
            with pytest.raises(ValueError, match="no batches"):
                kfac @ torch.ones(26)

    @each_risk
    def test_empty_batches(self, kind):
        model, loss_func, full = network(), nn.MSELoss(), batch()
        params, empty = list(model.parameters()), (torch.zeros(0, 3), torch.zeros(0, 2))
        expected = kind(model, loss_func, params, [full]) @ torch.ones(26)
        operator = kind(model, loss_func, params, [empty, full, empty])
        for _ in range(PRODUCTS):
            assert torch.allclose(operator @ torch.ones(26), expected, atol=TOLERANCE)
        with pytest.raises(ValueError, match="a mean over no terms"):
            kind(model, loss_func, params, [empty]) @ torch.ones(26)


class Settings:
    def __init__(self):
        self.scale, self.inner = 1.0, None


class Configured(nn.Module):
    """Reads settings from places of every kind."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.config = Settings()
        self.config.inner = Settings()
        self.mask, self.factor = np.ones(4), np.float32(1)
        self.tensors, self.table = [torch.ones(4)], {"long": [torch.ones(2000)]}
        self.unseen_layers = [nn.Linear(4, 4)]
        self.activation = functools.partial(nn.functional.elu, alpha=1.0)

    def forward(self, X):
        h = self.layer(X) * self.config.scale * self.config.inner.scale
        h = h * torch.from_numpy(self.mask) * float(self.factor) * self.tensors[0]
        h = self.activation(h * self.table["long"][0][1000])
        return self.last(self.unseen_layers[0](h))


def change(path, value):
    def apply(model):
        holder = model
        for name in path[:-1]:
            holder = getattr(holder, name)
        setattr(holder, path[-1], value)

    return apply


SETTINGS = {
    "an object's attribute": change(["config", "scale"], 2.0),
    "an object inside of it": change(["config", "inner", "scale"], 2.0),
    "another object": change(["config", "inner"], types.SimpleNamespace(scale=3.0)),
    "an array in place": lambda model: model.mask.__setitem__(0, 2.0),
    "another array": change(["mask"], np.arange(4.0)),
    "a number of NumPy": change(["factor"], np.float32(3)),
    "a listed tensor in place": lambda model: model.tensors[0].mul_(1.001),
    "another listed tensor": lambda model: model.tensors.__setitem__(0, torch.full((4,), 1.001)),
    "a long tensor in a dict": lambda model: model.table["long"][0].__setitem__(1000, 2.0),
    "a layer in a plain list": lambda model: model.unseen_layers[0].weight.data.mul_(2),
    "a bound argument": change(["activation"], functools.partial(nn.functional.elu, alpha=0.1)),
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_kept_terms_depend_on(change):
    torch.manual_seed(0)
    model, loss_func, data = Configured(), nn.MSELoss(), [batch(), batch(2)]
    params = list(model.parameters())
    operator = kfacopt.GGNLinearOperator(model, loss_func, params, data)
    estimator = kfacopt.HutchPPTraceEstimator(operator, basis_dim=operator.shape[0])
    identity = torch.eye(operator.shape[0])
    for _ in range(PRODUCTS):
        before = operator @ identity
    estimator.sample()
    change(model)
    expected = kfacopt.GGNLinearOperator(model, loss_func, params, data, cache_bytes=0) @ identity
    assert not torch.allclose(before, expected, rtol=1e-4)
    assert torch.allclose(operator @ identity, expected, atol=TOLERANCE)
    assert torch.allclose(estimator.sample(), expected.trace())


def test_terms_are_never_trusted_where_settings_are_too_many():
    torch.manual_seed(0)
    model, data = network(), [batch()]
    calls = []
    model.log = [[i] for i in range(100_000)]
    operator = kfacopt.GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
    model.register_forward_hook(lambda *_: calls.append(1))
    for count in range(1, 4):
        operator @ torch.ones(26)
        assert len(calls) == count


def test_hutchpp_after_changes_of_anything_but_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    for _ in range(3):
        model(3 * torch.randn(6, 3) + 1)
    loss_func, params = nn.MSELoss(), list(model.parameters())
    ggn = kfacopt.GGNLinearOperator(model.eval(), loss_func, params, [batch()])
    part = kfacopt.SubmatrixLinearOperator(ggn, range(9), range(9))
    damped = part + 0.1 * kfacopt.IdentityLinearOperator(part)
    options = {"scale": 0.1, "check_nan": False}
    inverse = kfacopt.NeumannInverseLinearOperator(ggn, num_terms=3, **options)
    changes = [
        model.train,
        lambda: setattr(loss_func, "reduction", "sum"),
        lambda: part.set_submatrix(range(3, 12), range(3, 12)),
        lambda: inverse.set_neumann_hyperparameters(num_terms=2, **options),
    ]
    matrices = {A: kfacopt.HutchPPTraceEstimator(A, A.shape[0]) for A in (ggn, part, damped)}
    matrices[inverse] = kfacopt.HutchPPTraceEstimator(inverse, inverse.shape[0])
    for change in [lambda: None, *changes]:
        change()
        for A, estimator in matrices.items():
            assert torch.allclose(estimator.sample(), (A @ torch.eye(A.shape[0])).trace())


class TestSubmatrix:
    def test_what_is_derived_from_it_follows(self):
        model = network()
        ggn = kfacopt.GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), [batch()])
        dense = ggn @ torch.eye(26)
        part = kfacopt.SubmatrixLinearOperator(ggn, [0, 1], [0, 1])
        derived = {"scaled": 2 * part, "sum": part + part, "negative": -2 * -part}
        transposed = {name: A.T for name, A in derived.items()}
        twice = part.T.T + part
        for rows, columns in ([[0, 1], [0, 1]], [[0, 1], [2, 3]], [[4, 5], [4, 5]]):
            part.set_submatrix(rows, columns)
            expected = 2 * dense[rows][:, columns]
            for name, A in derived.items():
                assert torch.allclose(A @ torch.eye(2), expected)
                assert torch.allclose(A.T @ torch.eye(2), expected.T)
                assert torch.allclose(transposed[name] @ torch.eye(2), expected.T)
                assert torch.allclose(torch.eye(2) @ A, expected)
            assert torch.allclose(twice @ torch.eye(2), expected)
            assert torch.allclose((part.T**2) @ torch.eye(2), ((expected / 2) @ (expected / 2)).T)

    def test_what_is_derived_from_it_does_not_fit_another_shape(self):
        part = kfacopt.SubmatrixLinearOperator(torch.rand(4, 4), [0, 1], [0, 1])
        inverse = kfacopt.NeumannInverseLinearOperator(part)
        for A in (part.T, 2 * part, part + part, part @ part, part**2, inverse, 3 * part.T):
            part.set_submatrix([0], [0, 1, 2])
            for x in (torch.ones(2), np.ones(2), np.ones(1), torch.ones(3)):
                with pytest.raises(ValueError, match=r"shape \(2, 2\) .* is \(1, 3\) now"):
                    A @ x
                with pytest.raises(ValueError, match=r"shape \(2, 2\) .* is \(1, 3\) now"):
                    x @ A
            part.set_submatrix([0, 1], [0, 1])


def test_jacobians_of_empty_batches():
    model, full = network(), batch()
    params, empty = list(model.parameters()), (torch.zeros(0, 3), torch.zeros(0, 2))
    expected = dense_jacobian(model, params, [full])
    J = kfacopt.JacobianLinearOperator(model, params, [empty, full, empty])
    JT = kfacopt.TransposedJacobianLinearOperator(model, params, [empty, full, empty])
    for _ in range(PRODUCTS):
        assert torch.allclose(J @ torch.eye(26), expected, atol=TOLERANCE)
        assert torch.allclose(JT @ torch.eye(12), expected.T, atol=TOLERANCE)


@pytest.mark.parametrize("error", [IndexError, AssertionError, KeyError, TypeError])
def test_models_that_refuse_a_single_datum(error):
    class Refusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, X):
            if len(X) == 1:
                raise error("several data, please")
            return X @ self.weight.T

    model, data = Refusing(), [batch()]
    params = list(model.parameters())
    J = kfacopt.JacobianLinearOperator(model, params, data)
    for _ in range(PRODUCTS + 1):
        assert torch.allclose(J @ torch.eye(6), dense_jacobian(model, params, data))


class Remembering(nn.Module):
    """Assigns a buffer and an attribute anew in each forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.seen = None

    def forward(self, X):
        Z = self.layer(X)
        self.mean = 0.9 * self.mean + 0.1 * Z.mean(0)
        self.seen, self.added = Z, Z
        return Z.tanh()


@each_risk
def test_what_a_forward_assigns_is_put_back(kind):
    torch.manual_seed(0)
    model, data = Remembering(), [batch(), batch()]
    buffer = model.mean
    operator = kind(model, nn.MSELoss(), list(model.parameters()), data)
    for columns in [1, operator.shape[1]] * PRODUCTS:
        operator @ torch.eye(operator.shape[1])[:, :columns]
    assert model.mean is buffer
    assert torch.equal(buffer, torch.zeros(2))
    assert model.seen is None
    assert not hasattr(model, "added")
    if kind is kfacopt.HessianLinearOperator:
        expected = dense_hessian(model, nn.MSELoss(), list(model.parameters()), data)
        assert torch.allclose(operator @ torch.eye(8), expected, atol=TOLERANCE)


class Counting(nn.Module):
    """Counts its calls and keeps a list of what it saw, as models that log do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls, self.log, self.names = 0, [], {"a": 1}

    def forward(self, X):
        self.calls += 1
        self.log.append(len(X))
        self.names[f"call {self.calls}"] = self.calls
        self.latest = self.calls
        return self.layer(X)


@each_risk
def test_counters_and_lists_are_put_back(kind):
    model, data = Counting(), [batch(), batch()]
    log = model.log
    operator = kind(model, nn.MSELoss(), list(model.parameters()), data)
    operator @ torch.eye(operator.shape[1])
    assert (model.calls, model.log, model.names) == (0, [], {"a": 1})
    assert model.log is log
    assert not hasattr(model, "latest")


@pytest.mark.parametrize("lr", [0.1, "auto"])
def test_a_step_that_is_evaluated_again_leaves_counters_alone(lr):
    model, (X, y) = Counting(), batch()
    optimizer = kfacopt.KFACOptimizer(model.parameters(), lr=lr)
    for i in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), y).backward()
        optimizer.step()
        assert (model.calls, model.latest, len(model.log)) == (i + 1,) * 3
    if lr != "auto":
        assert optimizer.statistics()["gain_ratio"] > 0


class Widening(nn.Module):
    """Predicts in float64, whatever dtype the parameters have."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, X):
        return self.model(X).double()


@each_risk
def test_predictions_of_another_dtype_than_the_parameters(kind):
    model, (X, y) = network().float(), batch()
    wide, params = Widening(model), list(model.parameters())
    expected = kind(model, nn.MSELoss(), params, [(X.float(), y.float())]) @ torch.eye(26).float()
    operator = kind(wide, nn.MSELoss(), params, [(X.float(), y)])
    if kind is not kfacopt.FisherMCLinearOperator:  # draws other numbers in another dtype
        for columns in [1, 26] * PRODUCTS:
            product = operator @ torch.eye(26).float()[:, :columns]
            assert product.dtype == torch.float32
            assert torch.allclose(product, expected[:, :columns], atol=1e-5)
    else:
        ggn = kfacopt.GGNLinearOperator(wide, nn.MSELoss(), params, [(X.float(), y)])
        samples = kind(wide, nn.MSELoss(), params, [(X.float(), y)], mc_samples=4000)
        for _ in range(PRODUCTS):
            error = (samples - ggn) @ torch.eye(26).float()
            assert error.norm() < 0.1 * (ggn @ torch.eye(26).float()).norm()
