"""KFACLinearOperator against dense oracles: where it is exact, its factors, its algebra."""

import pytest
import torch
from dense import (
    block_mask,
    dense_ggn,
    dense_kfac,
    hessian_columns,
)
from kfac_cases import (
    EXACT,
    FACTORS,
    LINEAR,
    exact_case,
    factor_case,
    group_blocks,
    grouped_mask,
    joint_data,
    to_dense,
)
from torch import nn

from kfacopt import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator
from kfacopt.likelihoods import UnsupportedLossError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
]

TOLERANCE = 1e-10
MC_SAMPLES = 3000
MC_RELATIVE_ERROR = 0.1  # of the trace; the standard deviation is about 1 / sqrt(samples · data)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
@pytest.mark.parametrize("name", EXACT)
def test_type_2_is_the_ggn_block_diagonal_of_deep_linear_nets(name, separate, reduction):
    model, data, approx = exact_case(name)
    params = list(model.parameters())
    loss = nn.MSELoss(reduction=reduction)
    kfac = KFACLinearOperator(
        model,
        loss,
        params,
        data,
        fisher_type="type-2",
        kfac_approx=approx,
        loss_average="batch" if reduction == "mean" else None,
        separate_weight_and_bias=separate,
    )
    ggn = to_dense(GGNLinearOperator(model, loss, params, data))
    assert torch.allclose(ggn, dense_ggn(model, loss, params, *joint_data(data)), atol=TOLERANCE)
    mask = block_mask(params, group_blocks(model, params, separate)) * grouped_mask(model, params)
    assert torch.allclose(to_dense(kfac), ggn * mask, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["positions-expand", "positions-reduce"])
def test_the_other_approximation_is_not_exact(name):
    model, data, approx = exact_case(name)
    params = list(model.parameters())
    other = "reduce" if approx == "expand" else "expand"
    options = {"fisher_type": "type-2", "kfac_approx": other}
    kfac = to_dense(KFACLinearOperator(model, nn.MSELoss(), params, data, **options))
    ggn = to_dense(GGNLinearOperator(model, nn.MSELoss(), params, data))
    error = (kfac - ggn * block_mask(params, range(len(params)))).norm() / kfac.norm()
    assert error > 0.05


def test_nonlinear_nets_are_not_exact():
    model = nn.Sequential(LINEAR(4, 5), nn.ReLU(), LINEAR(5, 3))
    params, data = list(model.parameters()), [(torch.randn(20, 4), torch.rand(20, 3))]
    kfac = to_dense(KFACLinearOperator(model, nn.MSELoss(), params, data, fisher_type="type-2"))
    ggn = to_dense(GGNLinearOperator(model, nn.MSELoss(), params, data))
    first = slice(0, 20)
    assert (kfac - ggn)[first, first].norm() > 0.05 * ggn[first, first].norm()


# Factors of nonlinear networks, against double loops --------------------------------------------


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", FACTORS)
def test_factors(name, approx, joint):
    model, X, y, layer_name = factor_case(name)
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    layer = model.get_submodule(layer_name)
    kfac = KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(X, y)],
        fisher_type="type-2",
        kfac_approx=approx,
        separate_weight_and_bias=not joint,
    )
    columns = hessian_columns(loss, model(X).detach(), y)
    expected = dense_kfac(model, layer, X, columns, approx, joint)
    factors = kfac.factors(layer_name)
    for index, (A, G) in enumerate(expected):
        one_of_many = len(expected) > 1
        got_A = factors.input_factor[index] if one_of_many else factors.input_factor
        got_G = factors.grad_output_factor[index] if one_of_many else factors.grad_output_factor
        assert torch.allclose(got_A, A, atol=TOLERANCE)
        assert torch.allclose(got_G, G, atol=TOLERANCE)
    by_name = kfac.factors(f"{layer_name}.weight")
    assert torch.equal(by_name.grad_output_factor, factors.grad_output_factor)
    assert torch.equal(kfac.factors(layer.bias).input_factor, factors.input_factor)


