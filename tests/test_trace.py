"""Trace estimators: the documented numbers, unbiasedness with a stated confidence, exact cases."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn

from kfacopt import GGNLinearOperator, HutchinsonTraceEstimator, HutchPPTraceEstimator
from kfacopt.linalg.structured import DenseLinearOperator

SIZE = 12
SAMPLES = 2000
# Means of SAMPLES independent samples deviate by less than 5 standard errors, with a probability of
# more than 1 - 1e-6 (they are close to normal), for any seed; the seed makes the test repeatable.
STANDARD_ERRORS = 5.0
SINGLE_PRECISION = 1e-4

DISTRIBUTIONS = ["rademacher", "normal"]
FORMS = {
    "array": lambda A: A,
    "SciPy": aslinearoperator,
    "tensor": torch.from_numpy,
    "ours": lambda A: DenseLinearOperator(torch.from_numpy(A)),
}
TENSOR_FORMS = ("tensor", "ours")

each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
each_form = pytest.mark.parametrize("form", FORMS)
each_estimator = pytest.mark.parametrize(
    "estimator_class", [HutchinsonTraceEstimator, HutchPPTraceEstimator]
)


@pytest.fixture(autouse=True)
def _seeded_numpy():
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    yield
    np.random.set_state(before)  # noqa: NPY002


@pytest.fixture
def matrix() -> np.ndarray:
    """A general matrix with a decaying spectrum and a trace away from 0."""
    generator = np.random.default_rng(1)
    return generator.standard_normal((SIZE, SIZE)) / np.arange(1, SIZE + 1) + np.eye(SIZE)


def hutchinson_variance(A: np.ndarray, distribution: str) -> float:
    S = (A + A.T) / 2
    diagonal = np.sum(np.diag(S) ** 2) if distribution == "rademacher" else 0.0
    return 2 * (np.sum(S**2) - diagonal)


@each_distribution
def test_hutchinson_is_unbiased_with_the_stated_variance(matrix, distribution):
    estimator = HutchinsonTraceEstimator(matrix)
    samples = np.array([estimator.sample(distribution) for _ in range(SAMPLES)])
    variance = hutchinson_variance(matrix, distribution)
    error = abs(samples.mean() - np.trace(matrix))
    assert error < STANDARD_ERRORS * np.sqrt(variance / SAMPLES)
    # The variance's own standard error, from the samples' fourth moment.
    squares = (samples - np.trace(matrix)) ** 2
    assert abs(squares.mean() - variance) < STANDARD_ERRORS * squares.std() / np.sqrt(SAMPLES)


@each_distribution
@pytest.mark.parametrize("basis_dim", [1, 4, SIZE - 1])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh basis", "one basis"])
def test_hutchpp_is_unbiased(matrix, distribution, basis_dim, fresh):
    one = HutchPPTraceEstimator(matrix, basis_dim, distribution)
    samples = np.array(
        [
            (HutchPPTraceEstimator(matrix, basis_dim, distribution) if fresh else one).sample(
                distribution
            )
            for _ in range(SAMPLES)
        ]
    )
    error = abs(samples.mean() - np.trace(matrix))
    assert error < STANDARD_ERRORS * samples.std(ddof=1) / np.sqrt(SAMPLES)


def test_hutchpp_has_less_variance_where_the_spectrum_decays():
    A = np.diag(2.0 ** -np.arange(SIZE))
    A = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))[0] @ A
    A = A @ A.T
    estimators = HutchinsonTraceEstimator(A), HutchPPTraceEstimator(A, basis_dim=4)
    plain, deflated = (np.var([e.sample() for _ in range(200)]) for e in estimators)
    assert deflated < 0.1 * plain


def test_cases_in_which_a_sample_is_exact(matrix):
    diagonal = np.diag(np.arange(1.0, SIZE + 1))
    assert HutchinsonTraceEstimator(diagonal).sample() == pytest.approx(np.trace(diagonal))
    whole = HutchPPTraceEstimator(matrix, basis_dim=SIZE)
    assert whole.sample() == pytest.approx(np.trace(matrix))
    assert whole.sample("normal") == pytest.approx(np.trace(matrix))
    low_rank = matrix[:, :3] @ matrix[:, :3].T
    for basis_dim in (3, 7):  # 7: A S has dependent columns
        estimator = HutchPPTraceEstimator(low_rank, basis_dim, "normal")
        assert estimator.sample() == pytest.approx(np.trace(low_rank))
    assert HutchPPTraceEstimator(np.zeros((SIZE, SIZE)), 3).sample() == 0.0
    assert HutchPPTraceEstimator(np.full((1, 1), 3.0)).sample() == pytest.approx(3.0)


def test_hutchpp_default_basis():
    class Counting(DenseLinearOperator):
        columns = 0

        def _matmat_tensor(self, X):
            self.columns += X.shape[1]
            return super()._matmat_tensor(X)

    for size, basis_dim in ((1, 1), (50, 1), (300, 3), (1500, 10)):
        A = Counting(torch.eye(size))
        estimator = HutchPPTraceEstimator(A)
        estimator.sample()
        assert A.columns == 2 * basis_dim + 1
        estimator.sample()
        assert A.columns == 2 * basis_dim + 2


@each_estimator
@each_form
def test_forms_of_the_matrix_agree(matrix, estimator_class, form):
    np.random.seed(3)  # noqa: NPY002
    expected = estimator_class(matrix).sample()
    np.random.seed(3)  # noqa: NPY002
    sample = estimator_class(FORMS[form](matrix)).sample()
    if form in TENSOR_FORMS:
        assert isinstance(sample, torch.Tensor)
        assert sample.shape == ()
        assert sample.dtype == torch.float64
    else:
        assert type(sample) is float
    assert float(sample) == pytest.approx(expected)


@each_estimator
@each_distribution
def test_half_precision(matrix, estimator_class, distribution):
    A = torch.from_numpy(matrix).bfloat16()
    sample = estimator_class(A).sample(distribution)
    np.random.seed(0)  # noqa: NPY002
    expected = estimator_class(A.double()).sample(distribution)
    assert sample.dtype == torch.float32
    assert float(sample) == pytest.approx(float(expected), rel=0.1)


@each_estimator
@each_distribution
def test_generators(matrix, estimator_class, distribution):
    A = torch.from_numpy(matrix).float()
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    generator = torch.Generator().manual_seed(0)
    samples = [estimator_class(A).sample(distribution, generator=generator) for _ in range(2)]
    again = estimator_class(A).sample(distribution, generator=torch.Generator().manual_seed(0))
    assert torch.equal(samples[0], again)
    assert samples[0] != samples[1]
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    estimator_class(A).sample(distribution)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_torch_draws_are_unbiased_too(matrix):
    generator = torch.Generator().manual_seed(0)
    for distribution in DISTRIBUTIONS:
        estimator = HutchinsonTraceEstimator(matrix)
        draws = [estimator.sample(distribution, generator=generator) for _ in range(SAMPLES)]
        bound = STANDARD_ERRORS * np.sqrt(hutchinson_variance(matrix, distribution) / SAMPLES)
        assert abs(np.mean(draws) - np.trace(matrix)) < bound


def test_trace_of_a_curvature_matrix():
    model = nn.Linear(4, 2)
    data = [(torch.randn(20, 4), torch.randn(20, 2))]
    ggn = GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
    exact = (ggn @ torch.eye(10)).trace()
    whole = HutchPPTraceEstimator(ggn, basis_dim=10).sample()
    assert whole.dtype == torch.float32
    assert whole.device == ggn.device
    assert torch.isclose(whole, exact, rtol=SINGLE_PRECISION)


@each_estimator
def test_bad_arguments(matrix, estimator_class):
    for bad in (np.ones((2, 3)), torch.ones(2, 3), aslinearoperator(np.ones((2, 3)))):
        with pytest.raises(ValueError, match=r"A must be square, got the shape \(2, 3\)"):
            estimator_class(bad)
    with pytest.raises(ValueError, match="real"):
        estimator_class(1j * matrix)
    with pytest.raises(ValueError, match=r"distribution must be one of \('rademacher', 'normal'\)"):
        estimator_class(matrix).sample("uniform")


@pytest.mark.parametrize("basis_dim", [0, -1, SIZE + 1, 2.0, True], ids=repr)
def test_bad_basis_dim(matrix, basis_dim):
    with pytest.raises(ValueError, match=f"basis_dim must be an integer between 1 and {SIZE}"):
        HutchPPTraceEstimator(matrix, basis_dim=basis_dim)


def test_bad_basis_distribution(matrix):
    with pytest.raises(ValueError, match="basis_distribution must be one of"):
        HutchPPTraceEstimator(matrix, basis_distribution="uniform")
