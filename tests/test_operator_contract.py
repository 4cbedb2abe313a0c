"""What every linear operator must do, checked against its dense matrix in float64.

A new operator joins by one row in `CASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import dense_curvature
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.linalg import expm
from scipy.sparse import csr_array
from scipy.sparse.linalg import (
    aslinearoperator,
    cg,
    eigsh,
    expm_multiply,
    lsmr,
    minres,
    svds,
)
from torch import nn

from kfacopt import (
    CGInverseLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    NeumannInverseLinearOperator,
    SubmatrixLinearOperator,
    TransposedJacobianLinearOperator,
)
from kfacopt.experimental import ActivationHessianLinearOperator
from kfacopt.likelihoods import likelihood_of
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.structured import DenseLinearOperator, operator_from

# The row of the Neumann series is about the polynomial that five terms are, far from an inverse.
pytestmark = pytest.mark.filterwarnings("ignore::kfacopt.NeumannConvergenceWarning")

TOLERANCE = 1e-9  # relative to the largest entry; operators compute in float64
FLOAT32_TOLERANCE = 1e-4
SOLVER_TOLERANCE = 1e-5  # of SciPy's iterative methods
ITERATION_TOL = 1e-6  # their residuals; eigenvalues are better than that, in clusters as well
SVDS_TOL = {"arpack": ITERATION_TOL, "lobpcg": 3 * ITERATION_TOL**0.5}  # lobpcg squares it
COLUMNS = 3
DAMPING = 0.1

Pair = tuple[LinearOperator, np.ndarray]


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def positive_definite(size: int = 12, seed: int = 0) -> torch.Tensor:
    root = random_matrix(size, size, seed)
    return root @ root.T / size + 0.5 * torch.eye(size, dtype=torch.float64)


def dense(matrix: torch.Tensor, dtype: torch.dtype) -> DenseLinearOperator:
    return DenseLinearOperator(matrix.to(dtype))


def mlp(dtype: torch.dtype) -> tuple[nn.Sequential, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    X, y = torch.randn(7, 3, dtype=dtype), torch.randint(2, (7,))
    return model, [(X[:5], y[:5]), (X[5:], y[5:])]


def ggn(dtype: torch.dtype) -> Pair:
    model, data = mlp(dtype)
    op = GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    model64, _ = mlp(torch.float64)
    names = [name for name, _ in model64.named_parameters()]
    theta = torch.cat([p.detach().flatten() for p in model.double().parameters()])
    sizes = [p.numel() for p in model64.parameters()]
    shapes = [p.shape for p in model64.parameters()]
    X = torch.cat([x for x, _ in data]).double()

    def logits(vector):
        pieces = vector.split(sizes)
        state = {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return torch.func.functional_call(model64, state, (X,))

    J = torch.func.jacrev(logits)(theta)  # [N, C, D]
    p = logits(theta).softmax(1)
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    matrix = torch.einsum("ncd,nce,nef->df", J, H, J) / len(X)
    model.to(dtype)
    return op, matrix.detach().numpy()


def curvature(kind: Callable, oracle: Callable) -> Callable:
    """An exact operator of the small network and its matrix by double loops in float64."""

    def build(dtype: torch.dtype) -> Pair:
        model, data = mlp(dtype)
        op = kind(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
        model64, _ = mlp(torch.float64)
        data64 = [(X.double(), y) for X, y in data]
        return op, oracle(model64, list(model64.parameters()), data64).numpy()

    return build


def cross_entropy_matrix(function: Callable) -> Callable:
    return lambda model, params, data: function(model, nn.CrossEntropyLoss(), params, data)


def sampled_fisher(model, params, data) -> torch.Tensor:
    """With the labels that the seed draws, batch by batch."""
    likelihood = likelihood_of(nn.CrossEntropyLoss(reduction="sum"))
    generator = torch.Generator().manual_seed(2147483647)
    us = []
    for X, y in data:
        z = model(X).detach()
        us.append(likelihood.sample_gradient(z, likelihood.term_weights(z, y), generator))
    u = torch.cat(us)
    J = dense_curvature.jacobian(model, params, data).reshape(*u.shape, -1)
    rows = torch.einsum("nc,ncd->nd", u, J)
    return rows.T @ rows / len(u)


def jacobian_operator(model, _, params, data) -> JacobianLinearOperator:
    return JacobianLinearOperator(model, params, data)


def transposed_jacobian_operator(model, _, params, data) -> TransposedJacobianLinearOperator:
    return TransposedJacobianLinearOperator(model, params, data)


def activation_hessian(dtype: torch.dtype) -> Pair:
    model, data = mlp(dtype)
    op = ActivationHessianLinearOperator(model, nn.CrossEntropyLoss(), ("0", "output", 0), data[:1])
    model64, _ = mlp(torch.float64)
    X, y = data[0]
    rest = model64[1:]
    matrix = dense_curvature.activation_hessian(
        lambda z: nn.functional.cross_entropy(rest(z), y), model64[0](X.double())
    )
    return op, matrix.numpy()


def kfac_operator(dtype: torch.dtype) -> KFACLinearOperator:
    model, data = mlp(dtype)
    params = list(model.parameters())
    return KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data, fisher_type="type-2")


def block_diagonal(op: KFACLinearOperator, weights: Callable, biases: Callable) -> np.ndarray:
    blocks = []
    for name in op.layer_names:
        A, G = (factor.double() for factor in op.factors(name))
        blocks += [weights(G, A), biases(G)]
    return torch.block_diag(*blocks).numpy()


def kfac(dtype: torch.dtype) -> Pair:
    op = kfac_operator(dtype)
    return op, block_diagonal(op, torch.kron, lambda G: G)


def kfac_inverse(dtype: torch.dtype) -> Pair:
    op = kfac_operator(dtype)

    def damped_inverse(matrix):
        return torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype))

    matrix = block_diagonal(op, lambda G, A: damped_inverse(torch.kron(G, A)), damped_inverse)
    return op.inverse(DAMPING, method="exact"), matrix


def ekfac(dtype: torch.dtype) -> Pair:
    """By the eigenvectors of K-FAC's blocks and the diagonal of the exact ones in them."""
    model, data = mlp(dtype)
    params = list(model.parameters())
    op = EKFACLinearOperator(model, nn.CrossEntropyLoss(), params, data, fisher_type="type-2")
    exact = torch.from_numpy(ggn(dtype)[1])
    model64, _ = mlp(torch.float64)
    data64 = [(X.double(), y) for X, y in data]
    op64 = KFACLinearOperator(
        model64, nn.CrossEntropyLoss(), list(model64.parameters()), data64, fisher_type="type-2"
    )
    blocks, start = [], 0
    for name in op64.layer_names:
        bases = [torch.linalg.eigh(factor)[1] for factor in op64.factors(name)]
        for Q in (torch.kron(bases[1], bases[0]), bases[1]):
            own = slice(start, start := start + len(Q))
            blocks.append(Q @ torch.diag((Q.T @ exact[own, own] @ Q).diagonal()) @ Q.T)
    return op, torch.block_diag(*blocks).numpy()