def test_sequence_outputs_with_mixed_positions():
    """Type-2 has a column for every position: nothing is added up across positions."""

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mix, self.head = LINEAR(4, 5), LINEAR(3, 3), LINEAR(5, 2)

        def forward(self, x):
            h = torch.tanh(self.inner(x))
            return self.head(self.mix(h.mT).mT).mT  # [N, C, T]

    model, X, y = Mix(), torch.randn(4, 3, 4), torch.randint(2, (4, 3))
    loss = nn.CrossEntropyLoss()
    kfac = KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(X, y)],
        fisher_type="type-2",
        loss_average="batch+sequence",
    )
    columns = hessian_columns(loss, model(X).detach(), y)
    ((A, G),) = dense_kfac(model, model.inner, X, columns, "expand", False)
    assert torch.allclose(kfac.factors("inner").input_factor, A, atol=TOLERANCE)
    assert torch.allclose(kfac.factors("inner").grad_output_factor, G, atol=TOLERANCE)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()])
def test_mc_approaches_type_2(loss):
    model = nn.Sequential(LINEAR(4, 5), nn.Tanh(), LINEAR(5, 3))
    y = torch.randint(3, (6,)) if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(6, 3)
    data, params = [(torch.randn(6, 4), y)], list(model.parameters())
    exact = KFACLinearOperator(model, loss, params, data, fisher_type="type-2")
    mc = KFACLinearOperator(model, loss, params, data, mc_samples=MC_SAMPLES)
    error = to_dense(mc - exact).norm() / to_dense(exact).norm()
    assert error < MC_RELATIVE_ERROR
    other = KFACLinearOperator(model, loss, params, data, seed=1)
    again = KFACLinearOperator(model, loss, params, data, seed=1)
    assert torch.equal(to_dense(other), to_dense(again))
    assert not torch.allclose(to_dense(other), to_dense(mc))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_class", [nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss])
def test_empirical_is_the_uncentered_gradient_covariance(loss_class, reduction):
    """Exact for one linear layer, whose per-datum gradients are g aᵀ with N terms: G and A."""
    model, X = nn.Sequential(LINEAR(4, 3)), torch.randn(6, 4)
    y = torch.randint(3, (6,)) if loss_class is nn.CrossEntropyLoss else torch.rand(6, 3)
    loss = loss_class(reduction=reduction)
    average = "batch" if reduction == "mean" else None
    params = list(model.parameters())
    options = {"fisher_type": "empirical", "loss_average": average}
    kfac = KFACLinearOperator(model, loss, params, [(X, y)], **options)
    per_datum = []
    for n in range(6):
        value = loss(model(X[n : n + 1]), y[n : n + 1])
        per_datum.append(torch.autograd.grad(value, model[0].bias)[0])
    expected = sum(torch.outer(g, g) for g in per_datum) / (6 if reduction == "mean" else 1)
    assert torch.allclose(kfac.factors("0").grad_output_factor, expected, atol=TOLERANCE)
    assert torch.allclose(kfac.factors("0").input_factor, X.T @ X / 6, atol=TOLERANCE)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_batches_do_not_matter(fisher_type):
    """Unequal batches with ignored targets and class weights give the matrix of one batch."""
    model = nn.Sequential(LINEAR(4, 5), nn.Tanh(), LINEAR(5, 3))
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5]), ignore_index=2)
    X, y, params = torch.randn(9, 4), torch.randint(3, (9,)), list(model.parameters())
    batches = [(X[:2], y[:2]), (X[2:3], y[2:3]), (X[3:], y[3:])]
    whole = KFACLinearOperator(model, loss, params, [(X, y)], fisher_type=fisher_type)
    parts = KFACLinearOperator(model, loss, params, batches, fisher_type=fisher_type)
    assert torch.allclose(to_dense(parts), to_dense(whole), atol=TOLERANCE)


# Algebra ----------------------------------------------------------------------------------------


def small(separate=True, fisher_type="type-2"):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        LINEAR(16, 3),
        nn.Tanh(),
        LINEAR(3, 3),
    )
    data = [(torch.randn(7, 2, 4, 4), torch.randint(3, (7,)))]
    return model, data, {"fisher_type": fisher_type, "separate_weight_and_bias": separate}


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
def test_trace_determinant_norm(separate):
    model, data, options = small(separate)
    loss = nn.MSELoss()
    data = [(X, torch.rand(7, 3)) for X, _ in data]
    kfac = KFACLinearOperator(model, loss, list(model.parameters()), data, **options)
    dense = to_dense(kfac)
    assert torch.allclose(kfac.trace(), dense.trace())
    assert torch.allclose(kfac.frobenius_norm(), dense.norm())
    inverse = kfac.inverse(0.1)
    dense_inverse = to_dense(inverse)
    assert torch.allclose(inverse.logdet(), torch.logdet(dense_inverse))
    assert torch.allclose(inverse.trace(), dense_inverse.trace())
    shifted = kfac.inverse(1.0, method="exact")
    assert torch.allclose(shifted.det(), torch.det(to_dense(shifted)))
    assert torch.allclose(kfac.det(), torch.det(dense), atol=TOLERANCE)  # few data: singular


