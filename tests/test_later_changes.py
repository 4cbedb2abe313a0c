"""What happens to data, parameters and model after an operator was made, or inside a forward."""

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