def damped_ggn(dtype: torch.dtype) -> Pair:
    op, matrix = ggn(dtype)
    return op + DAMPING * IdentityLinearOperator(op), matrix + DAMPING * np.eye(len(matrix))


def cg_inverse(dtype: torch.dtype) -> Pair:
    op, matrix = damped_ggn(dtype)
    inverse = CGInverseLinearOperator(op)
    inverse.set_cg_hyperparameters(tol=1e-12 if dtype == torch.float64 else 1e-5)
    return inverse, np.linalg.inv(matrix)


def neumann_inverse(dtype: torch.dtype) -> Pair:
    matrix = (positive_definite() + 0.1 * random_matrix(12, 12, seed=1)).numpy()
    op = dense(torch.from_numpy(matrix), dtype)
    terms, scale = 5, 0.2
    factor = np.eye(12) - scale * matrix
    series = scale * sum(np.linalg.matrix_power(factor, k) for k in range(terms + 1))
    return NeumannInverseLinearOperator(op, num_terms=terms, scale=scale), series


def submatrix(dtype: torch.dtype) -> Pair:
    matrix = random_matrix(12, 15)
    rows, columns = [7, 0, 3, 4, 11, 2, 9], [14, 2, 5, 1, 8, 0, 12, 7, 3]
    op = SubmatrixLinearOperator(dense(matrix, dtype), rows, columns)
    return op, matrix.numpy()[rows][:, columns]


