"""Dense matrices, identities and sub-matrices as operators; sums and products are in `operator`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator as SciPyLinearOperator
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor

from kfacopt.linalg.operator import ForeignLinearOperator, LinearOperator


class DenseLinearOperator(LinearOperator):
    """A dense matrix among operators.

    Args:
        matrix: `[M, D]`. Integers become float64.

    Raises:
        ValueError: If `matrix` is not two-dimensional, or complex.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2:
            raise ValueError(f"matrix must have two axes, got the shape {tuple(matrix.shape)}.")
        if matrix.is_complex():
            raise ValueError(
                f"matrix must be real, got {matrix.dtype}; write a complex matrix as a real one of "
                "twice the size, [[Re, -Im], [Im, Re]]."
            )
        matrix = matrix.detach()
        if not matrix.dtype.is_floating_point:
            matrix = matrix.double()
        rows, columns = matrix.shape
        super().__init__((rows, columns), matrix.dtype, matrix.device)
        self._matrix = matrix

    def sources(self) -> list[Any]:
        """Return the matrix."""
        return [self._matrix]

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        return self._matrix @ X

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        return self._matrix.mT @ X


class IdentityLinearOperator(LinearOperator):
    """The identity on the space of a square operator, for matrices such as A + δI.

    Args:
        like: The square operator whose size, dtype, device and parameter shapes it takes.

    Raises:
        ValueError: If `like` is not square.

    Example:
        >>> import torch
        >>> from kfacopt.linalg.structured import DenseLinearOperator
        >>> A = DenseLinearOperator(torch.ones(2, 2))
        >>> damped = A + 0.5 * IdentityLinearOperator(A)
        >>> damped @ torch.tensor([1.0, 2.0])
        tensor([3.5000, 4.0000])
    """

    self_adjoint = True

    def __init__(self, like: LinearOperator) -> None:
        square_operator(like, "like")
        super().__init__(like.shape, like.torch_dtype, like.device, like.in_shapes, like.out_shapes)

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        # A copy: who changes the product in place must not change the operand.
        return X.clone()


