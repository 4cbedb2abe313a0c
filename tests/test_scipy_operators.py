"""SciPy's operators, however they are defined, in every tool; against their matrices in float64."""

import numpy as np
import pytest
import torch
from scipy.fft import dct, idct
from scipy.sparse import coo_array, csc_matrix, csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from kfacopt import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    HutchinsonDiagonalEstimator,
    HutchinsonTraceEstimator,
    HutchPPTraceEstimator,
    IdentityLinearOperator,
    NeumannInverseLinearOperator,
    SubmatrixLinearOperator,
)
from kfacopt.estimators.lanczos import lanczos_quadrature
from kfacopt.linalg.scipy_products import multiplies_matrices
from kfacopt.linalg.structured import DenseLinearOperator, operator_from

SIZE = 12
EXACT = 1e-12
SOLVED = 1e-8  # relative error of a solution whose residual is 1e-10 of b, at a condition of 3

DIAGONAL = np.linspace(0.5, 1.5, SIZE)
GENERAL = np.diag(DIAGONAL) + np.random.default_rng(0).uniform(-0.02, 0.02, (SIZE, SIZE))
COSINES = dct(np.eye(SIZE), norm="ortho", axis=0)


@pytest.fixture(autouse=True)
def _seeded_numpy():
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    yield
    np.random.set_state(before)  # noqa: NPY002


def only_vectors(function):
    """Refuse what no function of vectors has to take."""

    def multiply(v):
        assert v.ndim == 1
        return function(v)

    return multiply


def of_vectors(matrix=GENERAL, **options) -> LinearOperator:
    return LinearOperator(
        matrix.shape,
        matvec=only_vectors(lambda v: matrix @ v),
        rmatvec=only_vectors(lambda v: matrix.T @ v),
        dtype=float,
        **options,
    )


class OfVectors(LinearOperator):
    def __init__(self):
        super().__init__(float, GENERAL.shape)

    _matvec = staticmethod(only_vectors(lambda v: GENERAL @ v))
    _rmatvec = staticmethod(only_vectors(lambda v: GENERAL.T @ v))


class WithAdjoint(LinearOperator):
    def __init__(self):
        super().__init__(None, GENERAL.shape)  # no dtype either

    _matvec = staticmethod(only_vectors(lambda v: GENERAL @ v))

    def _adjoint(self):
        return of_vectors(GENERAL.T)


class OfMatrices(LinearOperator):
    def __init__(self):
        super().__init__(float, GENERAL.shape)

    def _matmat(self, X):
        return GENERAL @ X

    def _rmatmat(self, X):
        return GENERAL.T @ X


class LooksLikeOne:
    """What `scipy.sparse.linalg.aslinearoperator` takes as well."""

    shape, dtype = GENERAL.shape, np.dtype(float)
    matvec = staticmethod(only_vectors(lambda v: GENERAL @ v))
    rmatvec = staticmethod(only_vectors(lambda v: GENERAL.T @ v))


def in_place(v):
    v *= DIAGONAL
    return v


def into_one_buffer():
    buffer = np.empty(SIZE)
    return lambda v: np.matmul(GENERAL, v, out=buffer)


def custom(matvec, rmatvec):
    return LinearOperator(GENERAL.shape, matvec=matvec, rmatvec=rmatvec, dtype=float)


