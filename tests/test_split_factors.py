"""A of convolutions by channels and positions: what it is, against matrices made of all patches.

The oracle forms every patch, its mean, and the covariance of the channels at each position.
"""

import pytest
import torch
from dense import dense_ggn
from kfac_cases import to_dense
from resumption import assert_goes_on
from test_convolutions import drawn, ordinary, transposed
from torch import nn

from kfacopt import EKFACLinearOperator, KFACLinearOperator, KFACOptimizer
from kfacopt.kfac.layers import find_layers, split
from kfacopt.linalg.kronecker import KroneckerProduct
from kfacopt.linalg.split_factors import SplitFactor, SplitInverse, packed_rows
from kfacopt.linalg.split_spectrum import spectrum_ends

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
]

TYPE2 = {"fisher_type": "type-2", "conv_factor": "channels"}
STEP = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "damping": 1e-2, **TYPE2}


def structured(rows, positions, joint):
    """Return ⊕_k λ_k Σ + u uᵀ of one group's rows `[M, d]` with loops over positions."""
    d = rows.shape[1] - joint
    mean = rows.mean(0)
    covariances = []
    for k in range(positions):
        x = rows[:, k:d:positions]
        x = x - x.mean(0)
        covariances.append(x.T @ x / len(x))
    total = sum(covariances)
    A = torch.outer(mean, mean)
    for k, covariance in enumerate(covariances):
        share = covariance.trace() / total.trace() if total.trace() > 0 else 0.0
        A[k:d:positions, k:d:positions] += share * total
    return A


def rows_of(module, x, reduce=False):
    """Return all inputs `[B, M, d]`, with a 1 for a bias."""
    ((layer, _),) = find_layers([("", module)], module.parameters(), False)
    call, x = layer.family.record(module, (x,), {}, module(x))
    a, _ = layer.family.inputs(call, x, reduce)
    if layer.joint:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    return a.flatten(1, 2)


def expected_factor(module, x, reduce=False):
    positions = module.weight[0, 0].numel()
    groups = [structured(r, positions, module.bias is not None) for r in rows_of(module, x, reduce)]
    return torch.stack(groups)


def is_split(module):
    ((layer, _),) = split(
        find_layers([("", module)], module.parameters(), False), "channels", "full"
    )
    return layer.positions > 0


def factor(module, x, **options):
    model = nn.Sequential(module, nn.Flatten())
    data = [(x, torch.zeros_like(model(x)))]
    options = {"separate_weight_and_bias": False, "check_deterministic": False, **TYPE2, **options}
    K = KFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), data, **options)
    A = K.factors("0").input_factor
    return A if A.ndim == 3 else A.unsqueeze(0)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@drawn
@hypothesis.given(case=st.one_of(ordinary(), transposed()), seed=st.integers(0, 9))
def test_it_has_the_means_of_all_patches_and_their_covariances(kfac_approx, case, seed):
    module, shape = case
    hypothesis.assume(is_split(module))
    torch.manual_seed(seed)
    x = torch.randn(3, module.in_channels, *shape) + 0.5
    got = factor(module, x, kfac_approx=kfac_approx)
    want = expected_factor(module, x, kfac_approx == "reduce")
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)
    whole = factor(module, x, kfac_approx=kfac_approx, conv_factor="full")
    traces = [A.diagonal(dim1=1, dim2=2).sum(1) for A in (got, whole)]
    torch.testing.assert_close(*traces, atol=1e-10, rtol=1e-8)


