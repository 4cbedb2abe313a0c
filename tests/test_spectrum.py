"""Lanczos quadrature and spectral densities, against full eigendecompositions in float64."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

from kfacopt import (
    GGNLinearOperator,
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from kfacopt.estimators.lanczos import lanczos_quadrature, largest_magnitude, spectral_ends
from kfacopt.linalg.structured import DenseLinearOperator, operator_from

SMALL, LARGE = 20, 150  # below and above the size up to which all eigenvalues are computed
EXACT = 1e-8
MASS_TOLERANCE = 1e-2
STANDARD_ERRORS = 5.0

FORMS = {
    "array": lambda A: A,
    "SciPy": aslinearoperator,
    "tensor": torch.from_numpy,
    "ours": lambda A: DenseLinearOperator(torch.from_numpy(A)),
}


@pytest.fixture(autouse=True)
def _seeded_numpy():
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    yield
    np.random.set_state(before)  # noqa: NPY002


def with_eigenvalues(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    normal = np.random.default_rng(2).standard_normal((len(values), len(values)))
    basis = np.linalg.qr(normal)[0]
    return basis * values @ basis.T


def rounding(size: int, scale: float) -> np.ndarray:
    """A symmetric matrix as rounding leaves behind: entries of eps * scale."""
    noise = np.random.default_rng(3).uniform(-1, 1, (size, size)) * np.finfo(float).eps * scale
    return np.triu(noise) + np.triu(noise, 1).T


def mass(grid: np.ndarray, density: np.ndarray) -> float:
    return float(np.sum(np.diff(grid) * (density[1:] + density[:-1]) / 2))


# The Lanczos process --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_all_steps_give_all_eigenvalues(size):
    # Without re-orthogonalisation, the large, isolated eigenvalues come back as copies.
    values = np.sort(np.concatenate([np.linspace(0, 1, size - 3), [1e2, 1e4, 1e6]]))
    nodes, weights = lanczos_quadrature(operator_from(with_eigenvalues(values)), size)
    np.testing.assert_allclose(nodes, values, atol=EXACT * values[-1])
    assert weights.sum() == pytest.approx(1.0)
    assert (weights > 0).all()


def test_quadrature_integrates_polynomials():
    values, ncv, repeats = np.linspace(-1, 2, LARGE), 6, 500
    A = operator_from(np.diag(values))
    for power in (1, 2, 2 * ncv - 1):
        estimates = []
        for _ in range(repeats):
            nodes, weights = lanczos_quadrature(A, ncv)
            estimates.append(weights @ nodes**power)
        bound = STANDARD_ERRORS * np.std(estimates) / np.sqrt(repeats)
        assert abs(np.mean(estimates) - np.mean(values**power)) < bound


def test_quadrature_is_exact_for_its_vector():
    values, ncv = np.linspace(-1, 2, SMALL), 4
    np.random.seed(1)  # noqa: NPY002
    nodes, weights = lanczos_quadrature(operator_from(np.diag(values)), ncv)
    np.random.seed(1)  # noqa: NPY002
    v = np.random.standard_normal(SMALL)  # noqa: NPY002
    spectral_weights = v**2 / (v @ v)
    for power in range(2 * ncv):
        assert weights @ nodes**power == pytest.approx(spectral_weights @ values**power)


INVARIANT = {
    "zero": (np.zeros(SMALL), [0.0]),
    "identity": (np.full(SMALL, 3.0), [3.0]),
    "negative identity": (np.full(SMALL, -3.0), [-3.0]),
    "two values": (np.repeat([-1.0, 2.0], SMALL // 2), [-1.0, 2.0]),
    "low rank": (np.concatenate([np.zeros(SMALL - 2), [1.0, 5.0]]), [0.0, 1.0, 5.0]),
}


@pytest.mark.parametrize(("values", "distinct"), INVARIANT.values(), ids=INVARIANT)
@pytest.mark.parametrize("ulps", [0, 1, 30, 1000])
def test_invariant_subspaces_end_the_process(values, distinct, ulps):
    """Nothing depends on whether rounding ends the process there, or lets it go on with noise."""
    matrix = np.diag(values) + rounding(SMALL, ulps * np.abs(values).max())
    nodes, weights = lanczos_quadrature(operator_from(matrix), SMALL)
    if ulps == 0:
        assert len(nodes) == len(distinct)
    nearest = np.asarray(distinct)[np.abs(nodes[:, None] - distinct).argmin(1)]
    assert weights @ np.abs(nodes - nearest) < EXACT
    for value in distinct:
        share = np.mean(np.isclose(values, value))
        assert weights[nearest == value].sum() == pytest.approx(share, abs=0.5)
    assert weights.sum() == pytest.approx(1.0)


def test_rounding_around_an_invariant_subspace_does_no_harm():
    A = with_eigenvalues(np.repeat([-1.0, 2.0], LARGE // 2))
    for dtype in (torch.float32, torch.float64):
        nodes, weights = lanczos_quadrature(operator_from(torch.from_numpy(A).to(dtype)), 30)
        tolerance = 1e3 * torch.finfo(dtype).eps
        upper = nodes > 0.5
        assert weights @ np.abs(nodes - np.where(upper, 2.0, -1.0)) < tolerance
        assert weights[upper].sum() == pytest.approx(0.5, abs=0.2)


# The ends of the spectrum ---------------------------------------------------------------------

SPECTRA = {
    "positive": np.linspace(1, 10, LARGE),
    "negative": -np.linspace(1, 10, LARGE),
    "indefinite": np.linspace(-7, 10, LARGE),
    "mostly negative": np.linspace(-10, 7, LARGE),
    "low rank": np.concatenate([np.zeros(LARGE - 3), [1.0, 2.0, 3.0]]),
    "rank 1": np.concatenate([np.zeros(LARGE - 1), [3.0]]),
    "identity": np.full(LARGE, 3.0),
    "negative identity": np.full(LARGE, -3.0),
    "zero": np.zeros(LARGE),
    "small": np.linspace(-1, 3, SMALL),
    "one": np.array([-2.0]),
    "two": np.array([-2.0, 1.0]),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("tol", [1e-2, 0.0])
def test_ends(values, tol):
    A = operator_from(with_eigenvalues(values))
    exact = (values.min(), values.max())
    bound = max(tol, EXACT) * max(np.ptp(values), abs(values).max())
    for lower, upper in ((None, None), (exact[0], None), (None, exact[1])):
        found = spectral_ends(A, lower, upper, tol)
        np.testing.assert_allclose(found, exact, atol=bound)
        assert found[0] <= found[1]
    assert spectral_ends(A, -50.0, 60.0, tol) == (-50.0, 60.0)


# Densities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_density_is_that_of_the_eigenvalues(name):
    """With all Lanczos vectors, the mean over many runs is the smoothed exact density."""
    values, kappa, margin, points, repeats = np.linspace(-1, 3, SMALL) ** 3, 3.0, 0.1, 50, 400
    A = FORMS[name](with_eigenvalues(values))
    runs = LanczosApproximateSpectrumCached(A, ncv=SMALL)
    grid, density = runs.approximate_spectrum(repeats, points, kappa, margin)
    assert isinstance(grid, np.ndarray)
    assert isinstance(density, np.ndarray)
    width = np.ptp(values)
    ends = (values[0] - margin * width, values[-1] + margin * width)
    np.testing.assert_allclose(grid, np.linspace(*ends, points))
    sigma = (ends[1] - ends[0]) / (SMALL - 1) / np.sqrt(8 * np.log(kappa))
    bumps = np.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    # A weight is the share of one squared normal among SMALL: variance < 2 / SMALL².
    spread = np.sqrt(2 * (bumps**2).sum(1)) / SMALL / np.sqrt(repeats)
    assert (np.abs(density - bumps.mean(1)) < STANDARD_ERRORS * spread + EXACT).all()


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_densities_are_finite_and_integrate_to_one(values):
    A = with_eigenvalues(values)
    ncv = min(60, len(values))
    grid, density = lanczos_approximate_spectrum(A, ncv, num_repeats=2, margin=0.3)
    log_grid, log_density = lanczos_approximate_log_spectrum(
        A, ncv, num_repeats=2, margin=0.5, kappa=3.0
    )
    for x, p in ((grid, density), (log_grid, log_density)):
        assert x.shape == p.shape == (1024,)
        assert np.isfinite(x).all()
        assert np.isfinite(p).all()
        assert (np.diff(x) > 0).all()
        assert (p >= 0).all()
        if ncv > 2:  # one or two bumps are wider than their grid
            assert mass(x, p) == pytest.approx(1.0, abs=MASS_TOLERANCE)
    assert grid[0] <= values.min()
    assert grid[-1] >= values.max()


def test_log_density_is_that_of_the_eigenvalues():
    values, epsilon, points, repeats = np.linspace(-2, 3, SMALL), 0.01, 40, 400
    runs = LanczosApproximateLogSpectrumCached(with_eigenvalues(values), ncv=SMALL)
    grid, density = runs.approximate_log_spectrum(repeats, points, epsilon=epsilon)
    logs = np.log(np.abs(values) + epsilon)
    margin = 0.05 * np.ptp(logs)
    ends = (logs.min() - margin, logs.max() + margin)
    np.testing.assert_allclose(np.log(grid), np.linspace(*ends, points))
    sigma = (ends[1] - ends[0]) / (SMALL - 1) / np.sqrt(8 * np.log(3.0))
    deviations = (np.log(grid)[:, None] - logs) / sigma
    bumps = np.exp(-0.5 * deviations**2) / (sigma * np.sqrt(2 * np.pi)) / grid[:, None]
    spread = np.sqrt(2 * (bumps**2).sum(1)) / SMALL / np.sqrt(repeats)
    assert (np.abs(density - bumps.mean(1)) < STANDARD_ERRORS * spread + EXACT).all()


def test_log_spectrum_of_a_large_matrix():
    values = np.logspace(-4, 1, LARGE) * np.where(np.arange(LARGE) % 2, 1, -1)
    grid, density = lanczos_approximate_log_spectrum(with_eigenvalues(values), ncv=LARGE)
    assert grid[-1] == pytest.approx(10 * (10 / 1e-4) ** 0.05, rel=0.2)
    assert grid[0] < 1.2e-4
    assert mass(grid, density) == pytest.approx(1.0, abs=0.1)


class Counting(LinearOperator):
    def __init__(self, A):
        super().__init__(A.dtype, A.shape)
        self.A, self.products = A, 0

    def _matmat(self, X):
        self.products += X.shape[1]
        return self.A @ X


CACHED = {
    "spectrum": (LanczosApproximateSpectrumCached, "approximate_spectrum"),
    "log spectrum": (LanczosApproximateLogSpectrumCached, "approximate_log_spectrum"),
}


@pytest.mark.parametrize(("cached_class", "method"), CACHED.values(), ids=CACHED)
def test_runs_are_kept(cached_class, method):
    A, ncv = Counting(with_eigenvalues(np.linspace(1, 2, LARGE))), 10
    runs = cached_class(A, ncv, boundaries=(1.0, 2.0))
    assert A.products == 0
    approximate = getattr(runs, method)
    first = approximate(num_repeats=2)
    assert A.products == 2 * ncv
    again = approximate(num_repeats=2)
    np.testing.assert_array_equal(again, first)
    for options in ({"num_points": 10}, {"kappa": 2.0}, {"margin": 0.1}, {"num_repeats": 1}):
        changed = approximate(**{"num_repeats": 2, **options})
        assert changed[0].shape != first[0].shape or not np.array_equal(changed, first)
    assert A.products == 2 * ncv
    approximate(num_repeats=5)
    assert A.products == 5 * ncv


@pytest.mark.parametrize("log", [False, True], ids=["spectrum", "log spectrum"])
def test_functions_are_the_cached_classes(log):
    A = with_eigenvalues(np.linspace(1, 2, SMALL))
    options = {"num_repeats": 3, "num_points": 20, "kappa": 2.0, "margin": 0.2}
    function = lanczos_approximate_log_spectrum if log else lanczos_approximate_spectrum
    cached_class, method = CACHED["log spectrum" if log else "spectrum"]
    results = []
    for call in (
        lambda: function(A, 5, **options),
        lambda: getattr(cached_class(A, 5), method)(**options),
    ):
        np.random.seed(4)  # noqa: NPY002
        results.append(call())
    np.testing.assert_array_equal(*results)


def test_given_boundaries_set_the_grid():
    A = with_eigenvalues(np.linspace(1, 2, LARGE))
    grids = [
        lanczos_approximate_spectrum(A, 5, boundaries=b, margin=0.0, boundaries_tol=0.0)[0]
        for b in (None, (0.0, None), (None, 4.0), (0.0, 4.0), (None, None))
    ]
    ends = [(grid[0], grid[-1]) for grid in grids]
    np.testing.assert_allclose(ends, [(1, 2), (0, 2), (1, 4), (0, 4), (1, 2)], atol=EXACT)
    for b, expected in (((0.5, None), (0.5, 2)), ((0.5, 4.0), (0.5, 4))):
        grid, _ = lanczos_approximate_log_spectrum(
            A, 5, boundaries=b, margin=0.0, boundaries_tol=0.0, epsilon=0.0
        )
        np.testing.assert_allclose((grid[0], grid[-1]), expected)


def test_spectrum_of_a_curvature_matrix():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [(torch.randn(30, 6), torch.randint(3, (30,)))]
    params = list(model.parameters())
    ggn = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    values = torch.linalg.eigvalsh(ggn @ torch.eye(ggn.shape[0], dtype=torch.float64)).numpy()
    assert ggn.shape[0] > 64
    grid, density = lanczos_approximate_spectrum(ggn, ncv=60, margin=0.1)
    width = np.ptp(values)
    expected = (values[0] - 0.1 * width, values[-1] + 0.1 * width)
    np.testing.assert_allclose((grid[0], grid[-1]), expected, atol=0.02 * width)
    assert mass(grid, density) == pytest.approx(1.0, abs=MASS_TOLERANCE)


def test_torch_generator_is_left_alone():
    state = torch.get_rng_state()
    lanczos_approximate_spectrum(torch.eye(SMALL), 3)
    assert torch.equal(torch.get_rng_state(), state)


BAD_ARGUMENTS = {
    "ncv too small": ({"ncv": 0}, f"ncv must be an integer between 1 and {SMALL}"),
    "ncv too large": ({"ncv": SMALL + 1}, f"ncv must .* got {SMALL + 1}"),
    "ncv float": ({"ncv": 5.0}, "ncv must be an integer"),
    "num_points": ({"num_points": 0}, "num_points must be an integer of at least 1, got 0"),
    "num_repeats": ({"num_repeats": 0}, "num_repeats must be an integer of at least 1, got 0"),
    "kappa": ({"kappa": 1.0}, r"kappa must be finite and greater than 1, got 1\.0"),
    "margin": ({"margin": -0.1}, "margin must be finite and at least 0"),
    "boundaries_tol": ({"boundaries_tol": -1.0}, "boundaries_tol must be finite and at least 0"),
    "swapped boundaries": ({"boundaries": (2.0, 1.0)}, "boundaries must be a pair"),
    "one boundary": ({"boundaries": (2.0,)}, "boundaries must be a pair"),
    "infinite boundary": (
        {"boundaries": (0.0, np.inf)},
        r"boundaries\[1\] must be a finite number",
    ),
    "boundaries no pair": ({"boundaries": 5}, "boundaries must be a pair .* got 5"),
    "boundaries text": ({"boundaries": ("a", None)}, r"boundaries\[0\] must be a finite number"),
    "margin text": ({"margin": "a"}, "margin must be finite and at least 0, got 'a'"),
    "kappa None": ({"kappa": None}, "kappa must be finite and greater than 1, got None"),
    "boundaries_tol text": ({"boundaries_tol": "a"}, "boundaries_tol must be finite"),
}


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(options, message):
    for function in (lanczos_approximate_spectrum, lanczos_approximate_log_spectrum):
        with pytest.raises(ValueError, match=message):
            function(np.eye(SMALL), **{"ncv": 5, **options})


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_forms_of_boundaries(form):
    grid, _ = lanczos_approximate_spectrum(np.eye(SMALL), 5, boundaries=form([0.0, 2.0]), margin=0)
    assert (grid[0], grid[-1]) == (0.0, 2.0)


def test_bad_matrices_and_shifts():
    for function in (lanczos_approximate_spectrum, lanczos_approximate_log_spectrum):
        with pytest.raises(ValueError, match="A must be square"):
            function(np.ones((2, 3)), 1)
    with pytest.raises(ValueError, match="epsilon must be finite and at least 0"):
        lanczos_approximate_log_spectrum(np.eye(SMALL), 5, epsilon=-1.0)
    halves = with_eigenvalues([0.0] * (LARGE // 2) + [1.0] * (LARGE // 2))
    for singular in (np.zeros((SMALL, SMALL)), halves):
        with pytest.raises(ValueError, match="epsilon must be positive"):
            lanczos_approximate_log_spectrum(singular, 5, epsilon=0.0)


ULPS = [0.0, 0.5, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e5, 1e8]


@pytest.mark.parametrize("log", [False, True], ids=["spectrum", "log spectrum"])
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-3, 1e6])
@pytest.mark.parametrize("size", [SMALL, 80])
def test_densities_of_multiples_of_the_identity_but_for_rounding(size, value, log):
    """The ends differ by as much as a processor likes; the grid is not as narrow as that."""
    function = lanczos_approximate_log_spectrum if log else lanczos_approximate_spectrum
    for ulps in ULPS:
        matrix = value * np.eye(size) + rounding(size, ulps * abs(value))
        grid, density = function(matrix, 20, num_repeats=2, margin=0.5, kappa=3.0)
        assert (np.diff(grid) > 0).all()
        assert mass(grid, density) == pytest.approx(1.0, abs=MASS_TOLERANCE)
        weights = grid * density if log else density
        peak = abs(value) + 1e-5 if log else value
        assert grid[np.argmax(weights)] == pytest.approx(peak, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ulps", [0.0, 1.0, 10.0, 100.0, 1e3])
def test_ends_of_multiples_of_the_identity_but_for_rounding(dtype, ulps):
    eps = torch.finfo(dtype).eps
    noise = rounding(LARGE, ulps * eps / np.finfo(float).eps)
    A = operator_from(torch.from_numpy(3 * (np.eye(LARGE) + noise)).to(dtype))
    for tol in (1e-2, 0.0):
        # ‖noise‖₂ is at most twice an entry times the root of the size
        bound = 3 * eps * (100 + 2 * ulps * LARGE**0.5)
        np.testing.assert_allclose(spectral_ends(A, None, None, tol), (3.0, 3.0), atol=bound)
        assert abs(largest_magnitude(A, tol) - 3.0) <= bound


def test_an_eigenvalue_that_stands_alone_is_no_rounding():
    values = np.full(LARGE, 3.0)
    values[0] = 3 + 1e-9
    A = operator_from(with_eigenvalues(values))
    np.testing.assert_allclose(spectral_ends(A, None, None, 0.0), (3.0, values[0]), rtol=1e-12)


@pytest.mark.parametrize("width", [0.0, 1e-20, 1e-17, 1e-15, 1e-13, 1e-11])
def test_log_grids_of_eigenvalues_far_below_epsilon(width):
    """log(λ + ε) of all eigenvalues agree in all or nearly all digits."""
    grid, density = lanczos_approximate_log_spectrum(
        np.diag(np.linspace(0, width, SMALL)), 10, margin=0.5, kappa=3.0
    )
    assert (np.diff(grid) > 0).all()
    assert mass(grid, density) == pytest.approx(1.0, abs=MASS_TOLERANCE)
    fine = lanczos_approximate_spectrum(np.eye(2), 1, 10**6, boundaries=(1.0, 1.0 + 1e-10))[0]
    assert (np.diff(fine) > 0).all()


def test_boundaries_of_the_log_spectrum_are_those_of_magnitudes():
    with pytest.raises(ValueError, match=r"boundaries are those of \|A\|"):
        lanczos_approximate_log_spectrum(np.eye(SMALL), 5, boundaries=(-1.0, None))


def test_products_that_are_not_finite():
    for size in (SMALL, LARGE):
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            lanczos_approximate_spectrum(np.full((size, size), np.nan), 5)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        lanczos_quadrature(operator_from(np.full((SMALL, SMALL), np.nan)), 5)
