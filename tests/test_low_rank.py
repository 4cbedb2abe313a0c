"""Wide sides as a low rank plus a diagonal, against dense matrices made of all rows.

The oracle forms A from every row, the projection by a pseudo-inverse, and inverses by solving.
"""

import copy
import math

import pytest
import torch
from kfac_cases import to_dense
from resumption import assert_goes_on
from torch import nn
from torch.nn import functional as F

import kfacopt
from kfacopt import EKFACLinearOperator, KFACLinearOperator, KFACOptimizer
from kfacopt.linalg import low_rank
from kfacopt.linalg.kronecker import DecompositionError, KroneckerProduct
from kfacopt.linalg.low_rank import LowRankFactor, rank_beside, signs, sketch, sketch_of

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.usefixtures("float64", "small_ranks")


@pytest.fixture
def small_ranks(monkeypatch):
    """Sides of a few entries have a rank, too."""
    monkeypatch.setattr(low_rank, "LEAST_RANK", 1)


TYPE2 = {"fisher_type": "type-2", "wide_factor": "low_rank"}
STEP = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "damping": 1e-2, **TYPE2}


def expected(A, rank):
    """Return Y (Ωᵀ Y)⁺ Yᵀ and what it leaves of A's diagonal, of A `[d, d]`."""
    omega = signs(len(A), rank, A.dtype, A.device)
    Y = A @ omega
    projected = Y @ torch.linalg.pinv(omega.T @ Y, rtol=1e-13, hermitian=True) @ Y.T
    return projected + torch.diag((A - projected).diagonal())


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    side=st.integers(4, 40),
    rank=st.integers(1, 10),
    rows=st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_it_is_the_projection_on_the_sketch_with_the_diagonal_of_the_factor(side, rank, rows, seed):
    torch.manual_seed(seed)
    rank = min(rank, side // 2)
    x = torch.randn(2, rows, side) * torch.rand(side) + 1
    A = x.mT @ x
    factor = LowRankFactor(sketch(x, rank))
    U, rest = factor.parts()
    for a, got in zip(A, factor.dense(), strict=True):
        torch.testing.assert_close(got, expected(a, rank), atol=1e-6 * float(a.trace()), rtol=0)
    torch.testing.assert_close(factor.dense().diagonal(dim1=1, dim2=2), A.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(factor.trace(), A.diagonal(dim1=1, dim2=2).sum(1))
    traces = A.diagonal(dim1=1, dim2=2).sum(1)
    assert (torch.linalg.eigvalsh(A - U @ U.mT) > -1e-10 * traces.unsqueeze(1)).all()
    assert (rest >= 0).all()
    torch.testing.assert_close(sketch_of(A, rank), factor.packed)


def test_a_matrix_of_low_rank_is_kept_as_it_is():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 20)
    torch.testing.assert_close(LowRankFactor(sketch(x, 5)).dense(), x.mT @ x, atol=1e-7, rtol=0)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(log_damping=st.floats(-6, 1), seed=st.integers(0, 9), rank=st.integers(1, 8))
def test_its_inverse_and_products_are_the_dense_ones(log_damping, seed, rank):
    torch.manual_seed(seed)
    d, d_out = 16, 3
    x, X = torch.randn(2, 40, d) + 1, torch.randn(2, d_out, d)
    factor, damping = LowRankFactor(sketch(x, rank)), torch.full((2,), 10**log_damping)
    want = torch.linalg.inv(factor.dense() + damping[:, None, None] * torch.eye(d))
    inverse = factor.damped_inverse(damping)
    torch.testing.assert_close(inverse.dense(), want)
    torch.testing.assert_close(inverse.trace(), want.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(inverse.right(X), X @ want)
    torch.testing.assert_close(inverse.left(X.mT), want @ X.mT)
    torch.testing.assert_close(factor.right(X), X @ factor.dense())
    torch.testing.assert_close(factor.left(X.mT), factor.dense() @ X.mT)
    other = torch.randn(2, d_out, d_out)
    columns = [X[..., :-1], X[..., -1:]]
    right = KroneckerProduct(other, inverse).apply_columns(columns)
    torch.testing.assert_close(torch.cat(right, -1), other @ X @ want)
    left = KroneckerProduct(inverse, other).apply_columns([X.mT[..., :1], X.mT[..., 1:]])
    torch.testing.assert_close(torch.cat(left, -1), want @ X.mT @ other)


@pytest.mark.parametrize("spread", [1, 1e3, 1e5])
def test_in_float32_the_inverse_is_positive_and_near_the_dense_one(spread):
    torch.manual_seed(0)
    d = 256
    scales = torch.logspace(0, -math.log10(spread), d)
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    x = ((torch.randn(1, 500, d) * scales) @ basis + 0.5).float()
    factor, damping = LowRankFactor(sketch(x, 32) / 500), torch.tensor([1e-3])
    inverse = factor.damped_inverse(damping).dense().double()
    want = torch.linalg.inv(factor.dense().double() + 1e-3 * torch.eye(d))
    assert (inverse - want).norm() < 1e-3 * want.norm()
    assert torch.linalg.eigvalsh(inverse).min() > 0


@pytest.mark.parametrize("mean", [1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("damping", [1e3, 1.0, 1e-2])
def test_a_mean_far_above_the_damping_leaves_the_inverse_positive(mean, damping):
    torch.manual_seed(0)
    x = (mean + torch.randn(1, 128, 512)).float()
    inverse = LowRankFactor(sketch(x, 64) / 128).damped_inverse(torch.tensor([damping]))
    assert torch.linalg.eigvalsh(inverse.dense().double()).min() > 0
    X = x[:, :3].to(inverse.dtype)
    assert ((inverse.right(X) * X).sum(-1) > 0).all()


@pytest.mark.parametrize("mean", [1e2, 1e3])
def test_inputs_far_from_zero_are_descended_and_resumed(mean):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    W, models, optimizers = torch.randn(256, 10) / 16, [nn.Linear(256, 10)], []

    def step(model, optimizer, seed):
        x = mean + torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), (x - mean) @ W)
        loss.backward()
        optimizer.step()
        return loss.item()

    optimizers.append(KFACOptimizer(models[0].parameters(), **TYPE2))
    losses = [step(models[0], optimizers[0], i) for i in range(40)]
    assert max(losses) < 1.1 * losses[0]
    assert optimizers[0].state[models[0].weight]["input_inverse"].dtype == torch.float64
    models.append(copy.deepcopy(models[0]))
    optimizers.append(KFACOptimizer(models[1].parameters(), **TYPE2))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        for i in range(40, 70):
            step(model, optimizer, i)
    assert torch.equal(models[0].weight, models[1].weight)
    state = copy.deepcopy(optimizers[0].state_dict())
    rounded = state["state"][0]["input_inverse"].float()  # as a tool may that copies into tensors
    state["state"][0]["input_inverse"] = rounded
    optimizers[1].load_state_dict(state)
    assert "input_inverse" not in optimizers[1].state[models[1].weight]
    for i in range(70, 90):
        assert step(models[1], optimizers[1], i) < losses[0]
    assert optimizers[1].state[models[1].weight]["input_inverse"].dtype == torch.float64


def test_sketches_that_round_off_makes_indefinite_are_inverted():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 64) * 100  # a rank below that of the sketch
    packed = sketch(x, 16)
    packed = packed + 1e-5 * packed.abs().max() * torch.randn_like(packed)
    inverse = LowRankFactor(packed).damped_inverse(torch.tensor([1.0]))
    assert torch.linalg.eigvalsh(inverse.dense()).min() > 0


def test_what_is_not_finite_or_singular_is_an_error():
    packed = sketch(torch.randn(1, 9, 16), 2)
    packed[0, 3, 1] = torch.nan
    with pytest.raises(DecompositionError, match="NaN"):
        LowRankFactor(packed).damped_inverse(torch.tensor([1.0]))
    with pytest.raises(DecompositionError, match="raise the damping"):
        LowRankFactor(torch.zeros(1, 16, 3)).damped_inverse(torch.tensor([0.0]))


class Product(nn.Module):
    """A matrix that no module of torch multiplies, applied to sequences."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(20, 4))

    def forward(self, x):
        return x @ self.W


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.back = nn.Linear(4, 20), nn.Linear(20, 4, bias=False)

    def forward(self, x):
        return self.back(self.layer(x).tanh())


def images(channels):
    return torch.randn(6, channels, 3, 3) + 0.3


MODELS = {
    "wide outputs": lambda: (nn.Linear(5, 24), torch.randn(9, 5) + 0.3),
    "wide inputs": lambda: (nn.Linear(24, 5), torch.randn(9, 24) + 0.3),
    "without bias": lambda: (nn.Linear(24, 5, bias=False), torch.randn(9, 24)),
    "convolution": lambda: (nn.Conv2d(24, 5, 1), images(24)),
    "kernels": lambda: (nn.Conv2d(3, 5, 3, padding=1), images(3)),
    "groups": lambda: (nn.Conv2d(24, 6, 1, groups=2), images(24)),
    "transposed": lambda: (nn.ConvTranspose2d(24, 5, 1), images(24)),
    "sequences": lambda: (Sequences(), torch.randn(5, 3, 4)),
}


def example(name):
    torch.manual_seed(0)
    module, x = MODELS[name]()
    model = nn.Sequential(module, nn.Flatten())
    return model, x, torch.randn_like(model(x))


def of_groups(factor):
    return factor if factor.ndim == 3 else factor.unsqueeze(0)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_of_layers_are_projections_of_the_whole_ones(name, kfac_approx):
    model, x, y = example(name)
    options = {"separate_weight_and_bias": False, "kfac_approx": kfac_approx, **TYPE2}
    arguments = (model, nn.MSELoss(), list(model.parameters()), [(x, y)])
    low = KFACLinearOperator(*arguments, **options)
    whole = KFACLinearOperator(*arguments, **{**options, "wide_factor": "full"})
    wide = 0
    for layer in low.layer_names:
        sides = [[of_groups(f) for f in K.factors(layer)] for K in (low, whole)]
        widths = [factor.shape[-1] for factor in sides[1]]
        for i, (got, full) in enumerate(zip(*sides, strict=True)):
            rank = rank_beside(widths[i], widths[1 - i])
            wide += rank > 0
            for g, f in zip(got, full, strict=True):
                if rank == 0:
                    torch.testing.assert_close(g, f)
                else:
                    want = expected(f, rank)
                    torch.testing.assert_close(g, want, atol=1e-6 * float(f.trace()), rtol=0)
    assert wide


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_dense_one(name):
    model, x, y = example(name)
    optimizer = KFACOptimizer(model.parameters(), **STEP)
    before = [p.detach().clone() for p in model.parameters()]
    F.mse_loss(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert any("rank" in row.curvature for row in optimizer.describe().parameters)
    moves = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    root, identity = STEP["damping"] ** 0.5, torch.eye
    for block in optimizer._curvature.blocks:
        own = [i for i, p in enumerate(model.parameters()) if any(p is q for q in block.parameters)]
        grads, moved = (block.to_matrix([values[i] for i in own]) for values in (gradients, moves))
        A, G = map(of_groups, optimizer.factors(block.anchor))
        for a, g, grad, move in zip(A, G, grads, moved, strict=True):
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            inverse_a = torch.linalg.inv(a + pi * root * identity(len(a)))
            inverse_g = torch.linalg.inv(g + root / pi * identity(len(g)))
            torch.testing.assert_close(move, inverse_g @ grad @ inverse_a)


def test_matrices_without_a_module_are_kept_so():
    torch.manual_seed(0)
    model = Product()
    optimizer = KFACOptimizer(model.parameters(), **STEP)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(8, 3, 20)) - 1).square().mean().backward()
        optimizer.step()
    (row,) = optimizer.describe().parameters
    assert row.curvature == "Kronecker 4 (rank 1 + diagonal) × 20 (rank 1 + diagonal)"


def test_running_factors_are_projections_of_the_average():
    torch.manual_seed(0)
    model = nn.Linear(24, 3)
    options = {"ema_decay": 0.5, "factor_update_interval": 1, **TYPE2}
    optimizer = KFACOptimizer(model.parameters(), **options)
    total, weight = 0.0, 0.0
    for i in range(4):
        x = torch.randn(6, 24) + i
        rows = torch.cat([x, torch.ones(6, 1)], 1)
        total, weight = 0.5 * total + rows.T @ rows / 6, 0.5 * weight + 1
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    got, A = optimizer.factors("").input_factor, total / weight
    torch.testing.assert_close(
        got, expected(A, rank_beside(25, 3)), atol=1e-6 * float(A.trace()), rtol=0
    )


def train(model, optimizer, steps):
    for i in range(steps):
        optimizer.zero_grad()
        (model(torch.linspace(-1, 1, 8 * 5).reshape(8, 5)) - (1.0 + i)).square().mean().backward()
        optimizer.step()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 3))


LOW_PRECISION = {"factor_dtype": torch.bfloat16, "inverse_dtype": torch.bfloat16}


@pytest.mark.parametrize("more", [{}, LOW_PRECISION, {"lr": "auto"}], ids=["", "half", "auto"])
def test_a_run_goes_on_from_its_saved_state(more):
    options = {"factor_update_interval": 2, "inverse_update_interval": 3, **TYPE2, **more}
    model = network()
    optimizer = assert_goes_on(model, options, train)
    if more == LOW_PRECISION:
        state = optimizer.state[model[0].weight]
        assert state["grad_output_factor"].dtype == torch.float64
        assert state["grad_output_inverse"].dtype == torch.float64


def test_a_state_of_whole_factors_is_loaded_and_the_reverse_is_refused_by_name():
    model = network()
    intervals = {"factor_update_interval": 1, "inverse_update_interval": 4}
    whole = KFACOptimizer(model.parameters(), **intervals, wide_factor="full")
    train(model, whole, 3)
    A = whole.factors("2").input_factor
    low = KFACOptimizer(model.parameters(), **intervals, **TYPE2)
    low.load_state_dict(whole.state_dict())
    got = low.factors("2").input_factor
    rank = rank_beside(25, 3)
    torch.testing.assert_close(got, expected(A, rank), atol=1e-6 * float(A.trace()), rtol=0)
    train(model, low, 6)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(ValueError, match="wide_factor"):
        KFACOptimizer(model.parameters(), wide_factor="full").load_state_dict(low.state_dict())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grad_output_factor", lambda x: x * torch.cat([-torch.ones(1), torch.ones(1)])),
        ("grad_output_factor", lambda x: x * torch.cat([1000 * torch.ones(1), torch.ones(1)])),
        ("grad_output_factor", lambda x: -x),
        ("grad_output_inverse", lambda x: x * torch.cat([3 * torch.ones(1), torch.ones(1)])),
    ],
)
def test_a_state_that_is_of_no_positive_matrix_is_refused_by_name(name, change):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), **TYPE2)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"][0][name].shape[-1] == 2
    state["state"][0][name] = change(state["state"][0][name])
    with pytest.raises(ValueError, match=f"{name}.*low rank|low rank.*{name}"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_sketch_in_less_precision_is_no_more_than_the_factor(mean):
    torch.manual_seed(0)
    x = torch.randn(1, 20, 256) + mean
    factor = LowRankFactor(sketch(x, 64).float().double())
    A = x.mT @ x
    trace = float(A.diagonal(dim1=1, dim2=2).sum())
    U, _ = factor.parts()
    assert torch.linalg.eigvalsh(A - U @ U.mT).min() > -1e-4 * trace
    torch.testing.assert_close(factor.trace(), torch.tensor([trace]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_operators_multiply_with_inverses_of_inputs_far_from_zero(mean):
    torch.manual_seed(0)
    model = nn.Linear(256, 10).float()
    x, y = mean + torch.randn(64, 256).float(), torch.randn(64, 10).float()
    slopes = []
    for dtype in (torch.float32, torch.float64):
        own = copy.deepcopy(model).to(dtype)
        params, data = list(own.parameters()), [(x.to(dtype), y.to(dtype))]
        K = KFACLinearOperator(own, nn.MSELoss(), params, data, **TYPE2)
        F.mse_loss(own(data[0][0]), data[0][1]).backward()
        gradient = [p.grad for p in params]
        pairs = zip(gradient, K.inverse(1e-5) @ gradient, strict=True)
        slopes.append(sum(float((g.double() * s.double()).sum()) for g, s in pairs))
    assert slopes[0] == pytest.approx(slopes[1], rel=0.1)


def test_wide_sides_are_kept_so_by_default_unless_eigenbases_are_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 600), nn.Tanh(), nn.Linear(600, 511))
    for options, wide in (({}, True), ({"damping_method": "exact"}, False)):
        optimizer = KFACOptimizer(model.parameters(), **options)
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        rows = {row.parameter: row.curvature for row in optimizer.describe().parameters}
        ranks = [f" (rank {r} + diagonal)" if wide else "" for r in (600 // 16, 601 // 8)]
        assert rows["0.weight"] == f"Kronecker 600{ranks[0]} × 5"
        assert rows["2.weight"] == f"Kronecker 511 × 601{ranks[1]}"
    for options in ({"damping_method": "exact"}, {"preconditioner": "ekfac"}):
        with pytest.raises(ValueError, match="wide_factor"):
            KFACOptimizer(model.parameters(), wide_factor="low_rank", **options)


def test_a_side_above_max_factor_dim_is_a_diagonal():
    model = network()
    optimizer = KFACOptimizer(model.parameters(), max_factor_dim=20, **TYPE2)
    train(model, optimizer, 3)
    rows = {row.parameter: row.curvature for row in optimizer.describe().parameters}
    assert rows["0.weight"] == "Kronecker 24 (diagonal) × 6 (rank 1 + diagonal)"
    params = list(model.parameters())
    data = [(torch.randn(8, 5), torch.randn(8, 3))]
    K = KFACLinearOperator(model, nn.MSELoss(), params, data, max_factor_dim=20, **TYPE2)
    assert K.factors("0").grad_output_factor.shape == (24,)


def test_a_bias_may_be_frozen_and_trained_again():
    model = network()
    optimizer = KFACOptimizer(model.parameters(), **TYPE2)
    for trained in (True, False, True):
        model[2].bias.requires_grad_(trained)
        before = model[2].bias.detach().clone()
        train(model, optimizer, 2)
        assert torch.equal(model[2].bias, before) != trained
        assert 1 < optimizer.statistics()["2/condition"] < float("inf")


def test_operators_have_traces_and_determinants_of_the_form():
    model = network()
    data = [(torch.randn(30, 5), torch.randn(30, 3))]
    arguments = (model, nn.MSELoss(), list(model.parameters()), data)
    K = KFACLinearOperator(*arguments, **TYPE2)
    dense = to_dense(K)
    torch.testing.assert_close(K.trace(), dense.trace())
    torch.testing.assert_close(K.frobenius_norm(), dense.norm())
    inverse = K.inverse(1e-2)
    dense = to_dense(inverse)
    torch.testing.assert_close(inverse.trace(), dense.trace())
    torch.testing.assert_close(inverse.logdet(), torch.linalg.slogdet(dense).logabsdet)
    exact = K.inverse(1e-2, method="exact")
    want = torch.linalg.inv(to_dense(K) + 1e-2 * torch.eye(len(dense)))
    torch.testing.assert_close(to_dense(exact), want)
    E = EKFACLinearOperator(*arguments, **TYPE2)
    whole = KFACLinearOperator(*arguments, fisher_type="type-2")
    assert torch.linalg.eigvalsh(to_dense(E)).min() > -1e-9
    torch.testing.assert_close(E.trace(), to_dense(E).trace())
    assert (to_dense(whole) - to_dense(K)).norm() < 0.9 * to_dense(whole).norm()


def test_diagnose_measures_the_form_that_the_optimizer_has():
    torch.manual_seed(0)
    model = network()
    optimizer = KFACOptimizer(model.parameters(), lr=0.0, ema_decay=0.0, **TYPE2)
    x, y = torch.randn(40, 5), torch.randn(40, 3)
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    report = kfacopt.diagnose(model, nn.MSELoss(), [(x, y)], optimizer=optimizer)
    assert str(report)