def test_it_is_the_whole_factor_where_positions_have_only_their_mean_in_common():
    C, K = 3, 4
    torch.manual_seed(0)
    root, mean, scales = torch.randn(C, C), torch.randn(C * K + 1), torch.rand(K)
    mean[-1] = 1
    rows = []
    for k in range(K):
        for column in range(C):
            for sign in (-1, 1):
                row = mean.clone()
                row[k : C * K : K] += sign * scales[k] * root[:, column]
                rows.append(row)
    rows = torch.stack(rows).unsqueeze(0)
    A = SplitFactor.from_packed(packed_rows(rows, K, True) / rows.shape[1], K, True)
    torch.testing.assert_close(A.dense(), rows.mT @ rows / rows.shape[1])


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("unseen", [False, True])
def test_its_inverse_and_products_are_the_dense_ones(joint, groups, unseen):
    C, K, d_out = 5, 4, 6
    torch.manual_seed(0)
    rows, X = (
        torch.randn(groups, 40, C * K + joint) + 0.5,
        torch.randn(groups, d_out, C * K + joint),
    )
    if unseen:
        for x in (rows, X):
            x[..., : C * K].unflatten(-1, (C, K))[..., 2:] = 0
    if joint:
        rows[..., -1] = 1
    A = SplitFactor.from_packed(packed_rows(rows, K, joint) / 40, K, joint)
    G, damping = torch.randn(groups, d_out, d_out), torch.rand(groups) + 0.1
    want = torch.linalg.inv(
        A.dense() + torch.diag_embed(damping.unsqueeze(1).expand(groups, X.shape[-1]))
    )
    inverse = A.damped_inverse(damping)
    torch.testing.assert_close(inverse.dense(), want)
    torch.testing.assert_close(inverse.trace(), want.diagonal(dim1=1, dim2=2).sum(1))
    product = KroneckerProduct(G, inverse)
    columns = [X[..., : C * K], X[..., C * K :]] if joint else [X]
    torch.testing.assert_close(torch.cat(product.apply_columns(columns), -1), G @ X @ want)
    torch.testing.assert_close(product.apply(X), G @ X @ want)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("unseen", [False, True])
def test_the_ends_of_its_spectrum_are_those_of_the_dense_inverse(joint, unseen):
    C, K = 4, 3
    torch.manual_seed(0)
    rows = torch.randn(2, 30, C * K + joint) + 0.5
    if joint:
        rows[..., -1] = 1
    if unseen:
        rows[..., : C * K].unflatten(-1, (C, K))[..., 1:] = 0
    A = SplitFactor.from_packed(packed_rows(rows, K, joint) / 30, K, joint)
    inverse = A.damped_inverse(torch.tensor([0.1, 3.0]))
    values = torch.linalg.eigvalsh(inverse.dense())
    torch.testing.assert_close(spectrum_ends(inverse), values[:, [0, -1]])


def test_an_inverse_kept_in_bfloat16_stays_positive_definite():
    C, K = 8, 9
    torch.manual_seed(0)
    rows = torch.rand(1, 4, C * K) * 30  # a mean that is much larger than the damping
    A = SplitFactor.from_packed(packed_rows(rows, K, False) / 4, K, False)
    inverse = A.damped_inverse(torch.tensor([1e-4])).rounded(torch.bfloat16)
    assert inverse.blocks.dtype == torch.bfloat16
    wide = SplitInverse(inverse.blocks.double(), inverse.update, False)
    assert torch.linalg.eigvalsh(wide.dense()).min() > 0


def test_a_covariance_that_round_off_makes_indefinite_is_inverted():
    C, K = 2, 2
    channels = torch.tensor([[[2.0, 2.0], [2.0, 2.0 - 1e-3]]])
    A = SplitFactor(channels, torch.ones(1, K) * 2, torch.ones(1, C * K), torch.ones(1), False)
    inverse = A.damped_inverse(torch.tensor([1e-6]))
    assert torch.linalg.eigvalsh(inverse.dense()).min() > 0


MODULES = {
    "2d": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "without bias": lambda: nn.Conv2d(3, 4, (3, 2), stride=2, bias=False),
    "groups": lambda: nn.Conv2d(6, 4, 2, groups=2, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1),
    "1d": lambda: nn.Conv1d(3, 4, 3, padding=2, dilation=2, padding_mode="circular"),
}


def example(name):
    torch.manual_seed(0)
    module = MODULES[name]()
    shape = (5, 5) if module.weight.ndim == 4 else (7,)
    x = torch.randn(4, module.in_channels, *shape) + 0.3
    return nn.Sequential(module, nn.Flatten()), x