def principal_submatrix(dtype: torch.dtype) -> Pair:
    op, matrix = damped_ggn(dtype)
    idxs = [20, 3, 4, 0, 17, 11, 9, 25]
    return SubmatrixLinearOperator(op, idxs, idxs), matrix[np.ix_(idxs, idxs)]


def general_sum(dtype: torch.dtype) -> Pair:
    first, second = random_matrix(9, 12), random_matrix(9, 12, seed=1)
    return dense(first, dtype) - 2.0 * dense(second, dtype), (first - 2 * second).numpy()


def general_product(dtype: torch.dtype) -> Pair:
    first, second = random_matrix(9, 11), random_matrix(11, 12, seed=1)
    return dense(first, dtype) @ dense(second, dtype), (first @ second).numpy()


def mixed_product(dtype: torch.dtype) -> Pair:
    op, matrix = kfac(dtype)
    other = positive_definite(len(matrix)).numpy()
    return op @ aslinearoperator(other), matrix @ other


def foreign(dtype: torch.dtype) -> Pair:
    matrix = random_matrix(9, 12).numpy()
    return operator_from(csr_array(matrix), dtype=dtype), matrix


@dataclass(frozen=True)
class Case:
    """An operator and its matrix.

    Attributes:
        build: Gives both for a dtype of the operator; the matrix is always float64.
        symmetric: Whether the matrix is.
        definite: Whether it is symmetric and positive definite.
        lists: Whether the operator maps lists of parameter tensors to such lists.
    """

    build: Callable[[torch.dtype], Pair]
    symmetric: bool = False
    definite: bool = False
    lists: bool = False


def from_matrix(build: Callable[[LinearOperator], LinearOperator], oracle: Callable) -> Callable:
    """Derive an operator and its matrix from a 12 × 12 positive definite one."""
    matrix = positive_definite()
    return lambda dtype: (build(dense(matrix, dtype)), oracle(matrix.numpy()))


CASES = {
    "dense": Case(lambda dtype: (dense(random_matrix(9, 12), dtype), random_matrix(9, 12).numpy())),
    "identity": Case(
        from_matrix(IdentityLinearOperator, lambda A: np.eye(len(A))),
        symmetric=True,
        definite=True,
    ),
    "foreign": Case(foreign),
    "adjoint": Case(
        lambda dtype: (dense(random_matrix(9, 12), dtype).T, random_matrix(9, 12).numpy().T)
    ),
    "scaled": Case(from_matrix(lambda A: -0.5 * A, lambda A: -0.5 * A), symmetric=True),
    "sum": Case(general_sum),
    "product": Case(general_product),
    "product with SciPy's": Case(mixed_product, lists=True),
    "power": Case(from_matrix(lambda A: A**3, lambda A: A @ A @ A), symmetric=True, definite=True),
    "power 0": Case(
        from_matrix(lambda A: A**0, lambda A: np.eye(len(A))), symmetric=True, definite=True
    ),
    "submatrix": Case(submatrix),
    "principal submatrix": Case(principal_submatrix, symmetric=True, definite=True),
    "CG inverse": Case(cg_inverse, symmetric=True, definite=True, lists=True),
    "Neumann inverse": Case(neumann_inverse),
    "GGN": Case(ggn, symmetric=True, lists=True),
    "Hessian": Case(
        curvature(HessianLinearOperator, cross_entropy_matrix(dense_curvature.hessian)),
        symmetric=True,
        lists=True,
    ),
    "EF": Case(
        curvature(EFLinearOperator, cross_entropy_matrix(dense_curvature.empirical_fisher)),
        symmetric=True,
        lists=True,
    ),
    "FisherMC": Case(curvature(FisherMCLinearOperator, sampled_fisher), symmetric=True, lists=True),
    "Jacobian": Case(curvature(jacobian_operator, dense_curvature.jacobian), lists=True),
    "transposed Jacobian": Case(
        curvature(
            transposed_jacobian_operator,
            lambda *arguments: dense_curvature.jacobian(*arguments).T,
        ),
        lists=True,
    ),
    "activation Hessian": Case(activation_hessian, symmetric=True, lists=True),
    "damped GGN": Case(damped_ggn, symmetric=True, definite=True, lists=True),
    "KFAC": Case(kfac, symmetric=True, lists=True),
    "EKFAC": Case(ekfac, symmetric=True, lists=True),
    "KFAC inverse": Case(kfac_inverse, symmetric=True, definite=True, lists=True),
}


