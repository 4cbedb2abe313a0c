"""The linear operator, SciPy's that takes tensors too, and its arithmetic; no particular matrix."""

from __future__ import annotations

from abc import abstractmethod
from numbers import Number
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as SciPyLinearOperator
from torch import Tensor

from kfacopt.argument_checks import as_real
from kfacopt.linalg import conversions
from kfacopt.linalg.scipy_products import scipy_product
from kfacopt.linalg.tensor_lists import Shapes, is_tensor_list


class LinearOperator(SciPyLinearOperator):
    """A real matrix `[M, D]` known by its products, for NumPy, SciPy and torch alike.

    Subclasses implement the one kernel `_matmat_tensor`. Then, with `op` of shape `[M, D]`,

    - `op @ array` and everything in SciPy that takes a linear operator work with arrays,
    - `op @ tensor` with a tensor `[D]` or `[D, K]` on the operator's device stays in torch,
    - `op @ [tensor, ...]`, one tensor per parameter, gives a list of tensors.

    Products are computed in the operator's dtype. A result has the wider of the operand's and the
    operator's floating dtype; integers are promoted to the operator's dtype and complex operands
    are multiplied as real and imaginary part.

    Args:
        shape: The matrix shape `(M, D)`.
        dtype: The torch dtype in which products are computed.
        device: Where products are computed.
        in_shapes: Shapes of the parameter tensors that make up the D columns, if there are any.
        out_shapes: The same for the M rows.
        operands: The operators that products are computed by.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        in_shapes: Shapes | None = None,
        out_shapes: Shapes | None = None,
        operands: tuple[LinearOperator, ...] = (),
    ) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: an operator must be real and floating, got {dtype}.")
        super().__init__(conversions.numpy_dtype(dtype), shape)
        self.torch_dtype = dtype
        self.device = torch.device(device)
        self.in_shapes = in_shapes
        self.out_shapes = out_shapes
        self._operands = operands
        self._operand_shapes = [A.shape for A in operands]
        # Not where rows and columns may be chosen anew, of the operator or what it is made of.
        self._is_fixed: bool = all(A._is_fixed for A in operands)

    # Whether the matrix is symmetric where all that it is derived from are.
    _keeps_symmetry = False

    @property
    def self_adjoint(self) -> bool:
        """Whether the matrix is known to be symmetric."""
        return self._keeps_symmetry and all(A.self_adjoint for A in self._operands)

    def _check_operands(self) -> None:
        """Raise if an operand has another shape than when this operator was derived from it."""
        for A, before in zip(self._operands, self._operand_shapes, strict=True):
            if A.shape != before:
                raise ValueError(
                    f"{type(self).__name__} was made of an operator of shape {tuple(before)} that "
                    f"is {tuple(A.shape)} now (set_submatrix); derive it anew."
                )
            A._check_operands()

    @abstractmethod
    def _matmat_tensor(self, X: Tensor) -> Tensor:
        """Multiply onto `X` `[D, K]`, of the operator's dtype and device; return `[M, K]`."""

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        """Multiply the transpose onto `X` `[M, K]`; return `[D, K]`."""
        if self.self_adjoint:
            return self._matmat_tensor(X)
        raise NotImplementedError(f"{type(self).__name__} has no products with its transpose.")

    def sources(self) -> list[Any]:
        """Return what the matrix is computed from: tensors, modules, numbers.

        A change of them, as `kfacopt.linalg.snapshots` sees it, changes the matrix. What a SciPy
        operator or a plain function depends on is not known.
        """
        return [x for A in self._operands for x in A.sources()]

    # NumPy ---------------------------------------------------------------------------------

    def _multiply_array(self, kernel: conversions.Kernel, X: np.ndarray) -> np.ndarray:
        self._check_operands()
        return conversions.multiply_array(self, kernel, np.asarray(X))

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._multiply_array(self._matmat_tensor, X)

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return self._multiply_array(self._rmatmat_tensor, X)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(np.asarray(x).reshape(-1, 1))

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._rmatmat(np.asarray(x).reshape(-1, 1))

    # Tensors and parameter lists -----------------------------------------------------------

    def __matmul__(self, x: Any) -> Any:
        """Multiply onto an array, a tensor, a list of tensors or another operator."""
        if np.isscalar(x) or (isinstance(x, Tensor) and x.ndim == 0):
            raise ValueError("Scalar operands are not allowed, use '*' instead.")
        return self.dot(x)

    def dot(self, x: Any) -> Any:
        """Multiply onto an array, a tensor, a list of tensors, an operator or a scalar."""
        self._check_operands()
        if isinstance(x, Tensor):
            if x.ndim == 0:
                return ScaledLinearOperator(self, x.item())
            return conversions.multiply_tensor(self, self._matmat_tensor, x, self.shape[1])
        if is_tensor_list(x):
            shapes = (self.in_shapes, self.out_shapes)
            return conversions.multiply_list(self, self._matmat_tensor, x, shapes)
        if isinstance(x, SciPyLinearOperator):
            return ProductLinearOperator(self, as_operator(x, like=self))
        if np.isscalar(x):
            return ScaledLinearOperator(self, x)
        return super().dot(x)

    def __rmatmul__(self, x: Any) -> Any:
        """Multiply an array, a tensor `[M]` or `[K, M]`, or an operator from the left."""
        if np.isscalar(x) or (isinstance(x, Tensor) and x.ndim == 0):
            raise ValueError("Scalar operands are not allowed, use '*' instead.")
        return self._rdot(x)

    def _rdot(self, x: Any) -> Any:
        self._check_operands()
        if isinstance(x, Tensor):
            if x.ndim == 1:
                return conversions.multiply_tensor(self, self._rmatmat_tensor, x, self.shape[0])
            return conversions.multiply_tensor(self, self._rmatmat_tensor, x.mT, self.shape[0]).mT
        if is_tensor_list(x):
            shapes = (self.out_shapes, self.in_shapes)
            return conversions.multiply_list(self, self._rmatmat_tensor, x, shapes)
        if isinstance(x, SciPyLinearOperator):
            return ProductLinearOperator(as_operator(x, like=self), self)
        if np.isscalar(x):
            return ScaledLinearOperator(self, x)
        theirs = getattr(super(), "rdot", None)
        return super()._rdot(x) if theirs is None else theirs(x)

    rdot = _rdot  # SciPy's name for it from 1.18 on

    def matvec(self, x: Any) -> Any:
        """Multiply onto one vector (array, tensor or list of tensors)."""
        return self.dot(x) if _is_torch(x) else super().matvec(x)

    def matmat(self, X: Any) -> Any:
        """Multiply onto the columns of a matrix (array or tensor)."""
        return self.dot(X) if _is_torch(X) else super().matmat(X)

    def rmatvec(self, x: Any) -> Any:
        """Multiply the transpose onto one vector."""
        return self.T.dot(x) if _is_torch(x) else super().rmatvec(x)

    def rmatmat(self, X: Any) -> Any:
        """Multiply the transpose onto the columns of a matrix."""
        return self.T.dot(X) if _is_torch(X) else super().rmatmat(X)

    # Arithmetic ----------------------------------------------------------------------------

    def _adjoint(self) -> LinearOperator:
        return self if self.self_adjoint and self._is_fixed else AdjointLinearOperator(self)

    _transpose = _adjoint

    def __rmul__(self, x: Any) -> Any:
        """Scale by a number, or multiply from the left."""
        if np.isscalar(x) or (isinstance(x, Tensor) and x.ndim == 0):
            return ScaledLinearOperator(self, x)
        return self._rdot(x)

    def __truediv__(self, x: Any) -> Any:
        """Divide by a number."""
        number = x.item() if isinstance(x, Tensor) and x.ndim == 0 else x
        if not isinstance(number, Number):
            return NotImplemented
        return ScaledLinearOperator(self, 1.0 / number)  # type: ignore[operator]

    def __neg__(self) -> LinearOperator:
        """Return the operator times −1."""
        return ScaledLinearOperator(self, -1.0)

    def __add__(self, x: Any) -> Any:
        """Add another operator of the same shape."""
        if isinstance(x, SciPyLinearOperator):
            return SumLinearOperator(self, as_operator(x, like=self))
        return NotImplemented

    def __radd__(self, x: Any) -> Any:
        """Add to another operator of the same shape."""
        if isinstance(x, SciPyLinearOperator):
            return SumLinearOperator(as_operator(x, like=self), self)
        return NotImplemented

    def __sub__(self, x: Any) -> Any:
        """Subtract another operator of the same shape."""
        return self + (-x) if isinstance(x, SciPyLinearOperator) else NotImplemented

    def __pow__(self, exponent: Any) -> LinearOperator:
        """Raise to a non-negative integer power."""
        return PowerLinearOperator(self, exponent)


