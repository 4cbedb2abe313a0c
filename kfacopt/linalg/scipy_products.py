"""Products of SciPy's operators with several columns; ours have their own in `operator`."""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import LinearOperator

# SciPy's operators that multiply by what they are made of (`args`), some by its transpose.
_TRANSPOSING = ("_AdjointLinearOperator", "_TransposedLinearOperator")


def multiplies_matrices(A: LinearOperator, adjoint: bool = False) -> bool:
    """Tell whether a SciPy operator has a product with matrices of its own.

    Where it has none, SciPy's `matmat` hands columns `[D, 1]` to a function of vectors, which may
    raise, or work along the wrong axis: `scipy.fft.dct`, or `d * v`. Sums, products and transposes
    have what their operands have.

    Args:
        A: The operator.
        adjoint: Ask for the product with Aᴴ instead.
    """
    kind = type(A)
    if kind.__module__.startswith("scipy."):
        operands = [B for B in getattr(A, "args", ()) if isinstance(B, LinearOperator)]
        if operands:
            flipped = adjoint != (kind.__name__ in _TRANSPOSING)
            return all(multiplies_matrices(B, flipped) for B in operands)
        if kind.__name__ == "_CustomLinearOperator":
            # Should SciPy rename it, products go column by column: slower, but right.
            name = "rmatmat" if adjoint else "matmat"
            return getattr(A, f"_CustomLinearOperator__{name}_impl", None) is not None
    if not adjoint:
        return kind._matmat is not LinearOperator._matmat
    if kind._rmatmat is not LinearOperator._rmatmat:
        return True
    # SciPy's default multiplies by `A.H` where there is one.
    return kind._adjoint is not LinearOperator._adjoint and multiplies_matrices(A.H)


def scipy_product(A: LinearOperator, X: np.ndarray, adjoint: bool = False) -> np.ndarray:
    """Return A X, or Aᴴ X, of a real operator in float64.

    Vectors go to the operator one by one, with one axis, unless it multiplies matrices itself. It
    gets copies, and the result is one: functions may change their argument, return it, or use one
    buffer for all results.

    Args:
        A: `[M, D]`.
        X: `[D, K]`, or `[M, K]` for Aᴴ.
        adjoint: Multiply by Aᴴ.

    Returns:
        The product `[M, K]`, or `[D, K]`.

    Raises:
        NotImplementedError: If the operator does not know the product with Aᴴ.
        ValueError: If the result is complex or of another shape.
    """
    result = np.empty((A.shape[1 if adjoint else 0], X.shape[1]))
    try:
        if multiplies_matrices(A, adjoint):
            product = A.rmatmat(X.copy()) if adjoint else A.matmat(X.copy())
            result[...] = _checked(product, result.shape)
        else:
            multiply = A.rmatvec if adjoint else A.matvec
            for k in range(X.shape[1]):
                result[:, k] = _checked(multiply(X[:, k].copy()), result[:, k].shape)
    except NotImplementedError as error:
        if not adjoint:
            raise
        raise NotImplementedError(
            f"A: this {type(A).__name__} of SciPy has no products with its transpose; define "
            "rmatvec (or _rmatvec, or _adjoint)."
        ) from error
    return result


def _checked(product: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    product = np.asarray(product)
    if product.shape != shape:
        raise ValueError(
            f"A: the product of a SciPy operator must have the shape {shape}, got {product.shape}."
        )
    if np.iscomplexobj(product):
        raise ValueError(
            f"A: complex operators cannot be combined with real ones here, but a product is "
            f"{product.dtype}."
        )
    return product