def test_logdet_of_a_regular_matrix():
    model = nn.Sequential(LINEAR(3, 3))
    data = [(torch.randn(20, 3), torch.rand(20, 3))]
    kfac = KFACLinearOperator(
        model, nn.MSELoss(), list(model.parameters()), data, fisher_type="type-2"
    )
    assert torch.allclose(kfac.logdet(), torch.logdet(to_dense(kfac)))
    assert torch.allclose(kfac.det(), torch.det(to_dense(kfac)))


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
def test_exact_inverse(separate):
    model, data, options = small(separate)
    kfac = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, **options
    )
    identity = torch.eye(kfac.shape[0])
    product = to_dense(kfac.inverse(0.1, method="exact")) @ (to_dense(kfac) + 0.1 * identity)
    assert torch.allclose(product, identity, atol=TOLERANCE)


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
def test_factored_inverse(separate):
    """(G + √δ/π I)⁻¹ ⊗ (A + π√δ I)⁻¹ with dense Kronecker products, and not (G ⊗ A + δI)⁻¹."""
    model, data, options = small(separate)
    params, damping = [model[3].weight, model[3].bias], 0.1
    kfac = KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data, **options)
    A, G = kfac.factors("3")
    dense = to_dense(kfac.inverse(damping))
    pi = ((A.trace() / A.shape[0]) / (G.trace() / G.shape[0])) ** 0.5
    left = torch.linalg.inv(G + damping**0.5 / pi * torch.eye(3))
    right = torch.linalg.inv(A + damping**0.5 * pi * torch.eye(A.shape[0]))
    expected = torch.kron(left, right)
    if separate:
        bias = torch.linalg.inv(G + damping * torch.eye(3))  # nothing to factor: A = 1
        expected = torch.block_diag(expected, bias)
    else:  # rows of [W | b] to vec W, then b
        index = torch.arange(3 * 17).reshape(3, 17)
        order = torch.cat([index[:, :16].flatten(), index[:, 16]])
        expected = expected[order][:, order]
    assert torch.allclose(dense, expected, atol=TOLERANCE)
    exact = to_dense(kfac.inverse(damping, method="exact"))
    assert not torch.allclose(dense[:48, :48], exact[:48, :48], rtol=1e-2)


def test_subsets_and_orders_of_parameters():
    model, data, options = small(separate=False)
    names = [name for name, _ in model.named_parameters()]
    own = dict(model.named_parameters())
    offsets, total = {}, 0
    for name in names:
        offsets[name] = torch.arange(total, total + own[name].numel())
        total += own[name].numel()
    loss = nn.CrossEntropyLoss()
    full = to_dense(KFACLinearOperator(model, loss, list(own.values()), data, **options))
    reverse = names[::-1]
    shuffled = KFACLinearOperator(model, loss, [own[n] for n in reverse], data, **options)
    where = torch.cat([offsets[n] for n in reverse])
    assert torch.allclose(to_dense(shuffled), full[where][:, where], atol=TOLERANCE)
    separate = dict(options, separate_weight_and_bias=True)
    apart = to_dense(KFACLinearOperator(model, loss, list(own.values()), data, **separate))
    for kind in ("weight", "bias"):
        chosen = [n for n in names if n.endswith(kind)]
        for opts in (options, separate):  # without its partner a parameter is a block of its own
            part = KFACLinearOperator(model, loss, [own[n] for n in chosen], data, **opts)
            where = torch.cat([offsets[n] for n in chosen])
            assert torch.allclose(to_dense(part), apart[where][:, where], atol=TOLERANCE)