DOUBLED = 2 * np.eye(SIZE)
OPERATORS = {
    "functions of vectors": (of_vectors(), GENERAL),
    "elementwise": (custom(lambda v: DIAGONAL * v, lambda v: DIAGONAL * v), np.diag(DIAGONAL)),
    "along the last axis": (
        custom(lambda v: v + dct(v, norm="ortho") / 4, lambda v: v + idct(v, norm="ortho") / 4),
        np.eye(SIZE) + COSINES / 4,
    ),
    "columns": (custom(lambda v: 2 * v[:, None], lambda v: 2 * v[:, None]), DOUBLED),
    "in place": (custom(in_place, in_place), np.diag(DIAGONAL)),
    "the argument itself": (custom(lambda v: v, lambda v: v), np.eye(SIZE)),
    "one buffer": (custom(into_one_buffer(), lambda v: GENERAL.T @ v), GENERAL),
    "no dtype": (
        LinearOperator(GENERAL.shape, lambda v: GENERAL @ v, lambda v: GENERAL.T @ v),
        GENERAL,
    ),
    "class": (OfVectors(), GENERAL),
    "class with an adjoint": (WithAdjoint(), GENERAL),
    "class of matrices": (OfMatrices(), GENERAL),
    "no operator": (LooksLikeOne(), GENERAL),
    "matmat and rmatmat": (
        of_vectors(matmat=lambda X: GENERAL @ X, rmatmat=lambda X: GENERAL.T @ X),
        GENERAL,
    ),
    "matmat alone": (of_vectors(matmat=lambda X: GENERAL @ X), GENERAL),
    "adjoint": (of_vectors(GENERAL.T).H, GENERAL),
    "transpose": (of_vectors(GENERAL.T).T, GENERAL),
    "transpose of a class": (OfVectors().T, GENERAL.T),
    "adjoint of a class": (OfVectors().H, GENERAL.T),
    "sum": (of_vectors() + aslinearoperator(DOUBLED), GENERAL + DOUBLED),
    "product": (aslinearoperator(GENERAL) @ OfVectors(), GENERAL @ GENERAL),
    "scaled": (0.5 * OfVectors(), 0.5 * GENERAL),
    "power": (of_vectors() ** 2, GENERAL @ GENERAL),
    "all of it": (
        (2 * of_vectors().T @ OfVectors() - OfVectors() ** 2).T,
        (2 * GENERAL.T @ GENERAL - GENERAL @ GENERAL).T,
    ),
    "ours among SciPy's": (
        of_vectors() @ DenseLinearOperator(torch.from_numpy(DOUBLED)),
        2 * GENERAL,
    ),
    "array": (GENERAL, GENERAL),
    "matrix of arrays": (aslinearoperator(GENERAL), GENERAL),
    "sparse array": (csr_array(GENERAL), GENERAL),
    "sparse matrix": (csc_matrix(GENERAL), GENERAL),
    "sparse integers": (csr_array(DOUBLED.astype(int)), DOUBLED),
}
CASES = pytest.mark.parametrize(("A", "matrix"), OPERATORS.values(), ids=OPERATORS)


def close(result, expected, tolerance=EXACT) -> bool:
    return bool(np.abs(np.asarray(result) - expected).max() <= tolerance * np.abs(expected).max())


@CASES
@pytest.mark.parametrize("columns", [(), (1,), (4,), (0,)], ids=["vector", "one", "four", "none"])
def test_products(A, matrix, columns):
    op = operator_from(A)
    X = np.random.default_rng(1).standard_normal((SIZE, *columns))
    tensor = torch.from_numpy(X.copy())
    derived = op + 0.5 * IdentityLinearOperator(op)
    pairs = [
        (op, matrix),
        (op.T, matrix.T),
        (op.H, matrix.T),
        (derived, matrix + np.eye(SIZE) / 2),
        (op @ op.T, matrix @ matrix.T),
        (op**2, matrix @ matrix),
    ]
    for derived_op, dense in pairs:
        result = derived_op @ tensor
        assert result.shape == X.shape
        if X.size:
            assert close(result, dense @ X)
            assert close(derived_op @ X, dense @ X)
            assert close(X.T @ derived_op, X.T @ dense)
            assert close(derived_op @ (X + 2j * X[::-1]), dense @ (X + 2j * X[::-1]))
            first = derived_op @ tensor
            derived_op @ -tensor
            assert torch.equal(first, result)  # no buffer of the function's is handed out
            first.zero_()
    assert np.array_equal(tensor, X)  # nor is the operand


@CASES
def test_tools(A, matrix):
    inverse = np.linalg.inv(matrix)
    neumann = NeumannInverseLinearOperator(A, num_terms=300, scale=0.3)
    assert close(neumann @ np.eye(SIZE), inverse, SOLVED)
    assert close(neumann.T @ np.eye(SIZE), inverse.T, SOLVED)
    rows, columns = [3, 0, 7], [1, 2]
    part = SubmatrixLinearOperator(A, rows, columns)
    assert close(part @ np.eye(2), matrix[np.ix_(rows, columns)])
    assert close(part.T @ np.eye(3), matrix[np.ix_(rows, columns)].T)

    assert np.isclose(HutchPPTraceEstimator(A, basis_dim=SIZE).sample(), np.trace(matrix))
    seen = []
    for estimate in (HutchinsonTraceEstimator(A).sample, HutchinsonDiagonalEstimator(A).sample):
        np.random.seed(1)  # noqa: NPY002
        v = 2.0 * np.random.binomial(1, 0.5, size=SIZE) - 1.0  # noqa: NPY002
        np.random.seed(1)  # noqa: NPY002
        seen.append((estimate(), v * (matrix @ v)))
    assert np.isclose(seen[0][0], seen[0][1].sum())
    assert close(*seen[1])


