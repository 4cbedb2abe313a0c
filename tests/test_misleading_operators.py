"""Input to the exact operators that once gave wrong numbers without an error; none does now."""

import copy

import pytest
import torch
from dense_curvature import ggn as dense_ggn
from dense_curvature import hessian as dense_hessian
from dense_curvature import jacobian as dense_jacobian
from torch import nn
from torch.nn import functional as F

import kfacopt
import kfacopt.experimental
from kfacopt.linalg.structured import DenseLinearOperator

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-9
PRODUCTS = 3  # the first measures, the second keeps, the third uses what was kept


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(targets="real"):
    X = torch.rand(6, 3)
    return X, (torch.rand(6, 2) if targets == "real" else torch.randint(2, (6,)))


def assert_matrix(operator, expected):
    identity = torch.eye(operator.shape[1])
    for _ in range(PRODUCTS):
        for columns in (1, 7, operator.shape[1]):
            got, want = operator @ identity[:, :columns], expected[:, :columns]
            assert torch.allclose(got, want, atol=TOLERANCE)


def test_a_loss_that_sees_the_parameters():
    model, data = network(), [batch()]
    params = list(model.parameters())

    def loss_func(z, y):
        return ((z - y) ** 2).sum() + sum((p**3).sum() for p in params)

    operator = kfacopt.HessianLinearOperator(model, loss_func, params, data)
    assert_matrix(operator, dense_hessian(model, loss_func, params, data))


class Aliased(nn.Module):
    """Reaches a parameter past its name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.alias = [self.layer.weight]

    def forward(self, X):
        return F.linear(self.layer(X).tanh(), self.alias[0])


def test_a_parameter_reached_past_its_name():
    torch.manual_seed(1)
    model, data = Aliased(), [(torch.rand(5, 3), torch.rand(5, 3))]
    params, loss_func = list(model.parameters()), nn.MSELoss()
    jacobian = kfacopt.JacobianLinearOperator(model, params, data)
    assert_matrix(jacobian, dense_jacobian(model, params, data))
    ggn = kfacopt.GGNLinearOperator(model, loss_func, params, data)
    assert_matrix(ggn, dense_ggn(model, loss_func, params, data))
    hessian = kfacopt.HessianLinearOperator(model, loss_func, params, data)
    assert_matrix(hessian, dense_hessian(model, loss_func, params, data))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_targets_that_would_be_broadcast_are_refused(reduction):
    model, data = nn.Linear(3, 1), [(torch.rand(6, 3), torch.rand(6))]
    params, loss_func = list(model.parameters()), nn.MSELoss(reduction=reduction)
    for kind in (
        kfacopt.HessianLinearOperator,
        kfacopt.GGNLinearOperator,
        kfacopt.EFLinearOperator,
        kfacopt.FisherMCLinearOperator,
        kfacopt.KFACLinearOperator,
    ):
        average = {"loss_average": None} if kind is kfacopt.KFACLinearOperator else {}
        options = average if reduction == "sum" else {}
        with pytest.raises(ValueError, match=r"shape \(6, 1\) and the target \(6,\)"):
            kind(model, loss_func, params, data, **options) @ torch.ones(4)
    args = model, loss_func, ("", "output", 0), data
    with pytest.raises(ValueError, match=r"shape \(6, 1\) and the target \(6,\)"):
        kfacopt.experimental.ActivationHessianLinearOperator(*args) @ torch.ones(6)


def test_inference_mode():
    model, data = network(), [batch()]
    params, loss_func = list(model.parameters()), nn.MSELoss()
    hessian = kfacopt.HessianLinearOperator(model, loss_func, params, data)
    expected = dense_hessian(model, loss_func, params, data)
    vector = torch.ones(hessian.shape[1])
    with torch.inference_mode():
        product = hessian @ vector
    assert torch.allclose(product, expected @ vector, atol=TOLERANCE)


def through_data(X, y, model):
    X.data.mul_(2)


def through_numpy(X, y, model):
    X.numpy()[:] *= 2


def through_targets(X, y, model):
    y.data.mul_(3)


def through_function(X, y, model):
    model[1].act = torch.sin


class Activation(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = torch.tanh

    def forward(self, X):
        return self.act(X)


def through_hook(X, y, model):
    model[0].register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = [through_data, through_numpy, through_targets, through_function, through_hook]


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
@pytest.mark.parametrize("kind", [kfacopt.GGNLinearOperator, kfacopt.EFLinearOperator])
def test_kept_graphs_notice_changes(kind, change):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), Activation(), nn.Linear(4, 2))
    X, y = batch()
    params, loss_func = list(model.parameters()), nn.MSELoss()
    operator = kind(model, loss_func, params, [(X, y)])
    vector = torch.ones(operator.shape[1])
    for _ in range(PRODUCTS):
        operator @ vector
    change(X, y, model)
    fresh = kind(model, loss_func, params, [(X, y)])
    assert torch.allclose(operator @ vector, fresh @ vector, atol=TOLERANCE)


def test_the_reduction_is_read_at_each_product():
    model, data = network(), [batch(), batch()]
    params, loss_func = list(model.parameters()), nn.MSELoss(reduction="sum")
    operator = kfacopt.GGNLinearOperator(model, loss_func, params, data)
    vector = torch.ones(operator.shape[1])
    operator @ vector
    loss_func.reduction = "mean"
    fresh = kfacopt.GGNLinearOperator(model, copy.copy(loss_func), params, data)
    assert torch.allclose(operator @ vector, fresh @ vector, atol=TOLERANCE)


def test_subclasses_that_change_a_loss_have_not_its_likelihood():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input, target):
            loss = F.cross_entropy(input, target, reduction="none")
            return ((1 - (-loss).exp()) ** 2 * loss).mean()

    model, data = network(), [batch("labels")]
    params = list(model.parameters())
    for kind in (kfacopt.FisherMCLinearOperator, kfacopt.KFACLinearOperator):
        vector = torch.ones(sum(p.numel() for p in params))
        own, plain = (kind(model, loss, params, data) for loss in (Focal(), nn.CrossEntropyLoss()))
        assert not torch.allclose(own @ vector, plain @ vector, rtol=0.1)
    hessian = kfacopt.HessianLinearOperator(model, Focal(), params, data)
    assert_matrix(hessian, dense_hessian(model, Focal(), params, data))


def test_a_single_datum_without_an_axis():
    model, x, y = nn.Linear(3, 3), torch.rand(3), torch.tensor(1)
    params, loss_func = list(model.parameters()), nn.CrossEntropyLoss()
    gradient = torch.autograd.grad(loss_func(model(x), y), params)
    g = torch.cat([t.flatten() for t in gradient])
    ef = kfacopt.EFLinearOperator(model, loss_func, params, [(x, y)])
    assert torch.allclose(ef @ torch.eye(12), torch.outer(g, g), atol=TOLERANCE)
    fisher = kfacopt.FisherMCLinearOperator(model, loss_func, params, [(x, y)], mc_samples=4000)
    ggn = kfacopt.GGNLinearOperator(model, loss_func, params, [(x, y)])
    error = (fisher - ggn) @ torch.eye(12)
    assert error.norm() < 0.1 * (ggn @ torch.eye(12)).norm()


class Padded(nn.Module):
    """Sums embeddings of which row 8 is padding."""

    def __init__(self, kind):
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(9, 3)), nn.Linear(3, 2)
        if kind is not None:
            self.table = None
            self.layer_of_rows = kind(9, 3, padding_idx=8)
            nn.init.normal_(self.layer_of_rows.weight)

    def forward(self, X):
        if self.table is None:
            rows = self.layer_of_rows(X)
        else:
            rows = F.embedding(X, self.table, padding_idx=-1)
        return self.layer(rows.sum(1).tanh())


class DoubledTangent(torch.autograd.Function):
    """The identity, with a wrong rule in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