def test_products_with_arrays_tensors_and_lists():
    model, data, options = small()
    params = list(model.parameters())
    kfac = KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data, **options)
    dense = to_dense(kfac)
    x = torch.randn(kfac.shape[0])
    assert torch.allclose(kfac @ x, dense @ x)
    assert torch.allclose(x @ kfac, dense @ x)
    assert torch.allclose(torch.from_numpy(kfac @ x.numpy()), dense @ x)
    flat = x.split([p.numel() for p in params])
    pieces = [v.reshape(p.shape) for p, v in zip(params, flat, strict=True)]
    result = kfac @ pieces
    assert [r.shape for r in result] == [p.shape for p in params]
    assert torch.allclose(torch.cat([r.flatten() for r in result]), dense @ x)
    inverse = kfac.inverse(0.1)
    assert torch.allclose(inverse @ x, to_dense(inverse) @ x)
    assert (kfac + 2 * inverse).shape == kfac.shape


def test_own_evaluations_leave_no_trace():
    model = nn.Sequential(LINEAR(4, 5), nn.BatchNorm1d(5), LINEAR(5, 3))
    params = [model[0].weight, model[2].weight]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    data = [(torch.randn(6, 4), torch.rand(6, 3))]
    data_state = torch.get_rng_state()
    to_dense(KFACLinearOperator(model, nn.MSELoss(), params, data))
    to_dense(GGNLinearOperator(model, nn.MSELoss(), params, data))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), data_state)
    assert not torch.equal(state, data_state)
    assert model.training


# Errors -----------------------------------------------------------------------------------------

BAD = {
    "fisher_type": ({"fisher_type": "exact"}, ValueError, "fisher_type must be one of"),
    "mc_samples": ({"mc_samples": 0}, ValueError, "mc_samples must be an integer of at least 1"),
    "mc_samples-type-2": (
        {"fisher_type": "type-2", "mc_samples": 2},
        ValueError,
        "mc_samples must be 1 unless",
    ),
    "kfac_approx": ({"kfac_approx": "extend"}, ValueError, "kfac_approx must be one of"),
    "loss_average": ({"loss_average": "sequence"}, ValueError, "loss_average must be one of"),
    "loss_average-none": ({"loss_average": None}, ValueError, "loss_average must be None exactly"),
    "shape": ({"shape": (3, 3)}, ValueError, r"shape must be \(43, 43\)"),
    "seed": ({"seed": 0.5}, ValueError, "seed must be an integer"),
    "seed-wide": ({"seed": 2**70}, ValueError, "seed must be an integer of 64 bits, got 118"),
    "separate": ({"separate_weight_and_bias": "a"}, ValueError, "separate_weight_and_bias must"),
    "progressbar": ({"progressbar": "x"}, ValueError, "progressbar must be True or False, got 'x'"),
    "check": ({"check_deterministic": None}, ValueError, "check_deterministic must be True or"),
    "shape-number": ({"shape": 3}, ValueError, r"shape must be \(43, 43\) .* got 3"),
    "data": ({"data": None}, ValueError, "data must be an iterable of batches"),
    "params": (
        {"params": None},
        ValueError,
        "params must be a list of parameters or a dict, got No",
    ),
    "params-text": (
        {"params": ["weight"]},
        ValueError,
        r"params\[0\] must be a tensor, got 'weight'",
    ),
    "loss_func": ({"loss_func": nn.MSELoss}, ValueError, "loss_func must be a function or an inst"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name):
    options, error, message = BAD[name]
    model = nn.Sequential(LINEAR(4, 5), LINEAR(5, 3))
    data = [(torch.rand(2, 4), torch.rand(2, 3))]
    arguments = {"loss_func": nn.MSELoss(), "params": list(model.parameters()), "data": data}
    with pytest.raises(error, match=message):
        KFACLinearOperator(model, **(arguments | options))
    shared = ("progressbar", "check", "shape-number", "data", "params", "params-text", "loss_func")
    if name in shared:
        with pytest.raises(error, match=message):
            GGNLinearOperator(model, **(arguments | options))


def test_bad_models_losses_and_parameters():
    model = nn.Sequential(LINEAR(4, 5), nn.PReLU(5), LINEAR(5, 3))
    params, data = list(model.parameters()), [(torch.rand(2, 4), torch.rand(2, 3))]
    mse = nn.MSELoss()
    with pytest.raises(NotImplementedError, match=r"'1\.weight' is in an unsupported layer"):
        KFACLinearOperator(model, mse, params, data)
    with pytest.raises(UnsupportedLossError, match="L1Loss has no curvature"):
        to_dense(KFACLinearOperator(model, nn.L1Loss(), params[:2], data))
    with pytest.raises(ValueError, match="loss_average must be None exactly"):
        KFACLinearOperator(model, nn.MSELoss(reduction="sum"), params[:2], data)
    with pytest.raises(ValueError, match="at least one parameter"):
        KFACLinearOperator(model, mse, [], data)
    with pytest.raises(ValueError, match="twice"):
        KFACLinearOperator(model, mse, [params[0], params[0]], data)
    with pytest.raises(ValueError, match="not a parameter of model_func"):
        KFACLinearOperator(model, mse, [nn.Parameter(torch.rand(2))], data)
    with pytest.raises(ValueError, match=r"must be an nn\.Module"):
        KFACLinearOperator(lambda x: x, mse, params[:2], data)
    kfac = KFACLinearOperator(model, mse, params[:2], data)
    with pytest.raises(KeyError, match="no such layer or parameter; layers: "):
        kfac.factors("1")
    with pytest.raises(ValueError, match="damping must be a number"):
        kfac.inverse(-1.0)
    with pytest.raises(ValueError, match="method must be one of"):
        kfac.inverse(1.0, method="eigh")
    with pytest.raises(RuntimeError, match="singular"):
        kfac.inverse(0.0, method="exact")


def test_determinism_check():
    model = nn.Sequential(LINEAR(4, 5), nn.Dropout(0.5), LINEAR(5, 3))
    params, mse = [model[0].weight], nn.MSELoss()
    X, y = torch.rand(6, 4), torch.rand(6, 3)
    with pytest.raises(RuntimeError, match="model_func: not deterministic"):
        KFACLinearOperator(model, mse, params, [(X, y)])
    model.eval()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), 2, shuffle=True)
    with pytest.raises(RuntimeError, match="data: not deterministic"):
        KFACLinearOperator(model, mse, params, loader)
    with pytest.raises(RuntimeError, match="a second 0"):
        KFACLinearOperator(model, mse, params, iter([(X, y)]))
    batches = [[(X[:3], y[:3]), (X[3:], y[3:])], [(X[3:], y[3:]), (X[:3], y[:3])]]

    class Alternating:
        def __iter__(self):
            batches.reverse()
            return iter(batches[0])

    with pytest.raises(RuntimeError, match="order of the batches changed"):
        GGNLinearOperator(model, mse, params, Alternating())