def step(model, x, **options):
    """Return the gradients of one step with squared error, and the movements."""
    y = torch.randn_like(model(x))
    optimizer = KFACOptimizer(model.parameters(), **{**STEP, **options})
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.mse_loss(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    moves = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    return optimizer, gradients, moves


def matrices(model, tensors):
    ((layer, _),) = find_layers([("0", model[0])], model.parameters(), False)
    return layer.blocks[0].to_matrix(tensors)


@pytest.mark.parametrize("name", MODULES)
def test_a_step_is_the_dense_one_of_the_structure(name):
    model, x = example(name)
    optimizer, gradients, moves = step(model, x)
    A, G = expected_factor(model[0], x), optimizer.factors("0").grad_output_factor
    G = G if G.ndim == 3 else G.unsqueeze(0)
    root, identity = STEP["damping"] ** 0.5, torch.eye
    for a, g, grad, move in zip(
        A, G, matrices(model, gradients), matrices(model, moves), strict=True
    ):
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        inverse_a = torch.linalg.inv(a + pi * root * identity(len(a)))
        inverse_g = torch.linalg.inv(g + root / pi * identity(len(g)))
        torch.testing.assert_close(move, inverse_g @ grad @ inverse_a)


def basis_of(A, channels, positions):
    """Return Q_C ⊗ Q_K (⊕ 1) from the sums of A's blocks over positions, and over channels."""
    d = channels * positions
    blocks = A[:d, :d].reshape(channels, positions, channels, positions)
    sums = (torch.einsum("ckdk->cd", blocks), torch.einsum("ckcl->kl", blocks))
    Q = torch.eye(len(A))
    Q[:d, :d] = torch.kron(*(torch.linalg.eigh(x)[1].contiguous() for x in sums))
    return Q


@pytest.mark.parametrize("name", MODULES)
def test_exact_damping_takes_the_diagonal_in_a_basis_that_is_a_kronecker_product(name):
    model, x = example(name)
    optimizer, gradients, moves = step(model, x, damping_method="exact")
    A, G = expected_factor(model[0], x), optimizer.factors("0").grad_output_factor
    G, positions = G if G.ndim == 3 else G.unsqueeze(0), model[0].weight[0, 0].numel()
    for a, g, grad, move in zip(
        A, G, matrices(model, gradients), matrices(model, moves), strict=True
    ):
        Q, (values, basis) = basis_of(a, len(a) // positions, positions), torch.linalg.eigh(g)
        eigenvalues = torch.outer(values, (Q.T @ a @ Q).diagonal()) + STEP["damping"]
        torch.testing.assert_close(move, basis @ ((basis.T @ grad @ Q) / eigenvalues) @ Q.T)


@pytest.mark.parametrize("name", ["2d", "without bias", "transposed"])
def test_ekfac_has_the_exact_blocks_diagonal_in_its_basis(name):
    model, x = example(name)
    params, options = list(model.parameters()), {**TYPE2, "separate_weight_and_bias": False}
    model.append(nn.Linear(model(x).shape[1], 3))  # so that G has no eigenvalue twice
    data = [(x, torch.zeros_like(model(x)))]
    E = EKFACLinearOperator(model, nn.MSELoss(), params, data, **options)
    exact = dense_ggn(model, nn.MSELoss(), params, *data[0])
    (a,), g = expected_factor(model[0], x), E.factors("0").grad_output_factor
    positions, d = model[0].weight[0, 0].numel(), len(a)
    # rows of [W | b] in the order of the parameters' entries
    identity = torch.eye(len(exact)).split([p.numel() for p in params], 1)
    pieces = [e.reshape(-1, *p.shape) for e, p in zip(identity, params, strict=True)]
    ((layer, _),) = find_layers([("0", model[0])], params, False)
    order = layer.blocks[0].to_matrix(pieces).flatten(1)  # [D, d_out d]
    basis_g = torch.linalg.eigh(g)[1].contiguous()
    Q = order @ torch.kron(basis_g, basis_of(a, d // positions, positions))
    want = Q @ (Q.T @ exact @ Q).diagonal().diag() @ Q.T
    torch.testing.assert_close(to_dense(E), want)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_several_uses_and_steps_average_all_patches(kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.Tanh(), conv, nn.Flatten())
    options = {"ema_decay": 0.5, "factor_update_interval": 1, "preconditioner": kind}
    optimizer = KFACOptimizer(model.parameters(), conv_factor="channels", **options)
    moments, total = 0.0, 0.0
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        with torch.no_grad():
            rows = torch.cat([rows_of(conv, y) for y in (x, conv(x).tanh())], 1)
        moments, total = 0.5 * moments + packed_rows(rows, 9, True) / rows.shape[1], 0.5 * total + 1
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    want = SplitFactor.from_packed(moments / total, 9, True).dense()[0]
    torch.testing.assert_close(optimizer.factors("0").input_factor, want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"damping_method": "exact"},
        {"preconditioner": "ekfac"},
        {"factor_dtype": torch.bfloat16, "inverse_dtype": torch.bfloat16},
    ],
    ids=["factored", "exact", "ekfac", "low precision"],
)
def test_a_run_goes_on_from_its_saved_state(options):
    model, x = example("2d")
    options |= {
        "conv_factor": "channels",
        "factor_update_interval": 2,
        "inverse_update_interval": 3,
    }

    def train(model, optimizer, steps):
        for i in range(steps):
            optimizer.zero_grad()
            (model(x) - (1.0 + i)).square().mean().backward()
            optimizer.step()

    assert_goes_on(model, options, train)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_bias_may_be_frozen_and_trained_again(kind):
    model, x = example("2d")
    optimizer = KFACOptimizer(model.parameters(), conv_factor="channels", preconditioner=kind)
    for trained in (True, False, True):
        model[0].bias.requires_grad_(trained)
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert moved == [True, trained]
        condition = optimizer.statistics()["0/condition"]
        assert 1 < condition < float("inf")


def test_a_state_of_another_form_is_refused_by_name():
    model, x = example("2d")
    optimizer, *_ = step(model, x)
    whole = KFACOptimizer(model.parameters(), conv_factor="full")
    with pytest.raises(ValueError, match="conv_factor"):
        whole.load_state_dict(optimizer.state_dict())


def test_wide_convolutions_are_split_by_default_and_described():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3), nn.Conv2d(4, 900, 1), nn.Flatten()
    )
    optimizer = KFACOptimizer(model.parameters())
    model(torch.randn(2, 3, 6, 6)).square().mean().backward()
    optimizer.step()
    rows = {row.parameter: row.curvature for row in optimizer.describe().parameters}
    assert rows["0.weight"] == "Kronecker 64 × 28"
    assert rows["1.weight"] == "Kronecker 4 × 577 (64 channels × 9 positions + 1)"
    assert rows["2.weight"] == "Kronecker 900 (rank 64 + diagonal) × 5"
    assert optimizer.state[model[1].weight]["input_factor"].shape == (1, 64, 33)


