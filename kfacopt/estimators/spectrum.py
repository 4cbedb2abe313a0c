"""Spectral densities by stochastic Lanczos quadrature; the Lanczos runs are in `lanczos`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from kfacopt.argument_checks import as_integer, as_real
from kfacopt.estimators import lanczos
from kfacopt.linalg.precision import round_off
from kfacopt.linalg.structured import square_operator

Boundaries = tuple[float, float] | tuple[float, None] | tuple[None, float] | None
Density = tuple[np.ndarray, np.ndarray]

# Of a grid's points, in units of their last digit: their distances are exact to some per cent.
_LEAST_SPACING = 16


def lanczos_approximate_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
) -> Density:
    r"""Approximate the spectral density p(λ) = 1/D Σ_i δ(λ − λ_i) of a symmetric matrix.

    Each of `num_repeats` Lanczos runs from a random vector has `ncv` nodes l_m, the eigenvalues of
    its tri-diagonal matrix, and weights w_m, the squared first entries of its eigenvectors. With
    the spectrum, margins included, mapped to [−1, 1] by t(λ) = (λ − c) / d, the density is the mean
    over the runs of

        p(λ) = Σ_m w_m / d · N(t(λ); t(l_m), σ²),    σ = 2 / ((ncv − 1) √(8 log κ)).

    It integrates to 1, less what of the bumps lies outside the grid: little as soon as σ is small
    against `margin`. It is a smoothed density whose moments are unbiased before smoothing.

    A run costs `ncv` products, and the memory of `ncv` vectors, as they are kept orthogonal (see
    `kfacopt.estimators.lanczos`); boundaries that are not given cost a few dozen products more.
    `LanczosApproximateSpectrumCached` keeps the runs for further choices of the other arguments.
    Start vectors come from NumPy's global generator.

    Args:
        A: Symmetric `[D, D]`: one of our operators, a SciPy operator, an array or a tensor.
        ncv: The number of Lanczos vectors, 1, …, D. One alone has no width; σ is then that of two.
        num_points: The number of grid points.
        num_repeats: The number of Lanczos runs.
        kappa: κ > 1, which sets the width of the bumps; larger is narrower.
        boundaries: λ_min and λ_max. What is `None` is estimated, by `eigsh`; where both ends are
            equal, the grid is as wide as λ is large (or 1 wide at 0).
        margin: What the grid extends beyond the boundaries, relative to their distance.
        boundaries_tol: Accuracy of estimated boundaries relative to the width of the spectrum; 0 is
            machine precision.

    Returns:
        The grid λ `[num_points]` and the density p(λ) on it, `[num_points]`.

    Raises:
        ValueError: If A is not square or an argument is out of its range.
        RuntimeError: If the boundaries' estimate does not converge.

    Example:
        >>> import numpy as np
        >>> np.random.seed(0)
        >>> eigenvalues = np.linspace(0, 1, 200)
        >>> grid, density = lanczos_approximate_spectrum(np.diag(eigenvalues), ncv=50)
        >>> print(f"{np.sum(density) * (grid[1] - grid[0]):.2f}")
        1.00

    References:
        Papyan (2020), https://jmlr.org/papers/v21/20-933.html, Algorithm 2 and section D.2. There,
        Lanczos vectors are not re-orthogonalised.
    """
    _check_density_arguments(num_repeats, num_points, kappa, margin)
    cached = LanczosApproximateSpectrumCached(A, ncv, boundaries, boundaries_tol)
    return cached.approximate_spectrum(num_repeats, num_points, kappa, margin)


def lanczos_approximate_log_spectrum(
    A: Any,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    epsilon: float = 1e-5,
) -> Density:
    r"""Approximate the spectral density of log(|A| + εI), with the natural logarithm.

    As `lanczos_approximate_spectrum`, with bumps that are Gaussian in s = log(|λ| + ε): with
    t(s) = (s − c) / d and s_m = log(|l_m| + ε),

        p(λ) = 1/λ Σ_m w_m / d · N(t(log λ); t(s_m), σ²).

    Grid and density are given over λ = eˢ, that is, over |λ| + ε, as the density's plot on a
    logarithmic axis needs it: the grid is evenly spaced in s, and p integrates to 1 over λ. The
    density over s is λ p(λ).

    Args:
        A: Symmetric `[D, D]`: one of our operators, a SciPy operator, an array or a tensor.
        ncv: The number of Lanczos vectors, 1, …, D.
        num_points: The number of grid points.
        num_repeats: The number of Lanczos runs.
        kappa: κ > 1, which sets the width of the bumps; larger is narrower.
        boundaries: The least and largest eigenvalue of |A|. What is `None` is estimated: the
            largest by `eigsh`; the least, inside the spectrum where nothing matrix-free finds it,
            as the least |node| of the first run (exactly for small matrices).
        margin: What the grid extends beyond the boundaries, relative to their distance in s.
        boundaries_tol: Relative accuracy of an estimated largest eigenvalue.
        epsilon: ε ≥ 0. Must be positive if |A| has the eigenvalue 0.

    Returns:
        The grid λ `[num_points]` and the density p(λ) on it, `[num_points]`.

    Raises:
        ValueError: If A is not square or an argument is out of its range.
        RuntimeError: If the boundaries' estimate does not converge.

    Example:
        >>> import numpy as np
        >>> np.random.seed(0)
        >>> A = np.diag(np.logspace(-3, 0, 200))
        >>> grid, density = lanczos_approximate_log_spectrum(A, ncv=100)
        >>> total = np.sum(grid * density) * (np.log(grid[1]) - np.log(grid[0]))
        >>> print(f"{total:.1f}")
        1.0

    References:
        Papyan (2020), https://jmlr.org/papers/v21/20-933.html, sections C.7 and D.2.
    """
    _check_density_arguments(num_repeats, num_points, kappa, margin, epsilon)
    cached = LanczosApproximateLogSpectrumCached(A, ncv, boundaries, boundaries_tol)
    return cached.approximate_log_spectrum(num_repeats, num_points, kappa, margin, epsilon)


class _LanczosRuns:
    """Lanczos runs of one matrix, made when they are first needed, and the ends of its spectrum."""

    def __init__(
        self, A: Any, ncv: int, boundaries: Boundaries = None, boundaries_tol: float = 1e-2
    ) -> None:
        self._A = square_operator(A)
        self._ncv = as_integer("ncv", ncv, 1, self._A.shape[0], " (A's dimension)")
        self._given = _checked_boundaries(boundaries)
        self._tol = as_real("boundaries_tol", boundaries_tol, 0)
        self._round_off = round_off(self._A.torch_dtype)
        self._kept: list[lanczos.Quadrature] = []
        self._boundaries = self._ends()

    def _ends(self) -> tuple[float, float]:
        raise NotImplementedError

    def _density(
        self,
        grid: tuple[float, float],
        num_points: int,
        num_repeats: int,
        kappa: float,
        coordinate: Callable[[np.ndarray], np.ndarray],
    ) -> Density:
        """Return the grid of a centre and half a width, and the density of the nodes on it."""
        center, half_width = grid
        t, density = np.linspace(-1.0, 1.0, num_points), np.zeros(num_points)
        for nodes, weights in self._runs(num_repeats):
            bumps = _bumps(t, (coordinate(nodes) - center) / half_width, self._ncv, kappa)
            density += weights @ bumps / (half_width * num_repeats)
        return center + half_width * t, density

    def _runs(self, count: int) -> list[lanczos.Quadrature]:
        while len(self._kept) < count:
            self._kept.append(lanczos.lanczos_quadrature(self._A, self._ncv))
        return self._kept[:count]


class LanczosApproximateSpectrumCached(_LanczosRuns):
    """`lanczos_approximate_spectrum` for one matrix and many choices of the other arguments.

    Lanczos runs are kept: another width, margin or resolution costs no product, and more repeats
    only the runs that are new. If the matrix changes, make a new object.

    Args:
        A: Symmetric `[D, D]`: one of our operators, a SciPy operator, an array or a tensor.
        ncv: The number of Lanczos vectors, 1, …, D.
        boundaries: λ_min and λ_max; what is `None` is estimated, here, once.
        boundaries_tol: Accuracy of estimated boundaries relative to the width of the spectrum.

    Raises:
        ValueError: If A is not square or an argument is out of its range.
        RuntimeError: If the boundaries' estimate does not converge.

    Example:
        >>> import numpy as np
        >>> np.random.seed(0)
        >>> runs = LanczosApproximateSpectrumCached(np.diag(np.linspace(0, 1, 200)), ncv=50)
        >>> for kappa in (1.05, 3.0):  # the second costs no product
        ...     grid, density = runs.approximate_spectrum(kappa=kappa)
        ...     print(f"{np.sum(density) * (grid[1] - grid[0]):.1f}")
        1.0
        1.0
    """

    def _ends(self) -> tuple[float, float]:
        return lanczos.spectral_ends(self._A, *self._given, self._tol)

    def approximate_spectrum(
        self, num_repeats: int = 1, num_points: int = 1024, kappa: float = 3.0, margin: float = 0.05
    ) -> Density:
        """Approximate the spectral density of A.

        Arguments, result and errors are those of `lanczos_approximate_spectrum`.
        """
        _check_density_arguments(num_repeats, num_points, kappa, margin)
        size = max(abs(end) for end in self._boundaries)
        grid = _grid_of(self._boundaries, margin, num_points, self._round_off, size)
        return self._density(grid, num_points, num_repeats, kappa, lambda nodes: nodes)


class LanczosApproximateLogSpectrumCached(_LanczosRuns):
    """`lanczos_approximate_log_spectrum` for one matrix and many choices of the other arguments.

    Lanczos runs are kept, as in `LanczosApproximateSpectrumCached`.

    Args:
        A: Symmetric `[D, D]`: one of our operators, a SciPy operator, an array or a tensor.
        ncv: The number of Lanczos vectors, 1, …, D.
        boundaries: The least and largest eigenvalue of |A|; what is `None` is estimated, here,
            once.
        boundaries_tol: Relative accuracy of an estimated largest eigenvalue.

    Raises:
        ValueError: If A is not square or an argument is out of its range.
        RuntimeError: If the boundaries' estimate does not converge.

    Example:
        >>> import numpy as np
        >>> np.random.seed(0)
        >>> runs = LanczosApproximateLogSpectrumCached(np.diag(np.logspace(-3, 0, 200)), ncv=100)
        >>> for points in (512, 1024):  # the second costs no product
        ...     grid, density = runs.approximate_log_spectrum(num_points=points)
        ...     total = np.sum(grid * density) * (np.log(grid[1]) - np.log(grid[0]))
        ...     print(f"{total:.1f}")
        1.0
        1.0
    """

    def _ends(self) -> tuple[float, float]:
        lower, upper = self._given
        for value in (lower, upper):
            if value is not None and value < 0:
                raise ValueError(f"boundaries are those of |A|, at least 0, got {self._given}.")
        if upper is None:
            upper = max(lower or 0.0, lanczos.largest_magnitude(self._A, self._tol))
        if lower is None:
            lower = min(upper, lanczos.smallest_magnitude(self._A, self._runs(1)[0]))
        return lower, upper

    def approximate_log_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
        epsilon: float = 1e-5,
    ) -> Density:
        """Approximate the spectral density of log(|A| + εI).

        Arguments, result and errors are those of `lanczos_approximate_log_spectrum`; only the
        default of `kappa` is another.
        """
        _check_density_arguments(num_repeats, num_points, kappa, margin, epsilon)
        lower, upper = self._boundaries
        smallest = 0.0 if self._given[0] is not None else self._round_off * upper
        if epsilon == 0 and lower <= smallest:
            raise ValueError("epsilon must be positive as |A| has the eigenvalue 0, got 0.")
        log_boundaries = (math.log(lower + epsilon), math.log(upper + epsilon))
        # A relative error of λ is an absolute one of log λ.
        grid = _grid_of(log_boundaries, margin, num_points, self._round_off, 1.0)
        tiny = np.finfo(np.float64).tiny
        sizes = (grid, num_points, num_repeats, kappa)
        points, density = self._density(
            *sizes, lambda nodes: np.log(np.maximum(np.abs(nodes) + epsilon, tiny))
        )
        return np.exp(points), density / np.exp(points)


def _grid_of(
    boundaries: tuple[float, float], margin: float, num_points: int, accuracy: float, size: float
) -> tuple[float, float]:
    """Return the centre and half the width of a grid, margins included.

    Args:
        boundaries: The ends of the spectrum.
        margin: What is added to each side, relative to their distance.
        num_points: The number of points on the grid; where it is so narrow that they are only a
            few units of their last digit apart, the ends count as equal.
        accuracy: The relative accuracy of eigenvalues.
        size: What it is relative to, and the width of the grid where the ends are equal but for it.
    """
    lower, upper = boundaries
    center, width = (lower + upper) / 2, upper - lower
    last_digit = float(np.spacing(max(abs(lower), abs(upper), size)))
    if width <= max(accuracy * size, _LEAST_SPACING * num_points * last_digit):
        width = size or 1.0
    return center, width * (0.5 + margin)


def _bumps(t: np.ndarray, nodes: np.ndarray, ncv: int, kappa: float) -> np.ndarray:
    """Evaluate the normal densities around nodes `[n]` at `t` `[num_points]`: `[n, num_points]`."""
    sigma = 2 / max(ncv - 1, 1) / math.sqrt(8 * math.log(kappa))
    deviations = (t - nodes[:, None]) / sigma
    bumps: np.ndarray = np.exp(-0.5 * deviations**2) / (sigma * math.sqrt(2 * math.pi))
    return bumps


def _check_density_arguments(
    num_repeats: int, num_points: int, kappa: float, margin: float, epsilon: float = 0.0
) -> None:
    as_integer("num_repeats", num_repeats, 1)
    as_integer("num_points", num_points, 1)
    as_real("kappa", kappa, 1, lower_open=True)
    as_real("margin", margin, 0)
    as_real("epsilon", epsilon, 0)


def _checked_boundaries(boundaries: Boundaries) -> tuple[float | None, float | None]:
    if boundaries is None:
        return None, None
    if not isinstance(boundaries, tuple | list | np.ndarray | Tensor) or len(boundaries) != 2:
        raise ValueError(f"boundaries must be a pair (lower, upper), got {boundaries!r}.")
    lower, upper = (
        None if value is None else as_real(f"boundaries[{i}]", value)
        for i, value in enumerate(boundaries)
    )
    if lower is not None and upper is not None and lower > upper:
        raise ValueError(f"boundaries must be a pair (lower, upper), got {boundaries!r}.")
    return lower, upper