@pytest.mark.parametrize("make", [KFACLinearOperator, GGNLinearOperator])
def test_progress_bar(make, capsys):
    model, data, _ = small()
    operator = make(model, nn.CrossEntropyLoss(), list(model.parameters()), data, progressbar=True)
    assert "100%" not in capsys.readouterr().err
    operator @ torch.ones(operator.shape[0])
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
def test_sides_wider_than_max_factor_dim_are_diagonal(operator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = [(torch.randn(10, 6).double(), torch.randn(10, 3).double())]
    params, options = list(model.parameters()), {"fisher_type": "type-2", "max_factor_dim": 5}
    narrow = operator(model, nn.MSELoss(), params, data, **options)
    dense = KFACLinearOperator(model, nn.MSELoss(), params, data, fisher_type="type-2")
    (A, G), (full_A, full_G) = narrow.factors("0"), dense.factors("0")
    torch.testing.assert_close(A, full_A.diagonal())
    torch.testing.assert_close(G, full_G)
    torch.testing.assert_close(narrow.factors("2").input_factor, dense.factors("2").input_factor)
    matrix = narrow @ torch.eye(sum(p.numel() for p in params)).double()
    if operator is KFACLinearOperator:
        torch.testing.assert_close(matrix[:24, :24], torch.kron(G, A.diag()))
    else:  # the diagonal of the exact block in the basis Q_G ⊗ I
        Q = torch.kron(torch.linalg.eigh(G)[1].contiguous(), torch.eye(6).double())
        exact = GGNLinearOperator(model, nn.MSELoss(), params[:1], data) @ torch.eye(24).double()
        expected = Q @ (Q.T @ exact @ Q).diagonal().diag() @ Q.T
        torch.testing.assert_close(matrix[:24, :24], expected)
    with pytest.raises(ValueError, match="max_factor_dim"):
        operator(model, nn.MSELoss(), params, data, max_factor_dim=0)
