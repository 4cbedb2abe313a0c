"""EKFACLinearOperator against dense oracles: its eigenvalues, and that no K-FAC is nearer."""

import pytest
import torch
from dense import block_mask, dense_ggn, dense_kfac, flat_jacobian, hessian_columns
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

from kfacopt import EKFACLinearOperator, KFACLinearOperator
from kfacopt.kfac import eigenvalues
from kfacopt.kfac.eigenvalues import gradient_second_moments
from kfacopt.linalg.kronecker import DecompositionError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
]

TOLERANCE = 1e-10
ROUND_OFF = 1e-12  # relative, of Frobenius errors that are compared
MC_SAMPLES = 3000
MC_RELATIVE_ERROR = 0.1


def operators(model, loss, data, **options):
    params = list(model.parameters())
    shared = {"fisher_type": "type-2"} | options
    return [kind(model, loss, params, data, **shared) for kind in OPERATORS]


OPERATORS = (KFACLinearOperator, EKFACLinearOperator)


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
@pytest.mark.parametrize("name", EXACT)
def test_equal_to_kfac_and_the_ggn_where_kfac_is_exact(name, separate):
    model, data, approx = exact_case(name)
    params, loss = list(model.parameters()), nn.MSELoss()
    options = {"kfac_approx": approx, "separate_weight_and_bias": separate}
    kfac, ekfac = operators(model, loss, data, **options)
    mask = block_mask(params, group_blocks(model, params, separate)) * grouped_mask(model, params)
    ggn = dense_ggn(model, loss, params, *joint_data(data)) * mask
    assert torch.allclose(to_dense(ekfac), ggn, atol=TOLERANCE)
    assert torch.allclose(to_dense(ekfac), to_dense(kfac), atol=TOLERANCE)


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", FACTORS)
def test_no_block_is_farther_from_the_ggn_than_kfacs(name, approx, joint):
    model, X, y, _ = factor_case(name)
    loss, params = nn.CrossEntropyLoss(label_smoothing=0.1), list(model.parameters())
    options = {"kfac_approx": approx, "separate_weight_and_bias": not joint}
    kfac, ekfac = operators(model, loss, [(X[:2], y[:2]), (X[2:], y[2:])], **options)
    ggn = dense_ggn(model, loss, params, X, y)
    owners = torch.tensor(group_blocks(model, params, not joint))
    strictly_nearer = 0
    for owner in owners.unique():
        groups = [0 if o == owner else i + 1 for i, o in enumerate(owners)]
        own = block_mask(params, groups) * grouped_mask(model, params)
        inside = torch.cat(
            [torch.full((p.numel(),), g == 0) for p, g in zip(params, groups, strict=True)]
        )
        own = own * inside * inside[:, None]
        errors = [((to_dense(op) - ggn) * own).norm() for op in (kfac, ekfac)]
        assert errors[1] <= errors[0] + ROUND_OFF * (ggn * own).norm()
        strictly_nearer += int(errors[1] < 0.99 * errors[0])
        trace = (to_dense(ekfac) * own).trace()
        assert torch.isclose(trace, (ggn * own).trace(), rtol=TOLERANCE)  # K-FAC's is not
    assert strictly_nearer > 0


# The mean of all patches of a circular or strided convolution has a factor with a null space of
# several dimensions, whose basis is arbitrary.
REGULAR = [
    (name, approx)
    for name in FACTORS
    for approx in ("expand", "reduce")
    if (name, approx) not in {("conv-circular", "reduce"), ("conv-strided", "reduce")}
]


@pytest.mark.parametrize(("name", "approx"), REGULAR)
def test_eigenvalues_are_the_diagonal_in_the_eigenbasis(name, approx):
    """Against eigenvectors of factors and per-datum gradients from double loops over autograd."""
    model, X, y, layer_name = factor_case(name)
    X, y = torch.randn(40, *X.shape[1:]), torch.randint(3, (40,))  # regular factors: one basis
    loss, layer = nn.CrossEntropyLoss(), model.get_submodule(layer_name)
    params = list(layer.parameters())
    operator = EKFACLinearOperator(
        model,
        loss,
        params,
        [(X[:25], y[:25]), (X[25:], y[25:])],
        fisher_type="type-2",
        kfac_approx=approx,
        separate_weight_and_bias=False,
    )
    columns = hessian_columns(loss, model(X).detach(), y)
    J = flat_jacobian(model, params, X).reshape(40, 3, -1)
    gradients = torch.einsum("vnc,ncd->vnd", columns, J).flatten(0, 1)
    d_out, weights = layer.weight.shape[0], layer.weight.numel()
    full = torch.cat(
        [gradients[:, :weights].unflatten(1, (d_out, -1)), gradients[:, weights:].unsqueeze(2)], 2
    )
    v = torch.randn(operator.shape[1])
    V = torch.cat([v[:weights].reshape(d_out, -1), v[weights:, None]], 1)
    product = []
    for b, (A, G) in enumerate(dense_kfac(model, layer, X, columns, approx, True)):
        rows = slice(b * len(G), (b + 1) * len(G))
        Q_A, Q_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
        moments = sum((Q_G.T @ gradient[rows] @ Q_A).square() for gradient in full)
        product.append(Q_G @ (moments * (Q_G.T @ V[rows] @ Q_A)) @ Q_A.T)
    expected = torch.cat(product)
    expected = torch.cat([expected[:, :-1].flatten(), expected[:, -1]])
    assert torch.allclose(operator @ v, expected, atol=TOLERANCE)