def cases(**properties: bool) -> list:
    wanted = properties.items()
    return [
        pytest.param(case, id=name)
        for name, case in CASES.items()
        if all(getattr(case, key) == value for key, value in wanted)
    ]


every_case = pytest.mark.parametrize("case", cases())


@pytest.fixture
def pair(case: Case) -> Pair:
    return case.build(torch.float64)


def columns_for(rows: int, seed: int = 5) -> np.ndarray:
    return random_matrix(rows, COLUMNS, seed).numpy()


def assert_close(actual, expected, tolerance: float = TOLERANCE) -> None:
    if isinstance(actual, torch.Tensor):
        actual = actual.resolve_conj().numpy()
    assert actual.shape == expected.shape
    scale = max(np.abs(expected).max(), 1.0) if expected.size else 1.0
    assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


# Arrays ---------------------------------------------------------------------------------------


def strided(X):
    return np.repeat(X, 2, axis=0)[::2]


def reversed_twice(X):
    return np.ascontiguousarray(X[::-1])[::-1]


def read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "strided": strided,
    "negative stride": reversed_twice,
    "read-only": read_only,
    "other byte order": lambda X: X.astype(X.dtype.newbyteorder()),
}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_arrays(pair, layout):
    op, matrix = pair
    X = columns_for(op.shape[1])
    before = X.copy()
    for x in (X, X[:, :1], X[:, 0]):
        product = op @ layout(x)
        assert isinstance(product, np.ndarray)
        assert product.dtype == np.float64
        assert_close(product, matrix @ x)
    assert_close(op.matvec(layout(X[:, 0])), matrix @ X[:, 0])
    assert_close(op.matmat(layout(X)), matrix @ X)
    Y = columns_for(op.shape[0])
    for y in (Y, Y[:, :1], Y[:, 0]):
        assert_close(op.T @ layout(y), matrix.T @ y)
        assert_close(op.H @ layout(y), matrix.T @ y)
        assert_close(layout(y).T @ op, y.T @ matrix)
    assert_close(op.rmatvec(layout(Y[:, 0])), matrix.T @ Y[:, 0])
    assert_close(op.rmatmat(layout(Y)), matrix.T @ Y)
    assert np.array_equal(X, before)


@every_case
@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float16", "float32", "longdouble"])
def test_array_dtypes_are_promoted(pair, dtype):
    op, matrix = pair
    X = np.abs(4 * columns_for(op.shape[1])).astype(dtype)
    product = op @ X
    assert product.dtype == (np.longdouble if dtype == "longdouble" else np.float64)
    assert_close(product, matrix @ X.astype(np.float64))


@every_case
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_operands(pair, dtype):
    op, matrix = pair
    X = (columns_for(op.shape[1]) + 1j * columns_for(op.shape[1], seed=6)).astype(dtype)
    Y = (columns_for(op.shape[0]) + 1j * columns_for(op.shape[0], seed=6)).astype(dtype)
    assert_close(op @ X, matrix @ X)
    assert_close(op @ X[:, 0], matrix @ X[:, 0])
    assert_close(op.H @ Y, matrix.T @ Y)
    assert_close(Y.T @ op, Y.T @ matrix)
    assert_close(op @ torch.from_numpy(X), matrix @ X)
    assert_close(op @ torch.from_numpy(X[:, 0]).conj(), matrix @ X[:, 0].conj())
    assert (op @ torch.from_numpy(X)).dtype == torch.complex128


@every_case
def test_operands_that_are_no_numbers_are_refused(pair):
    op, _ = pair
    with pytest.raises((TypeError, ValueError)):
        op @ np.array(["a"] * op.shape[1])
    with pytest.raises((TypeError, ValueError)):
        op @ np.full(op.shape[1], None)


# Tensors and lists ----------------------------------------------------------------------------


