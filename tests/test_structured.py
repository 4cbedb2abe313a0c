"""Sub-matrices, identities and the forms that a matrix may have."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator

from kfacopt import IdentityLinearOperator, SubmatrixLinearOperator
from kfacopt.linalg.structured import DenseLinearOperator, operator_from

MATRIX = torch.arange(20.0, dtype=torch.float64).reshape(4, 5)
ROWS, COLUMNS = [3, 0], [1, 4, 2]


@pytest.mark.parametrize(
    "form",
    [
        lambda M: M,
        lambda M: M.numpy(),
        lambda M: csr_array(M.numpy()),
        lambda M: aslinearoperator(M.numpy()),
        DenseLinearOperator,
    ],
    ids=["tensor", "array", "sparse", "SciPy", "ours"],
)
def test_submatrix(form):
    op = SubmatrixLinearOperator(form(MATRIX), ROWS, COLUMNS)
    expected = MATRIX[ROWS][:, COLUMNS]
    assert op.shape == (2, 3)
    assert torch.equal(op @ torch.eye(3, dtype=torch.float64), expected)
    assert torch.equal(op.T @ torch.eye(2, dtype=torch.float64), expected.T)
    np.testing.assert_array_equal(op @ np.eye(3), expected.numpy())


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_forms_of_indices(make):
    op = SubmatrixLinearOperator(MATRIX, make(ROWS), make(COLUMNS))
    assert torch.equal(op @ torch.eye(3, dtype=torch.float64), MATRIX[ROWS][:, COLUMNS])


def test_submatrix_can_be_set_anew():
    op = SubmatrixLinearOperator(MATRIX, ROWS, COLUMNS)
    op.set_submatrix([1], range(5))
    assert op.shape == (1, 5)
    assert torch.equal(op @ torch.eye(5, dtype=torch.float64), MATRIX[1:2])
    op.set_submatrix([], [0, 2])
    assert (op @ torch.ones(2, dtype=torch.float64)).shape == (0,)
    assert torch.equal(op.T @ torch.ones(0), torch.zeros(2, dtype=torch.float64))


def test_a_failed_change_changes_nothing():
    op = SubmatrixLinearOperator(MATRIX, ROWS, COLUMNS)
    with pytest.raises(ValueError, match="col_idxs"):
        op.set_submatrix([0], [9])
    assert torch.equal(op @ torch.eye(3, dtype=torch.float64), MATRIX[ROWS][:, COLUMNS])


def test_principal_submatrices_stay_self_adjoint():
    identity = IdentityLinearOperator(DenseLinearOperator(torch.ones(4, 4)))
    assert SubmatrixLinearOperator(identity, [2, 1], [2, 1]).self_adjoint
    assert not SubmatrixLinearOperator(identity, [2, 1], [1, 2]).self_adjoint
    assert not SubmatrixLinearOperator(MATRIX[:, :4], [2, 1], [2, 1]).self_adjoint


BAD_INDICES = {
    "duplicate": ([0, 1, 0], "must not repeat an index, but 0 stands there twice"),
    "float": ([0, 1.0], r"must be integers .* is 1\.0"),
    "string": (["a"], "must be integers"),
    "None": ([None], "must be integers"),
    "nothing": (None, "must be a sequence of integers, got None"),
    "number": (3, "must be a sequence of integers, got 3"),
    "mask": ([True, False], r"must be integers \(of a mask, take its nonzero\(\)\)"),
    "array of floats": (np.array([0.0]), "must be integers"),
    "too large": ([0, 99], r"must be within 0 and \d \(negative .* is 99"),
    "negative": ([-1], "must be within 0 and"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_bad_indices(bad, message):
    with pytest.raises(ValueError, match=f"row_idxs.*{message}"):
        SubmatrixLinearOperator(MATRIX, bad, COLUMNS)
    with pytest.raises(ValueError, match=f"col_idxs.*{message}"):
        SubmatrixLinearOperator(MATRIX, ROWS, bad)


def test_identity_needs_a_square_operator():
    with pytest.raises(ValueError, match=r"like must be square, got the shape \(4, 5\)"):
        IdentityLinearOperator(DenseLinearOperator(MATRIX))


def test_dense_matrices_are_checked():
    with pytest.raises(ValueError, match="two axes"):
        DenseLinearOperator(torch.ones(3))
    with pytest.raises(ValueError, match="must be real"):
        DenseLinearOperator(torch.ones(3, 3, dtype=torch.complex64))
    assert DenseLinearOperator(torch.ones(3, 3, dtype=torch.int64)).torch_dtype == torch.float64


def test_forms_that_are_no_matrix():
    with pytest.raises(TypeError, match="A must be a linear operator"):
        operator_from(3.0)
    with pytest.raises(ValueError, match="two axes"):
        operator_from(np.ones(3))
