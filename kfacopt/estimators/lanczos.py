"""The Lanczos process, its quadrature, and the ends of a spectrum; densities are in `spectrum`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from kfacopt.estimators.random_vectors import random_vectors
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.precision import round_off
from kfacopt.linalg.structured import IdentityLinearOperator

# Up to this size all eigenvalues are computed: ARPACK's basis of 20 vectors, refined a few times,
# costs as much as one pass with this many columns, and it cannot take the smallest matrices.
_DENSE_DIM = 64


class Quadrature(NamedTuple):
    """Nodes and weights with Σ_i w_i f(λ_i) ≈ 1/D tr f(A), in expectation over the first vector.

    Attributes:
        nodes: λ_i, the Ritz values, ascending, `[n]`.
        weights: w_i ≥ 0, summing to 1, `[n]`.
    """

    nodes: np.ndarray
    weights: np.ndarray


def lanczos_quadrature(A: LinearOperator, ncv: int) -> Quadrature:
    """Run the Lanczos process from a random vector of NumPy's global generator.

    Every new vector is made orthogonal to all earlier ones, twice where cancellation calls for it;
    without that, converged eigenvalues come back as copies. It costs `ncv` products, D · ncv²
    further operations, and the memory of `ncv` vectors.

    If the vectors span an invariant subspace before `ncv` steps, as for a matrix with few distinct
    eigenvalues, the process stops and there are fewer nodes; the quadrature is then exact for the
    first vector.

    Args:
        A: Symmetric, `[D, D]`.
        ncv: The number of Lanczos vectors.

    References:
        Golub & Meurant (1994), "Matrices, moments and quadrature"; Parlett (1998), The Symmetric
        Eigenvalue Problem, section 6.9, for "twice is enough".
    """
    v = random_vectors(A, 1, "normal", None)[:, 0]
    v = v / v.norm()
    basis = v.new_empty(min(ncv, A.shape[0]), A.shape[0])
    alphas: list[float] = []
    betas: list[float] = []
    for j in range(len(basis)):
        basis[j] = v
        w = A @ v
        alphas.append((w @ v).item())
        _check_finite(alphas[-1])
        if j + 1 == len(basis):
            break
        w = _orthogonalize(w, basis[: j + 1])
        beta = w.norm().item()
        # Below round-off, w is noise, and its direction no longer that of the Krylov space.
        if beta <= round_off(w.dtype) * max(map(abs, alphas + betas)):
            break
        betas.append(beta)
        v = w / beta
    T = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
    nodes, vectors = np.linalg.eigh(T)
    return Quadrature(nodes, vectors[0] ** 2)


def _orthogonalize(w: Tensor, basis: Tensor) -> Tensor:
    """Remove from `w` `[D]` its components along the orthonormal rows of `basis` `[n, D]`."""
    for _ in range(2):
        before = w.norm()
        w = w - basis.mT @ (basis @ w)
        if w.norm() > before / 2**0.5:
            break
    return w


def spectral_ends(
    A: LinearOperator, lower: float | None, upper: float | None, tol: float
) -> tuple[float, float]:
    """Return λ_min and λ_max of a symmetric A.

    They are estimated by `eigsh`, the second one as that of A − λI for the end λ already known: it
    converges to `tol` relative to the width of the spectrum, also where it is 0.

    Args:
        A: Symmetric, `[D, D]`.
        lower: λ_min if it is known.
        upper: λ_max if it is known.
        tol: The relative accuracy of `eigsh`; 0 is machine precision.

    Raises:
        RuntimeError: If `eigsh` does not converge.
    """
    if lower is not None and upper is not None:
        return lower, upper
    if A.shape[0] <= _DENSE_DIM:
        values = _all_eigenvalues(A)
        low, high = float(values[0]), float(values[-1])
        return low if lower is None else lower, high if upper is None else upper
    if lower is None and upper is None:
        largest = _shifted_eigenvalue(A, 0.0, "LM", tol)
        lower, upper = (None, largest) if largest > 0 else (largest, None)
    if lower is None:
        assert upper is not None
        return min(upper, _shifted_eigenvalue(A, upper, "SA", tol)), upper
    return lower, max(lower, _shifted_eigenvalue(A, lower, "LA", tol))


def largest_magnitude(A: LinearOperator, tol: float) -> float:
    """Return max |λ| of a symmetric A; see `spectral_ends`."""
    if A.shape[0] <= _DENSE_DIM:
        return float(np.abs(_all_eigenvalues(A)).max())
    return abs(_shifted_eigenvalue(A, 0.0, "LM", tol))


def smallest_magnitude(A: LinearOperator, quadrature: Quadrature) -> float:
    """Return min |λ| of a symmetric A where it is small, else the smallest |node|.

    ARPACK finds eigenvalues inside a spectrum, or in a cluster at 0, in ages if at all. The
    smallest node is where a density that is made of nodes begins.
    """
    values = _all_eigenvalues(A) if A.shape[0] <= _DENSE_DIM else quadrature.nodes
    return float(np.abs(values).min())


def _all_eigenvalues(A: LinearOperator) -> np.ndarray:
    matrix = A @ np.eye(A.shape[0])
    _check_finite(matrix)
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)


def _check_finite(values: float | np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise FloatingPointError("A: its product has NaN or infinite entries.")


def _shifted_eigenvalue(
    A: LinearOperator, shift: float, which: Literal["LM", "SA", "LA"], tol: float
) -> float:
    """Return λ + shift for an extreme eigenvalue λ of A − shift · I."""
    start = np.random.default_rng(0).standard_normal(A.shape[0])
    start /= np.linalg.norm(start)
    shifted = A - shift * IdentityLinearOperator(A)
    product = shifted @ start
    # ARPACK fails on multiples of the identity. With a random vector in hand they show themselves.
    quotient = float(start @ product)
    _check_finite(quotient)
    scale = max(abs(shift), float(np.linalg.norm(product)))
    deviation = float(np.linalg.norm(product - quotient * start))
    noise = round_off(A.torch_dtype) * scale
    if deviation <= noise / 10:
        return shift + quotient
    # Where it is not certain, there is nothing that more digits could mean. A larger eigenvalue
    # than the others is a share of 1/√D of a random vector, so that ARPACK has to look for it.
    vague = deviation <= noise
    tol = max(tol, 0.1) if vague else tol
    try:
        (value,) = eigsh(shifted, k=1, which=which, tol=tol, v0=start, return_eigenvectors=False)
    except ArpackError as error:
        if vague:
            return shift + quotient
        raise RuntimeError(
            "eigsh did not converge to an end of the spectrum; raise boundaries_tol, or give "
            "boundaries."
        ) from error
    return shift + float(value)