@every_case
def test_tensors(pair):
    op, matrix = pair
    X, Y = (torch.from_numpy(columns_for(n)) for n in (op.shape[1], op.shape[0]))
    before = X.clone()
    for x in (X, X[:, :1], X[:, 0], X[:, ::2], X.mT.contiguous().mT):
        product = op @ x
        assert isinstance(product, torch.Tensor)
        assert product.dtype == torch.float64
        assert product.device == op.device
        assert_close(product, matrix @ x.numpy())
    for y in (Y, Y[:, :1], Y[:, 0], Y[:, ::2]):
        assert_close(op.T @ y, matrix.T @ y.numpy())
        assert_close(op.H @ y, matrix.T @ y.numpy())
        assert_close(y.mT @ op if y.ndim == 2 else y @ op, y.numpy().T @ matrix)
    assert_close(op.matvec(X[:, 0]), matrix @ X[:, 0].numpy())
    assert_close(op.rmatmat(Y), matrix.T @ Y.numpy())
    product = op @ X
    product += 1
    assert torch.equal(X, before), "the product shares memory with the operand"


@every_case
@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32],
    ids=str,
)
def test_tensor_dtypes_are_promoted(pair, dtype):
    op, matrix = pair
    X = (4 * torch.from_numpy(columns_for(op.shape[1])).abs()).to(dtype)
    product = op @ X
    assert product.dtype == torch.float64
    assert_close(product, matrix @ X.double().numpy())


@every_case
def test_float32_operators(case):
    op, matrix = case.build(torch.float32)
    X = columns_for(op.shape[1])
    assert op.torch_dtype == torch.float32
    for x, dtype in ((X, np.float64), (X.astype(np.float32), np.float32)):
        product = op @ x
        assert product.dtype == dtype
        assert_close(product, matrix @ X, FLOAT32_TOLERANCE)
        assert (op @ torch.from_numpy(x)).numpy().dtype == dtype


@every_case
def test_no_graph(pair):
    op, _ = pair
    assert not (op @ torch.ones(op.shape[1], dtype=torch.float64, requires_grad=True)).requires_grad


@pytest.mark.parametrize("case", cases(lists=True))
def test_lists(pair):
    op, matrix = pair
    for product, M, shapes, out in (
        (lambda x: op @ x, matrix, op.in_shapes, op.out_shapes),
        (lambda x: op.T @ x, matrix.T, op.out_shapes, op.in_shapes),
    ):
        X = torch.from_numpy(columns_for(M.shape[1]))
        sizes = [int(np.prod(shape)) for shape in shapes]
        many = [p.reshape(*s, COLUMNS) for p, s in zip(X.split(sizes), shapes, strict=True)]
        one = [p[..., 0] for p in many]
        many_result, one_result = product(many), product(one)
        assert [tuple(t.shape) for t in one_result] == [tuple(s) for s in out]
        assert_close(torch.cat([t.reshape(-1) for t in one_result]), M @ X[:, 0].numpy())
        assert_close(torch.cat([t.reshape(-1, COLUMNS) for t in many_result]), M @ X.numpy())
    with pytest.raises(ValueError, match="parameter tensors"):
        op @ ([torch.ones(3)] * (len(op.in_shapes) + 1))
    with pytest.raises(ValueError, match=r"x\[0\] must have the shape"):
        op @ [torch.ones(99), *[torch.ones(s) for s in op.in_shapes[1:]]]


@pytest.mark.parametrize("case", cases(lists=False))
def test_lists_are_refused_where_there_are_no_parameters(pair):
    op, _ = pair
    with pytest.raises(TypeError, match="lists of parameter tensors"):
        op @ [torch.ones(op.shape[1])]


# Arithmetic -----------------------------------------------------------------------------------


@every_case
def test_arithmetic(pair):
    op, matrix = pair
    derived = {
        "0.5 * op": (0.5 * op, 0.5 * matrix),
        "op * 0.5": (op * 0.5, 0.5 * matrix),
        "2 * op": (2 * op, 2 * matrix),
        "tensor scalar": (torch.tensor(0.5) * op, 0.5 * matrix),
        "-op": (-op, -matrix),
        "op / 2": (op / 2, matrix / 2),
        "op / tensor": (op / torch.tensor(2.0), matrix / 2),
        "op + op": (op + op, 2 * matrix),
        "op - 3 op": (op - 3 * op, -2 * matrix),
        "op.T @ op": (op.T @ op, matrix.T @ matrix),
        "op @ op.H": (op @ op.H, matrix @ matrix.T),
        "op + SciPy's": (op + aslinearoperator(matrix), 2 * matrix),
        "op @ SciPy's": (op @ aslinearoperator(matrix.T), matrix @ matrix.T),
    }
    if op.shape[0] == op.shape[1]:
        derived["op @ op"] = (op @ op, matrix @ matrix)
        derived["op ** 2"] = (op**2, matrix @ matrix)
    for name, (result, expected) in derived.items():
        assert isinstance(result, LinearOperator), name
        X = columns_for(expected.shape[1])
        assert_close(result @ X, expected @ X)
        assert_close(result @ torch.from_numpy(X), expected @ X)
        Y = columns_for(expected.shape[0])
        assert_close(result.T @ torch.from_numpy(Y), expected.T @ Y)