def _is_torch(x: Any) -> bool:
    return isinstance(x, Tensor) or is_tensor_list(x)


def as_operator(A: SciPyLinearOperator, like: LinearOperator) -> LinearOperator:
    """Return `A` itself if it is ours, else a wrapper with the dtype and device of `like`."""
    if isinstance(A, LinearOperator):
        return A
    return ForeignLinearOperator(A, like.torch_dtype, like.device)


class ForeignLinearOperator(LinearOperator):
    """A SciPy operator among ours: its products with tensors make a round trip through NumPy."""

    def __init__(self, A: SciPyLinearOperator, dtype: torch.dtype, device: torch.device) -> None:
        if A.dtype is not None and np.dtype(A.dtype).kind == "c":
            raise ValueError("A: complex operators cannot be combined with real ones here.")
        super().__init__(A.shape, dtype, device)
        self._A = A

    def _round_trip(self, X: Tensor, adjoint: bool) -> Tensor:
        product = scipy_product(self._A, X.to("cpu", torch.float64).numpy(), adjoint)
        return torch.from_numpy(product).to(self.device, self.torch_dtype)

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        return self._round_trip(X, adjoint=False)

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        return self._round_trip(X, adjoint=True)


class AdjointLinearOperator(LinearOperator):
    """The transpose of a real operator."""

    _keeps_symmetry = True

    def __init__(self, A: LinearOperator) -> None:
        rows, columns = A.shape
        super().__init__((columns, rows), A.torch_dtype, A.device, A.out_shapes, A.in_shapes, (A,))
        self._A = A

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        return self._A._rmatmat_tensor(X)

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        return self._A._matmat_tensor(X)

    def _adjoint(self) -> LinearOperator:
        return self._A

    _transpose = _adjoint


