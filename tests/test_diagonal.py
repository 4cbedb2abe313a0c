"""The diagonal estimator: unbiasedness with a stated confidence, exact cases, forms."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn

from kfacopt import GGNLinearOperator, HutchinsonDiagonalEstimator
from kfacopt.linalg.structured import DenseLinearOperator

SIZE = 8
SAMPLES = 2000
# All SIZE entries lie within 5 standard errors with a probability of more than 1 - 1e-5.
STANDARD_ERRORS = 5.0
DISTRIBUTIONS = ["rademacher", "normal"]
FORMS = {
    "array": lambda A: A,
    "SciPy": aslinearoperator,
    "tensor": torch.from_numpy,
    "ours": lambda A: DenseLinearOperator(torch.from_numpy(A)),
}

each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@pytest.fixture(autouse=True)
def _seeded_numpy():
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    yield
    np.random.set_state(before)  # noqa: NPY002


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((SIZE, SIZE)) + np.eye(SIZE)


def variances(A: np.ndarray, distribution: str) -> np.ndarray:
    diagonal = np.diag(A) ** 2
    return np.sum(A**2, axis=1) - diagonal + (2 * diagonal if distribution == "normal" else 0)


@each_distribution
@pytest.mark.parametrize("generator", [None, 0], ids=["NumPy's generator", "torch's generator"])
def test_unbiased_with_the_stated_variance(matrix, distribution, generator):
    estimator = HutchinsonDiagonalEstimator(matrix)
    if generator is not None:
        generator = torch.Generator().manual_seed(generator)
    samples = np.stack(
        [estimator.sample(distribution, generator=generator) for _ in range(SAMPLES)]
    )
    errors = np.abs(samples.mean(0) - np.diag(matrix))
    assert (errors < STANDARD_ERRORS * np.sqrt(variances(matrix, distribution) / SAMPLES)).all()
    squares = (samples - np.diag(matrix)) ** 2
    spread = squares.std(0) / np.sqrt(SAMPLES)
    deviation = np.abs(squares.mean(0) - variances(matrix, distribution))
    assert (deviation < STANDARD_ERRORS * spread).all()


def test_one_rademacher_sample_is_exact_for_a_diagonal_matrix():
    values = np.arange(1.0, SIZE + 1)
    sample = HutchinsonDiagonalEstimator(np.diag(values)).sample()
    np.testing.assert_allclose(sample, values)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_matrix_agree(matrix, form):
    expected = HutchinsonDiagonalEstimator(matrix).sample()
    np.random.seed(0)  # noqa: NPY002
    sample = HutchinsonDiagonalEstimator(FORMS[form](matrix)).sample()
    assert isinstance(sample, torch.Tensor if form in ("tensor", "ours") else np.ndarray)
    assert sample.shape == (SIZE,)
    np.testing.assert_allclose(np.asarray(sample), expected)


def test_diagonal_of_a_curvature_matrix_stays_in_torch():
    model = nn.Linear(4, 1, bias=False)
    data = [(torch.randn(20, 4), torch.randn(20, 1))]
    ggn = GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
    state = torch.get_rng_state()
    sample = HutchinsonDiagonalEstimator(ggn).sample()
    assert sample.dtype == torch.float32
    assert sample.device == ggn.device
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments(matrix):
    with pytest.raises(ValueError, match=r"A must be square, got the shape \(2, 3\)"):
        HutchinsonDiagonalEstimator(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"distribution must be one of \('rademacher', 'normal'\)"):
        HutchinsonDiagonalEstimator(matrix).sample("uniform")
