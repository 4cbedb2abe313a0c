"""Conjugate gradients for many right-hand sides as a function; the operator is in `inverses`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class NotPositiveDefiniteError(RuntimeError):
    """Conjugate gradients met a direction in which the matrix is not positive."""


# Iterations start again from x when a residual has shrunk to so many eps of where it began.
_LEAST_ROUND_OFFS = 10


@dataclass(frozen=True)
class CGReport:
    """What the last product of a `CGInverseLinearOperator` achieved, one entry a column.

    Attributes:
        iterations: Iterations of each column, `[K]`.
        residual_norms: ‖b − A x‖, computed anew from the returned x, `[K]`.
        tolerances: What the residual norms had to reach, max(tol ‖b‖, atol), `[K]`.
        converged: Where they did, `[K]`.
    """

    iterations: Tensor
    residual_norms: Tensor
    tolerances: Tensor
    converged: Tensor


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    B: Tensor,
    X0: Tensor | None,
    tolerances: Tensor,
    maxiter: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[Tensor], Any] | None = None,
) -> tuple[Tensor, CGReport]:
    """Solve A X = B for a symmetric positive definite A, all columns at once.

    The residual of the recurrence drifts away from the true one b − A x. When a column's has
    reached its tolerance (or round-off of where it began), the true one is computed; where that is
    still too large, iterations start again from x, as long as this at least halves the residual.
    Where A shows itself as not positive only then, in what rounding has left of the residual (as a
    singular A does, once a solution is found), the last x counts.

    Args:
        multiply: X ↦ A X.
        B: The right-hand sides, `[D, K]`.
        X0: Where to start, `[D, K]`; `None` is 0.
        tolerances: The residual norm that each column has to reach, `[K]`.
        maxiter: The largest number of iterations of a column.
        precondition: R ↦ M R for a symmetric positive definite M ≈ A⁻¹.
        callback: Called with all iterates `[D, K]` after each iteration.

    Returns:
        X `[D, K]` and the report.

    Raises:
        NotPositiveDefiniteError: If A, or M, turns out not to be positive definite.

    References:
        Hestenes & Stiefel (1952), J. Res. Nat. Bur. Stand. 49(6), section 3; preconditioned as in
        Saad (2003), Iterative Methods for Sparse Linear Systems, Algorithm 9.1; restarts as in
        van der Vorst & Ye (2000), SIAM J. Sci. Comput. 22(3), section 4.
    """
    X = torch.zeros_like(B) if X0 is None else X0.clone()
    X[:, B.norm(dim=0) == 0] = 0
    residual = B.clone() if X0 is None else B - multiply(X)
    norms = residual.norm(dim=0)
    iterations = torch.zeros(B.shape[1], dtype=torch.long, device=B.device)
    columns = (norms > tolerances).nonzero()[:, 0]
    restarted = False
    while len(columns):
        start = X[:, columns]
        try:
            state = (X, residual, columns, tolerances, iterations)
            used = _descend(multiply, *state, maxiter, precondition, callback)
        except NotPositiveDefiniteError:
            if not restarted:
                raise
            X[:, columns] = start
            break
        if not used:
            break
        restarted = True
        residual[:, columns] = B[:, columns] - multiply(X[:, columns])
        before, norms = norms, residual.norm(dim=0)
        stuck = norms > before / 2
        columns = ((norms > tolerances) & ~stuck).nonzero()[:, 0]
    return X, CGReport(iterations, norms, tolerances, norms <= tolerances)


def _descend(
    multiply: Callable[[Tensor], Tensor],
    X: Tensor,
    residual: Tensor,
    columns: Tensor,
    tolerances: Tensor,
    iterations: Tensor,
    maxiter: int,
    precondition: Callable[[Tensor], Tensor] | None,
    callback: Callable[[Tensor], Any] | None,
) -> bool:
    """Iterate on some columns of X until their recurrences have converged; tell if any did."""
    columns = columns[iterations[columns] < maxiter]
    R = residual[:, columns]
    P, rho = torch.zeros_like(R), torch.ones_like(R[0])
    # Beyond, the recurrence would follow noise: into directions that a singular A does not reach.
    round_off = _LEAST_ROUND_OFFS * torch.finfo(R.dtype).eps * R.norm(dim=0)
    targets = torch.maximum(tolerances[columns], round_off)
    way_out = "Add damping, as in A + delta * IdentityLinearOperator(A) with a larger delta"
    way_out += "." if R.dtype == torch.float64 else ", or compute in float64."
    first = True
    while len(columns):
        Z = R if precondition is None else precondition(R)
        rho, before = (R * Z).sum(0), rho
        _check_positive(rho, "M", "rᵀ M r", "Give a positive definite preconditioner.")
        P = Z if first else Z + (rho / before) * P
        Q = multiply(P)
        curvature = (P * Q).sum(0)
        _check_positive(curvature, "A", "pᵀ A p", way_out)
        alpha = rho / curvature
        X[:, columns] += alpha * P
        R = R - alpha * Q
        iterations[columns] += 1
        if callback is not None:
            callback(X.clone())
        # Converged columns are frozen and leave the products.
        going_on = (R.norm(dim=0) > targets) & (iterations[columns] < maxiter)
        if not bool(going_on.all()):
            columns, rho, targets = columns[going_on], rho[going_on], targets[going_on]
            R, P = R[:, going_on], P[:, going_on]
        first = False
    return not first


def _check_positive(values: Tensor, name: str, formula: str, way_out: str) -> None:
    if bool((values > 0).all()):
        return
    if not bool(values.isfinite().all()):
        raise FloatingPointError(
            f"{name}: {formula} is NaN or infinite in conjugate gradients. Its products have such "
            f"entries; or it is singular and no x solves A x = b. {way_out}"
        )
    raise NotPositiveDefiniteError(
        f"{name} is not positive definite (or not in {values.dtype}): conjugate gradients found "
        f"{formula} = {values.min().item():.3g}. {way_out}"
    )