@every_case
def test_wrong_operands_are_refused(pair):
    op, _ = pair
    rows, columns = op.shape
    for wrong in (np.ones(columns + 1), np.ones((columns + 1, 2)), np.ones((1, columns, 1, 1))):
        with pytest.raises(ValueError, match=r"(?i)dimension mismatch|expected"):
            op @ wrong
        with pytest.raises(ValueError, match="x must have the shape"):
            op @ torch.from_numpy(wrong)
    with pytest.raises(ValueError, match="x must have the shape"):
        torch.ones(rows + 1, dtype=torch.float64) @ op
    with pytest.raises(ValueError, match="Scalar operands"):
        op @ 2.0
    with pytest.raises(ValueError, match="real"):
        1j * op
    with pytest.raises(TypeError):
        op / np.ones(columns)
    with pytest.raises(ValueError, match="cannot add"):
        op + aslinearoperator(np.ones((rows + 1, columns)))
    with pytest.raises(ValueError, match="cannot multiply"):
        op @ aslinearoperator(np.ones((columns + 1, 2)))
    with pytest.raises(ValueError, match=r"exponent|square"):
        op**-1


# SciPy's methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(symmetric=True))
def test_scipy_eigsh(pair):
    op, matrix = pair
    values = np.sort(np.linalg.eigvalsh(matrix))
    start = np.random.default_rng(0).standard_normal(len(matrix))
    if np.ptp(values) < TOLERANCE:
        pytest.skip("ARPACK does not take multiples of the identity")
    for which, exact in (("LA", values[-1:]), ("SA", values[:1])):
        options = {"which": which, "return_eigenvectors": False, "tol": ITERATION_TOL}
        assert_close(eigsh(op, k=1, v0=start, **options), exact, SOLVER_TOLERANCE)


@every_case
@pytest.mark.parametrize("solver", ["arpack", "lobpcg"])
def test_scipy_svds(pair, solver):
    op, matrix = pair
    values = np.linalg.svd(matrix, compute_uv=False)
    if np.ptp(values) < TOLERANCE:
        pytest.skip("multiples of the identity are not for iterative methods")
    options = {
        "k": 1,
        "solver": solver,
        "maxiter": 200,
        "tol": SVDS_TOL[solver],
        "return_singular_vectors": False,
    }
    found = svds(op, v0=np.random.default_rng(0).standard_normal(min(op.shape)), **options)
    assert_close(found, values[:1], SOLVER_TOLERANCE)


@pytest.mark.parametrize("case", cases(definite=True))
@pytest.mark.parametrize("solve", [cg, minres], ids=["cg", "minres"])
def test_scipy_solvers_of_definite_systems(pair, solve):
    op, matrix = pair
    b = columns_for(op.shape[0])[:, 0]
    x, failed = solve(op, b, rtol=1e-10)
    assert failed == 0
    assert_close(x, np.linalg.solve(matrix, b), SOLVER_TOLERANCE)


@every_case
def test_scipy_lsmr(pair):
    op, matrix = pair
    b = columns_for(op.shape[0])[:, 0]
    x = lsmr(op, b, damp=DAMPING, atol=1e-12, btol=1e-12, maxiter=1000)[0]
    gram = matrix.T @ matrix + DAMPING**2 * np.eye(matrix.shape[1])
    assert_close(x, np.linalg.solve(gram, matrix.T @ b), SOLVER_TOLERANCE)


@every_case
def test_scipy_expm_multiply(pair):
    op, matrix = pair
    if op.shape[0] != op.shape[1]:
        op, matrix = op.T @ op, matrix.T @ matrix
    scale = 1 / np.linalg.norm(matrix, 2)
    X = columns_for(op.shape[1])
    product = expm_multiply(scale * op, X, traceA=scale * np.trace(matrix))
    assert_close(product, expm(scale * matrix) @ X, SOLVER_TOLERANCE)