def test_patches_of_images_and_kernels_of_single_channels_stay_whole():
    patches, deep = nn.Conv2d(3, 2, 16, 16), nn.Conv2d(4, 4, 25, groups=4)
    for module in (patches, deep, nn.Linear(900, 2), nn.Conv2d(900, 2, 1)):
        ((layer, _),) = split(
            find_layers([("", module)], module.parameters(), False), "auto", "full"
        )
        assert layer.positions == 0


def test_operators_keep_whole_factors_unless_asked():
    model, x = example("2d")
    data = [(x, torch.zeros_like(model(x)))]
    arguments = (model, nn.MSELoss(), list(model.parameters()), data)
    whole, split_ = (
        KFACLinearOperator(*arguments, conv_factor=value).inverse(1e-2)
        for value in ("full", "channels")
    )
    assert not torch.allclose(to_dense(whole), to_dense(split_))
    dense = to_dense(split_)
    torch.testing.assert_close(split_.trace(), dense.trace())
    torch.testing.assert_close(split_.logdet(), dense.logdet())
    torch.testing.assert_close(split_.frobenius_norm(), dense.norm())
    K = KFACLinearOperator(*arguments, conv_factor="channels")
    torch.testing.assert_close(
        K.logdet(), torch.linalg.slogdet(to_dense(K))[1], rtol=1e-6, atol=1e-6
    )