class Misled(nn.Module):
    def forward(self, X):
        return DoubledTangent.apply(X).tanh()


class TestLayers:
    """Layers of which torch has a wrong rule for one of the ways to a derivative."""

    @pytest.mark.parametrize("cache_bytes", [0, 2**30])
    def test_embeddings_with_a_padding_index(self, cache_bytes):
        """The row has no gradient, in forward mode as in a backward pass."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2))
        data = [(torch.tensor([[0, 1], [2, 0], [4, 3]]), torch.tensor([0, 1, 1]))]
        params, loss_func = list(model.parameters()), nn.CrossEntropyLoss()
        expected = dense_jacobian(model, params, data)
        assert not expected[:, :3].any()
        options = {"cache_bytes": cache_bytes}
        assert_matrix(kfacopt.JacobianLinearOperator(model, params, data, **options), expected)
        for kind, oracle in (
            (kfacopt.HessianLinearOperator, dense_hessian),
            (kfacopt.GGNLinearOperator, dense_ggn),
        ):
            operator = kind(model, loss_func, params, data, **options)
            assert_matrix(operator, oracle(model, loss_func, params, data))
        summed = nn.CrossEntropyLoss(reduction="sum")
        ef = kfacopt.EFLinearOperator(model, summed, params, data, **options)
        z = model(data[0][0]).detach().requires_grad_()
        (u,) = torch.autograd.grad(summed(z, data[0][1]), z)
        G = (u.reshape(-1, 1) * expected).reshape(3, 2, -1).sum(1)
        assert_matrix(ef, G.T @ G)

    @pytest.mark.parametrize("kind", [nn.Embedding, None], ids=["layer", "function"])
    def test_padding_that_the_first_vectors_or_batches_do_not_meet(self, kind):
        model = Padded(kind)
        params = list(model.parameters())
        size = sum(p.numel() for p in params)
        first, second = torch.tensor([[1, 2], [3, 1]]), torch.tensor([[8, 2], [8, 4], [1, 8]])
        data = [(first, torch.tensor([0, 1])), (second, torch.tensor([1, 0, 1]))]
        J = kfacopt.JacobianLinearOperator(model, params, data, cache_bytes=0)
        ggn = kfacopt.GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data, cache_bytes=0)
        hessian = kfacopt.HessianLinearOperator(
            model, nn.CrossEntropyLoss(), params, data, cache_bytes=0
        )
        for operator in (J, ggn, hessian):
            operator @ torch.zeros(size, 16)
            operator @ torch.eye(size)[:, 24:]  # all but the first weights
        assert_matrix(J, dense_jacobian(model, params, data))
        assert_matrix(ggn, dense_ggn(model, nn.CrossEntropyLoss(), params, data))
        assert_matrix(hessian, dense_hessian(model, nn.CrossEntropyLoss(), params, data))

    def test_a_wrong_rule_that_the_first_vectors_do_not_meet(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), Misled(), nn.Linear(4, 2))
        params, data = list(model.parameters()), [batch()]
        J = kfacopt.JacobianLinearOperator(model, params, data, cache_bytes=0)
        J @ torch.eye(26)[:, 16:]  # the last layer's parameters
        assert_matrix(J, dense_jacobian(model, params, data))

    def test_prelu(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
        params, data = list(model.parameters()), [batch()]
        expected = dense_jacobian(model, params, data)
        assert_matrix(kfacopt.JacobianLinearOperator(model, params, data), expected)
        ggn = kfacopt.GGNLinearOperator(model, nn.MSELoss(), params, data)
        assert_matrix(ggn, dense_ggn(model, nn.MSELoss(), params, data))


class WeaklyMixing(nn.Module):
    """Adds a small part of the batch's mean."""

    def __init__(self, share):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.share = share

    def forward(self, X):
        h = self.norm(self.first(X)).tanh()
        return self.last(h + self.share * h.mean(0))


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4, 1e-5, 0.0])
@pytest.mark.parametrize("kind", [kfacopt.GGNLinearOperator, kfacopt.EFLinearOperator])
def test_data_that_are_weakly_mixed_in_float32(kind, share):
    """Rows of single data are not used unless they are right to round-off."""
    exact_model, X, y = WeaklyMixing(share), torch.randn(30, 6), torch.randint(3, (30,))
    model, loss_func = copy.deepcopy(exact_model).float(), nn.CrossEntropyLoss()
    operator = kind(model, loss_func, list(model.parameters()), [(X.float(), y)])
    exact = kind(exact_model, loss_func, list(exact_model.parameters()), [(X, y)], cache_bytes=0)
    identity = torch.eye(operator.shape[1])
    expected = exact @ identity
    for _ in range(PRODUCTS):
        error = (operator @ identity.float()).double() - expected
        assert error.abs().max() < 1e-5 * expected.abs().max()