@CASES
def test_tools_for_symmetric_matrices(A, matrix):
    op = operator_from(A)
    normal, dense = op.T @ op + IdentityLinearOperator(op), matrix.T @ matrix + np.eye(SIZE)
    solver = CGInverseLinearOperator(normal)
    solver.set_cg_hyperparameters(tol=1e-10)
    assert close(solver @ np.eye(SIZE), np.linalg.inv(dense), SOLVED)
    if close(matrix, DOUBLED):
        solver.set_cg_hyperparameters(tol=1e-10, M=A)
        assert close(solver @ np.ones(SIZE), np.linalg.solve(dense, np.ones(SIZE)), SOLVED)
    values = np.linalg.eigvalsh(dense)
    nodes, _ = lanczos_quadrature(normal, SIZE)
    assert close(nodes[[0, -1]], values[[0, -1]], SOLVED)


def test_with_operators_of_a_model(float64):
    model, X, y = torch.nn.Linear(3, 3), torch.randn(5, 3), torch.randn(5, 3)
    ggn = GGNLinearOperator(model, torch.nn.MSELoss(), list(model.parameters()), [(X, y)])
    dense, x = ggn @ np.eye(SIZE), np.ones(SIZE)
    for A, matrix in OPERATORS.values():
        if isinstance(A, LinearOperator):
            assert close((ggn + A) @ x, (dense + matrix) @ x)
            assert close((ggn - A).T @ x, (dense - matrix).T @ x)
            assert close((ggn @ A) @ x, dense @ matrix @ x)
            assert close(x @ (ggn @ A), x @ dense @ matrix)
            assert close(operator_from(A @ ggn) @ x, matrix @ dense @ x)
            if A is not OPERATORS["in place"][0]:  # SciPy's sum gives both the same vector
                assert close(operator_from(A + ggn).T @ x, (matrix + dense).T @ x)


def test_products_with_matrices_stay_one_call():
    calls = []

    def matmat(X):
        calls.append(X.shape)
        return GENERAL @ X

    own = LinearOperator(GENERAL.shape, matvec=lambda v: GENERAL @ v, matmat=matmat, dtype=float)
    for A in (own, 2 * own, own + own, own @ aslinearoperator(DOUBLED), own**2):
        calls.clear()
        operator_from(A) @ np.eye(SIZE)
        assert set(calls) == {(SIZE, SIZE)}
    for A in (aslinearoperator(GENERAL), aslinearoperator(csr_array(GENERAL)), OfMatrices()):
        assert all(multiplies_matrices(B, adjoint) for B in (A, A.T, A.H) for adjoint in (0, 1))


def test_a_transpose_that_is_not_known_is_named():
    class NoTranspose(LinearOperator):
        def _matvec(self, x):
            return x

    forward = LinearOperator((2, 2), matvec=lambda v: v, dtype=float)
    for A in (forward, 2 * forward, NoTranspose(float, (2, 2))):
        op = operator_from(A)
        for multiply in (lambda op=op: op.T @ np.eye(2), lambda op=op: op.rmatvec(np.ones(2))):
            with pytest.raises(NotImplementedError, match=r"no products with its transpose.*rmatv"):
                multiply()


def test_results_that_are_none_are_refused():
    complex_result = LinearOperator((2, 2), matvec=lambda v: 1j * v, dtype=float)
    with pytest.raises(ValueError, match="complex operators cannot be combined"):
        operator_from(complex_result) @ np.ones(2)
    transposed = LinearOperator(
        (2, 3), matvec=lambda v: v[:2], matmat=lambda X: X[:2].T, dtype=float
    )
    with pytest.raises(ValueError, match=r"must have the shape \(2, 4\), got \(4, 2\)"):
        operator_from(transposed) @ np.ones((3, 4))
    with pytest.raises(ValueError, match=r"dimension|reshape"):
        operator_from(custom(lambda v: v[:-1], None)) @ np.ones(SIZE)
    for bad in (
        coo_array(np.ones(3)),
        np.ones(3, dtype=complex),
        np.ones((1, 2, 2), dtype=complex),
    ):
        with pytest.raises(ValueError, match="A must have two axes"):
            operator_from(bad)
    duck = LooksLikeOne()
    duck.dtype = np.dtype(complex)
    with pytest.raises(ValueError, match="A must be real"):
        operator_from(duck)