SHAPES = {
    # name: (S, d_out, d_in): which of the ways is the cheapest
    "one-position": (1, 4, 5),
    "pairs": (2, 12, 13),
    "rotated-rows": (4, 5, 6),
    "rotated-gradients": (60, 3, 4),
}


@pytest.mark.parametrize("chunk", [1, 300, 2**24])
@pytest.mark.parametrize("identity", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", SHAPES)
def test_second_moments_are_those_of_each_datums_gradient(name, identity, chunk, monkeypatch):
    monkeypatch.setattr(eigenvalues, "CHUNK_ENTRIES", chunk)
    S, d_out, d_in = SHAPES[name]
    g, a = torch.randn(2, 7, S, d_out), torch.randn(2, 7, S, d_in)
    bases = [torch.linalg.qr(torch.randn(2, d, d))[0] for d in (d_out, d_in)]
    given = tuple(None if i in identity else q for i, q in enumerate(bases))
    Q = [torch.eye(q.shape[-1]).expand_as(q) if i in identity else q for i, q in enumerate(bases)]
    expected = torch.zeros(2, d_out, d_in)
    for b in range(2):
        for n in range(7):
            gradient = sum(torch.outer(g[b, n, s], a[b, n, s]) for s in range(S))
            expected[b] += (Q[0][b].T @ gradient @ Q[1][b]).square()
    assert torch.allclose(gradient_second_moments(g, a, given), expected, atol=TOLERANCE)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_batches_and_repetition_do_not_matter(fisher_type):
    model = nn.Sequential(LINEAR(4, 5), nn.Tanh(), LINEAR(5, 3))
    X, y = torch.randn(30, 4), torch.randint(3, (30,))
    results = []
    for data in ([(X, y)], [(X[:7], y[:7]), (X[7:], y[7:])]):
        operator = operators(model, nn.CrossEntropyLoss(), data, fisher_type=fisher_type)[1]
        results.append(to_dense(operator))
        assert torch.equal(results[-1], to_dense(operator))
    assert torch.allclose(*results, atol=TOLERANCE)


def test_empirical_is_the_diagonal_of_the_gradients_covariance():
    model = LINEAR(4, 3)
    X, y, loss = torch.randn(30, 4), torch.randint(3, (30,)), nn.CrossEntropyLoss()
    ekfac = operators(model, loss, [(X, y)], fisher_type="empirical")[1]
    rows = []
    for n in range(30):
        grads = torch.autograd.grad(loss(model(X[n : n + 1]), y[n : n + 1]), model.parameters())
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    covariance = torch.stack(rows).T @ torch.stack(rows) / 30
    matrix = to_dense(ekfac)
    for block in (slice(0, 12), slice(12, 15)):
        values, basis = torch.linalg.eigh(matrix[block, block])
        diagonal = (basis.T @ covariance[block, block] @ basis).diagonal()
        assert torch.allclose(values, diagonal, atol=TOLERANCE)


def test_mc_approaches_type_2():
    model = nn.Sequential(LINEAR(4, 5), nn.Tanh(), LINEAR(5, 3))
    X, y, loss = torch.randn(20, 4), torch.randint(3, (20,)), nn.CrossEntropyLoss()
    exact = to_dense(operators(model, loss, [(X, y)])[1])
    sampled = operators(model, loss, [(X, y)], fisher_type="mc", mc_samples=MC_SAMPLES)[1]
    assert (to_dense(sampled) - exact).norm() < MC_RELATIVE_ERROR * exact.trace()


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
def test_algebra(separate):
    model = nn.Sequential(LINEAR(4, 5), nn.Tanh(), LINEAR(5, 3))
    X, y = torch.randn(40, 4), torch.rand(40, 3)
    options = {"separate_weight_and_bias": separate}
    ekfac = operators(model, nn.MSELoss(), [(X, y)], **options)[1]
    matrix = to_dense(ekfac)
    damped = matrix + 0.1 * torch.eye(len(matrix))
    inverse = ekfac.inverse(0.1)
    assert torch.allclose(to_dense(inverse), torch.linalg.inv(damped), atol=TOLERANCE)
    assert torch.allclose(inverse.logdet(), -torch.logdet(damped))
    assert torch.allclose(ekfac.trace(), matrix.trace())
    assert torch.allclose(ekfac.logdet(), torch.logdet(matrix))
    assert torch.allclose(ekfac.det(), torch.linalg.det(matrix))
    assert torch.allclose(ekfac.frobenius_norm(), matrix.norm())
    with pytest.raises(ValueError, match="method must be"):
        ekfac.inverse(0.1, method="factored")
    with pytest.raises(ValueError, match="damping must"):
        ekfac.inverse(-0.1)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_a_singular_matrix_is_singular(kfac_approx):
    """Three data in four and six dimensions: what they lack comes out as noise, of either sign."""
    model = nn.Sequential(LINEAR(4, 6), nn.Tanh(), LINEAR(6, 3))
    X, y = torch.randn(3, 4), torch.rand(3, 3)
    for operator in operators(model, nn.MSELoss(), [(X, y)], kfac_approx=kfac_approx):
        assert operator.logdet() == -torch.inf
        assert operator.det() == 0.0
        with pytest.raises(DecompositionError, match="singular"):
            operator.inverse(0.0, method="exact")
        assert operator.inverse(1e-3, method="exact").logdet().isfinite()