def test_predictions_that_are_not_finite_pass_the_check_and_show():
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    loss_func, data = nn.CrossEntropyLoss(), [batch("labels")]
    hessian = kfacopt.HessianLinearOperator(model, loss_func, list(model.parameters()), data)
    assert bool((hessian @ torch.ones(8)).isnan().any())


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.tensor(1.5)), nn.Linear(3, 2)

    def forward(self, X):
        return self.layer(X) * self.scale


def test_parameters_and_predictions_without_axes():
    model, data = Temperature(), [batch("labels")]
    params, loss_func = list(model.parameters()), nn.CrossEntropyLoss()
    for kind, oracle in (
        (kfacopt.HessianLinearOperator, dense_hessian),
        (kfacopt.GGNLinearOperator, dense_ggn),
    ):
        operator = kind(model, loss_func, params, data)
        assert_matrix(operator, oracle(model, loss_func, params, data))
    jacobian = kfacopt.JacobianLinearOperator(model, params, data)
    assert (jacobian @ torch.zeros(jacobian.shape[1], 0)).shape == (12, 0)
    assert_matrix(jacobian.T, dense_jacobian(model, params, data).T)


@pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e19])
def test_conjugate_gradients_at_any_scale(scale):
    matrix = torch.diag(torch.linspace(1, 2, 6)).float()
    inverse = kfacopt.CGInverseLinearOperator(DenseLinearOperator(matrix))
    b = torch.arange(1.0, 7.0).float() * scale
    assert torch.allclose((inverse @ b) / scale, (b / matrix.diagonal()) / scale, rtol=1e-4)