class ScaledLinearOperator(LinearOperator):
    """αA for a real number α."""

    _keeps_symmetry = True

    def __init__(self, A: LinearOperator, alpha: Any) -> None:
        if isinstance(alpha, complex | np.complexfloating):
            raise ValueError(f"alpha: operators are scaled by real numbers, got {alpha}.")
        super().__init__(A.shape, A.torch_dtype, A.device, A.in_shapes, A.out_shapes, (A,))
        self._A, self._alpha = A, as_real("alpha", alpha)

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        return self._A._matmat_tensor(X) * self._alpha

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        return self._A._rmatmat_tensor(X) * self._alpha


def _common_dtype(A: LinearOperator, B: LinearOperator) -> torch.dtype:
    if A.device != B.device:
        raise ValueError(f"The operators are on different devices, {A.device} and {B.device}.")
    return torch.promote_types(A.torch_dtype, B.torch_dtype)


class SumLinearOperator(LinearOperator):
    """A + B."""

    _keeps_symmetry = True

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        if A.shape != B.shape:
            raise ValueError(f"cannot add operators of shapes {A.shape} and {B.shape}.")
        in_shapes, out_shapes = A.in_shapes or B.in_shapes, A.out_shapes or B.out_shapes
        super().__init__(A.shape, _common_dtype(A, B), A.device, in_shapes, out_shapes, (A, B))

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        first, second = (A._matmat_tensor(X.to(A.torch_dtype)) for A in self._operands)
        return first + second

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        first, second = (A._rmatmat_tensor(X.to(A.torch_dtype)) for A in self._operands)
        return first + second


def _knows_no_parameters(A: LinearOperator) -> bool:
    return A.in_shapes is None and A.out_shapes is None


class ProductLinearOperator(LinearOperator):
    """A B."""

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        if A.shape[1] != B.shape[0]:
            raise ValueError(f"cannot multiply operators of shapes {A.shape} and {B.shape}.")
        in_shapes, out_shapes = B.in_shapes, A.out_shapes
        # A square operator that knows no parameters (a SciPy one) keeps those of the other.
        if _knows_no_parameters(A) and A.shape[0] == A.shape[1]:
            out_shapes = B.out_shapes
        if _knows_no_parameters(B) and B.shape[0] == B.shape[1]:
            in_shapes = A.in_shapes
        shape = (A.shape[0], B.shape[1])
        super().__init__(shape, _common_dtype(A, B), A.device, in_shapes, out_shapes, (A, B))

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        A, B = self._operands
        return A._matmat_tensor(B._matmat_tensor(X.to(B.torch_dtype)).to(A.torch_dtype))

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        A, B = self._operands
        return B._rmatmat_tensor(A._rmatmat_tensor(X.to(A.torch_dtype)).to(B.torch_dtype))


class PowerLinearOperator(LinearOperator):
    """Aᵖ for a square A and an integer p ≥ 0."""

    _keeps_symmetry = True

    def __init__(self, A: LinearOperator, exponent: int) -> None:
        if A.shape[0] != A.shape[1]:
            raise ValueError(f"only square operators have powers, got the shape {A.shape}.")
        if not isinstance(exponent, int | np.integer) or exponent < 0:
            raise ValueError(f"exponent must be an integer of at least 0, got {exponent!r}.")
        super().__init__(A.shape, A.torch_dtype, A.device, A.in_shapes, A.out_shapes, (A,))
        self._A, self._exponent = A, int(exponent)

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        return self._repeat(self._A._matmat_tensor, X)

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        return self._repeat(self._A._rmatmat_tensor, X)

    def _repeat(self, kernel: conversions.Kernel, X: Tensor) -> Tensor:
        if self._exponent == 0:  # a product never shares memory with its operand
            return X.clone()
        for _ in range(self._exponent):
            X = kernel(X)
        return X
