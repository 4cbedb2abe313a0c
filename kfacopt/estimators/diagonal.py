"""Stochastic estimators of a matrix's diagonal; its sum alone is estimated in `trace`."""

from __future__ import annotations

import numpy as np
from torch import Generator, Tensor

from kfacopt.estimators.random_vectors import StochasticEstimator


class HutchinsonDiagonalEstimator(StochasticEstimator):
    """Hutchinson's estimator of the diagonal.

    For a random vector v with E[v vᵀ] = I, one sample is

        a = v ⊙ A v,    E[a_i] = Σ_j A_ij E[v_i v_j] = A_ii.

    Unbiased. A sample costs one product. The variance of a_i is Σ_{j≠i} A_ij² for Rademacher
    vectors, and 2 A_ii² more for normal ones.

    Args:
        A: A square matrix `[D, D]`: one of our operators, a SciPy operator, an array or a tensor.

    Raises:
        ValueError: If A is not square.

    Example:
        >>> from numpy import diag, mean
        >>> from numpy.linalg import norm
        >>> from numpy.random import rand, seed
        >>> seed(0)
        >>> A = rand(10, 10)
        >>> estimator = HutchinsonDiagonalEstimator(A)
        >>> one = estimator.sample()
        >>> many = mean([estimator.sample() for _ in range(1_000)], axis=0)
        >>> print(f"{norm(diag(A) - one):.4f} {norm(diag(A) - many):.4f}")
        5.7268 0.1525

    References:
        Martens, Sutskever & Swersky (2012), https://arxiv.org/abs/1206.6464, section 2; Bekas,
        Kokiopoulou & Saad (2007), Applied Numerical Mathematics 57(11-12), section 2.
    """

    def sample(
        self, distribution: str = "rademacher", *, generator: Generator | None = None
    ) -> np.ndarray | Tensor:
        """Draw a sample; average several for a better estimate.

        Args:
            distribution: Of the random vector, `"rademacher"` or `"normal"`.
            generator: A torch generator on A's device to draw from. Default: NumPy's global one.

        Returns:
            The sample `[D]`: a tensor on A's device for our operators and tensors, an array for
            arrays and SciPy operators.

        Raises:
            ValueError: If the distribution is neither of the two.
        """
        v = self._draw(distribution, generator)
        estimate: Tensor = (v * (self._A @ v))[:, 0]
        return estimate if self._gives_tensors else estimate.numpy()
