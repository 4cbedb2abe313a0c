"""Inverses of operators as operators; the algorithms themselves are functions in other files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfacopt.argument_checks import as_integer, as_real, check_flag
from kfacopt.linalg.conjugate_gradients import CGReport, conjugate_gradients
from kfacopt.linalg.neumann_series import neumann_series
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.structured import operator_from, square_operator
from kfacopt.linalg.tensor_lists import is_tensor_list, stack_rows


class CGConvergenceWarning(RuntimeWarning):
    """Conjugate gradients stopped before every column reached its tolerance."""


class CGInverseLinearOperator(LinearOperator):
    """The inverse A⁻¹ of a symmetric positive definite operator, by conjugate gradients.

    A product with K columns is solved for all of them at once: an iteration costs one product of
    A with the columns that have not converged, and the residuals are computed anew at the end, one
    product more. `last_solve` then holds a `CGReport`; a `CGConvergenceWarning` is given where the
    tolerance was not reached.

    Args:
        A: Symmetric and positive definite: one of our operators, a SciPy operator, an array (both
            computed in float64 on the CPU) or a tensor.

    Attributes:
        last_solve: The report of the last product; `None` before the first one. A complex array of
            K columns counts as 2K, real parts first.

    Raises:
        ValueError: If A is not square, or complex.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> inverse = CGInverseLinearOperator(A)
        >>> x = inverse @ torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> torch.allclose(x, torch.ones(2, dtype=torch.float64))
        True
        >>> inverse.last_solve.converged
        tensor([True])
    """

    self_adjoint = True

    def __init__(self, A: Any) -> None:
        self._A = square_operator(A)
        # Conjugate gradients in half precision would be noise; products with A stay in A's dtype.
        dtype = torch.promote_types(self._A.torch_dtype, torch.float32)
        shapes = (self._A.out_shapes, self._A.in_shapes)
        super().__init__(self._A.shape, dtype, self._A.device, *shapes, (self._A,))
        self.last_solve: CGReport | None = None
        self.set_cg_hyperparameters()

    def set_cg_hyperparameters(
        self,
        x0: Any = None,
        tol: float = 1e-05,
        maxiter: int | None = None,
        M: Any = None,
        callback: Callable[[Any], Any] | None = None,
        atol: float | None = None,
    ) -> None:
        """Set how products are solved; what is not given goes back to its default.

        A column b has converged when ‖b − A x‖ ≤ max(tol ‖b‖, atol), as for `scipy`'s `cg`. Where
        b = 0, x = 0.

        Args:
            x0: Where to start: an array or tensor `[D]`, for every column, or `[D, K]`, or a list
                of tensors, one a parameter. Default: 0.
            tol: The tolerance relative to ‖b‖.
            maxiter: The largest number of iterations. Default: 10 D.
            M: A preconditioner, symmetric positive definite, M ≈ A⁻¹, in any form that A may have;
                for instance `KFACLinearOperator(...).inverse(damping, method="exact")`. K-FAC
                pays for the parameters of one layer. For whole networks it lacks the blocks between
                layers: with one hidden layer and a damping of 1e-2 to 1e-5 it took more iterations
                at initialization (digits, 64-16-10: 61 became 74 at 1e-3), and slightly fewer after
                training (194 became 184 at 1e-4). `last_solve.iterations` tells.
            callback: Called after each iteration with the iterate, `[D]` or, for several columns,
                `[D, K]`: arrays where arrays are multiplied, tensors otherwise.
            atol: The absolute tolerance. Default: 0.

        Raises:
            ValueError: If a tolerance is negative or not finite, `maxiter` is below 1, or `x0` or
                `M` has the wrong shape.
        """
        tol, atol = as_real("tol", tol, 0), 0.0 if atol is None else as_real("atol", atol, 0)
        maxiter = 10 * self.shape[0] if maxiter is None else as_integer("maxiter", maxiter, 1)
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be a function or None, got {callback!r}.")
        preconditioner = None
        if M is not None:
            preconditioner = operator_from(M, "M", self.torch_dtype, self.device)
            if preconditioner.shape != self.shape:
                raise ValueError(
                    f"M must have A's shape {self.shape}, got {tuple(preconditioner.shape)}."
                )
            if preconditioner.device != self.device:
                raise ValueError(f"M is on {preconditioner.device}, A is on {self.device}.")
        self._x0 = None if x0 is None else self._initial_guess(x0)
        self._tol, self._atol, self._maxiter = tol, atol, maxiter
        self._M, self._callback = preconditioner, callback

    def _initial_guess(self, x0: Any) -> Tensor:
        if is_tensor_list(x0):
            if self.out_shapes is None:
                raise ValueError("x0: A does not act on lists of parameter tensors, give a tensor.")
            guess, trailing = stack_rows(x0, self.out_shapes, "x0")
            guess = guess if trailing else guess[:, 0]
        else:
            if not isinstance(x0, Tensor) and np.asarray(x0).dtype.kind not in "biufc":
                raise ValueError(f"x0 must be an array of numbers or a tensor, got {x0!r}.")
            guess = x0.detach() if isinstance(x0, Tensor) else torch.tensor(np.asarray(x0))
        if guess.ndim not in (1, 2) or guess.shape[0] != self.shape[0]:
            raise ValueError(
                f"x0 must have the shape [{self.shape[0]}] or [{self.shape[0]}, K], got "
                f"{tuple(guess.shape)}."
            )
        if guess.is_complex():
            raise ValueError(f"x0 must be real, got {guess.dtype}.")
        return guess.to(self.device, self.torch_dtype, copy=True).reshape(self.shape[0], -1)

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        callback = self._callback
        if callback is None:
            return super()._matmat(X)
        return self._multiply_array(
            lambda B: self._solve(B, lambda x: callback(x.cpu().numpy())), X
        )

    _rmatmat = _matmat

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        return self._solve(X, self._callback)

    def _solve(self, B: Tensor, callback: Callable[[Any], Any] | None) -> Tensor:
        if not bool(B.isfinite().all()):
            raise ValueError("x has NaN or infinite entries; A⁻¹ x is not defined.")
        X0 = self._x0
        if X0 is not None:
            if X0.shape[1] not in (1, B.shape[1]):
                raise ValueError(
                    f"x0 has {X0.shape[1]} columns, the right-hand side has {B.shape[1]}; set "
                    "another x0 with set_cg_hyperparameters."
                )
            X0 = X0.expand(-1, B.shape[1])
        # Columns are solved at their own scale: the squares of small entries would underflow.
        units = torch.where((B == 0).all(0), 1.0, B.abs().amax(0)).to(B) if len(B) else B.sum(0)
        B, X0 = B / units, None if X0 is None else X0 / units

        def in_vectors(iterates: Tensor) -> None:
            assert callback is not None
            iterates = iterates * units
            callback(iterates[:, 0] if iterates.shape[1] == 1 else iterates)

        system = (_kernel(self._A), B, X0)
        tolerances = torch.maximum(self._tol * B.norm(dim=0), self._atol / units)
        precondition = None if self._M is None else _kernel(self._M)
        tell = None if callback is None else in_vectors
        X, report = conjugate_gradients(*system, tolerances, self._maxiter, precondition, tell)
        norms, tolerances = report.residual_norms * units, report.tolerances * units
        self.last_solve = replace(report, residual_norms=norms, tolerances=tolerances)
        self._warn_unless_converged(self.last_solve)
        return X * units

    def _warn_unless_converged(self, report: CGReport) -> None:
        failed = ~report.converged
        if not bool(failed.any()):
            return
        worst = (report.residual_norms - report.tolerances).argmax()
        limit = bool((report.iterations[failed] >= self._maxiter).any())
        cause = (
            f"after maxiter={self._maxiter} iterations; raise maxiter, give a preconditioner M"
            if limit
            else f"as rounding in {self._A.torch_dtype} allows no smaller residual; use float64"
        )
        warnings.warn(
            f"Conjugate gradients did not converge in {int(failed.sum())} of {len(failed)} "
            f"columns (residual norm up to {report.residual_norms[worst].item():.2g}, tolerance "
            f"{report.tolerances[worst].item():.2g}) {cause}, raise tol, or add damping to A. "
            "`last_solve` has the residuals; silence this "
            "with warnings.simplefilter('ignore', kfacopt.CGConvergenceWarning).",
            CGConvergenceWarning,
            stacklevel=2,
        )


def _kernel(A: LinearOperator) -> Callable[[Tensor], Tensor]:
    """Return X ↦ A X in A's dtype, with the result in X's."""

    def multiply(X: Tensor) -> Tensor:
        if A.torch_dtype != torch.float16 or len(X) == 0:
            return A._matmat_tensor(X.to(A.torch_dtype)).to(X.dtype)
        # float16 has few exponents: residuals and terms that shrink would vanish.
        exponents = torch.frexp(X.abs().amax(0)).exponent
        product = A._matmat_tensor(torch.ldexp(X, -exponents).to(A.torch_dtype))
        return torch.ldexp(product.to(X.dtype), exponents)

    return multiply


class NeumannInverseLinearOperator(LinearOperator):
    """The inverse of an operator by its truncated, scaled Neumann series.

    With the scale α and K = `num_terms`,

        A⁻¹ = α Σ_{k=0}^{∞} (I − αA)ᵏ ≈ α Σ_{k=0}^{K} (I − αA)ᵏ,

    which converges if all eigenvalues satisfy 0 < λ(A) < 2/α. For a symmetric A the relative error
    along an eigenvector is exactly (1 − αλ)ᴷ⁺¹: small eigenvalues converge slowly. Conjugate
    gradients (`CGInverseLinearOperator`) need far fewer products for the same accuracy.

    A product costs K products with A, for all columns at once. A need not be symmetric.

    Args:
        A: One of our operators, a SciPy operator, an array (both computed in float64 on the CPU)
            or a tensor.
        num_terms: K.
        scale: α.
        check_nan: Raise an error where the series diverges, that is, where terms become NaN or
            infinite, or where the last one is larger than that before, or its negative. Warn with a
            `NeumannConvergenceWarning` where the last terms let expect that more than a tenth of
            the solution is missing; for K = 0, nothing is known. What grows, or decays slowly, is
            not seen as long as it is small beside a part that still shrinks.

    Raises:
        ValueError: If A is not square, or complex, or an argument has no valid value.

    Example:
        >>> import torch
        >>> inverse = NeumannInverseLinearOperator(torch.tensor([[0.5]]), num_terms=4)
        >>> inverse @ torch.ones(1)  # 1 + 1/2 + 1/4 + 1/8 + 1/16
        tensor([1.9375])

    References:
        Lorraine, Vicol & Duvenaud (2020), https://arxiv.org/abs/1911.02590, section 3.
    """

    _keeps_symmetry = True

    def __init__(
        self, A: Any, num_terms: int = 100, scale: float = 1.0, check_nan: bool = True
    ) -> None:
        self._A = square_operator(A)
        shapes = (self._A.out_shapes, self._A.in_shapes)
        super().__init__(self._A.shape, self._A.torch_dtype, self._A.device, *shapes, (self._A,))
        self.set_neumann_hyperparameters(num_terms, scale, check_nan)

    def set_neumann_hyperparameters(
        self, num_terms: int = 100, scale: float = 1.0, check_nan: bool = True
    ) -> None:
        """Set the hyperparameters of the series; what is not given goes back to its default.

        Args:
            num_terms: K, an integer of at least 0.
            scale: α, finite and not 0.
            check_nan: Whether to raise an error where the series diverges.

        Raises:
            ValueError: If an argument has no valid value.
        """
        num_terms = as_integer("num_terms", num_terms, 0)
        check_flag("check_nan", check_nan)
        if as_real("scale", scale) == 0:
            raise ValueError(f"scale must be a finite number other than 0, got {scale!r}.")
        self._options: tuple[int, float, bool] = (num_terms, float(scale), check_nan)

    def sources(self) -> list[Any]:
        """Return what A is computed from, and the series' hyperparameters."""
        return [*super().sources(), *self._options]

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        return self._series(_kernel(self._A), X)

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        return self._series(_kernel(self._A.T), X)

    def _series(self, multiply: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        # A sum of many terms in half precision would lose the small ones.
        wide = X.to(torch.promote_types(X.dtype, torch.float32))
        total = neumann_series(multiply, wide, *self._options, self._A.torch_dtype)
        result = total.to(X.dtype)
        if self._options[2] and not bool(result.isfinite().all()):
            raise ValueError(
                f"x: A⁻¹ x is too large for {X.dtype}; compute in a wider dtype, or give x in "
                "other units. check_nan=False takes the result as it is."
            )
        return result