class SubmatrixLinearOperator(LinearOperator):
    """A sub-matrix of an operator, `A[row_idxs, :][:, col_idxs]`.

    A product costs one product with A.

    Args:
        A: The matrix `[M, D]`: one of our operators, a SciPy operator, an array or a tensor.
        row_idxs: The rows, integers in 0, …, M − 1, in the order in which they are to stand.
        col_idxs: The columns, integers in 0, …, D − 1, likewise.

    Raises:
        ValueError: If indices stand there twice, are no integers, or are out of bounds.

    Example:
        >>> import torch
        >>> A = torch.arange(12.0).reshape(3, 4)
        >>> SubmatrixLinearOperator(A, [2, 0], [1, 3]) @ torch.eye(2)
        tensor([[ 9., 11.],
                [ 1.,  3.]])
    """

    def __init__(self, A: Any, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        self._A = operator_from(A)
        super().__init__(self._A.shape, self._A.torch_dtype, self._A.device, operands=(self._A,))
        self._is_fixed = False
        self.set_submatrix(row_idxs, col_idxs)

    @property
    def self_adjoint(self) -> bool:
        """Whether A is known to be symmetric, and rows and columns are the same."""
        return self._is_principal and self._A.self_adjoint

    def set_submatrix(self, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        """Choose rows and columns anew; sets the operator's shape.

        Operators that were derived from this one follow, unless the shape is another one: their
        products then raise an error.

        Args:
            row_idxs: The rows, as for the class.
            col_idxs: The columns, as for the class.

        Raises:
            ValueError: If indices stand there twice, are no integers, or are out of bounds.
        """
        rows = _checked_indices(row_idxs, self._A.shape[0], "row_idxs")
        columns = _checked_indices(col_idxs, self._A.shape[1], "col_idxs")
        self.shape = (len(rows), len(columns))
        self._is_principal = rows == columns
        self._rows = torch.tensor(rows, dtype=torch.long, device=self.device)
        self._columns = torch.tensor(columns, dtype=torch.long, device=self.device)

    def sources(self) -> list[Any]:
        """Return what A is computed from, and the indices."""
        return [*super().sources(), self._rows, self._columns]

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        padded = X.new_zeros(self._A.shape[1], X.shape[1]).index_copy_(0, self._columns, X)
        return self._A._matmat_tensor(padded)[self._rows]

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        padded = X.new_zeros(self._A.shape[0], X.shape[1]).index_copy_(0, self._rows, X)
        return self._A._rmatmat_tensor(padded)[self._columns]


def _checked_indices(indices: Sequence[int], size: int, name: str) -> list[int]:
    values: Any = indices.tolist() if isinstance(indices, np.ndarray | Tensor) else indices
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of integers, got {indices!r}.")
    values = list(values)
    for i, value in enumerate(values):
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise ValueError(
                f"{name} must be integers (of a mask, take its nonzero()), but {name}[{i}] is "
                f"{value!r}."
            )
        if not 0 <= value < size:
            raise ValueError(
                f"{name} must be within 0 and {size - 1} (negative indices do not count from the "
                f"end), but {name}[{i}] is {value}."
            )
    if len(set(values)) != len(values):
        twice = next(value for value, count in Counter(values).items() if count > 1)
        raise ValueError(f"{name} must not repeat an index, but {twice} stands there twice.")
    return [int(value) for value in values]


def operator_from(
    A: Any, name: str = "A", dtype: torch.dtype | None = None, device: torch.device | None = None
) -> LinearOperator:
    """Return a matrix in any of the usual forms as one of our operators.

    Args:
        A: One of our operators (returned as it is), a SciPy operator or an object that SciPy takes
            for one (`shape`, `matvec`, and `rmatvec` for the transpose), a sparse or dense array,
            or a tensor.
        name: What errors call it.
        dtype: The dtype of the result for what is no tensor. Default: float64.
        device: The device of the result for what is no tensor. Default: the CPU.

    Raises:
        TypeError: If `A` has none of these forms.
        ValueError: If `A` is complex or has not two axes.
    """
    if isinstance(A, LinearOperator):
        return A
    dtype, device = dtype or torch.float64, device or torch.device("cpu")
    if isinstance(A, Tensor):
        return DenseLinearOperator(A)
    if isinstance(A, np.ndarray) and A.dtype.kind in "biuf":
        return DenseLinearOperator(torch.tensor(A.astype(np.float64)).to(device, dtype))
    # SciPy takes any object with a shape and products for an operator.
    is_operator = isinstance(A, SciPyLinearOperator) or (
        hasattr(A, "shape") and hasattr(A, "matvec")
    )
    if isinstance(A, np.ndarray) or issparse(A) or is_operator:
        if len(A.shape) != 2:
            raise ValueError(f"{name} must have two axes, got the shape {tuple(A.shape)}.")
        foreign = aslinearoperator(A)
        if foreign.dtype is not None and np.dtype(foreign.dtype).kind == "c":
            raise ValueError(
                f"{name} must be real, got {foreign.dtype}; write a complex matrix as a real one "
                "of twice the size, [[Re, -Im], [Im, Re]]."
            )
        return ForeignLinearOperator(foreign, dtype, device)
    raise TypeError(
        f"{name} must be a linear operator, a two-dimensional array or a tensor, got "
        f"{type(A).__name__}."
    )


def square_operator(A: Any, name: str = "A") -> LinearOperator:
    """Return what `operator_from` does; raise a `ValueError` if it is not square."""
    operator = operator_from(A)
    if operator.shape[0] != operator.shape[1]:
        raise ValueError(f"{name} must be square, got the shape {tuple(operator.shape)}.")
    return operator
