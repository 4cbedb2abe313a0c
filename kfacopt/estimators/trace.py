"""Stochastic estimators of a matrix's trace; single entries are estimated in `diagonal`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from kfacopt.argument_checks import as_integer, check_choice
from kfacopt.estimators.random_vectors import DISTRIBUTIONS, StochasticEstimator, random_vectors
from kfacopt.linalg.snapshots import Snapshot


class HutchinsonTraceEstimator(StochasticEstimator):
    """Hutchinson's estimator of the trace.

    For a random vector v with E[v vᵀ] = I, one sample is

        a = vᵀ A v,    E[a] = tr(A E[v vᵀ]) = tr A.

    Unbiased. A sample costs one product. With S = (A + Aᵀ) / 2 its variance is
    2 (‖S‖_F² − Σ_i A_ii²) for Rademacher and 2 ‖S‖_F² for normal vectors.

    Args:
        A: A square matrix `[D, D]`: one of our operators, a SciPy operator, an array or a tensor.

    Raises:
        ValueError: If A is not square.

    Example:
        >>> from numpy import mean, trace
        >>> from numpy.random import rand, seed
        >>> seed(0)
        >>> A = rand(10, 10)
        >>> estimator = HutchinsonTraceEstimator(A)
        >>> one = estimator.sample()
        >>> many = mean([estimator.sample() for _ in range(1_000)])
        >>> print(f"{trace(A):.4f} {one:.4f} {many:.4f}")
        4.4575 6.6796 4.3886

    References:
        Hutchinson (1989), Communications in Statistics 18(3), 1059-1076.
    """

    def sample(
        self, distribution: str = "rademacher", *, generator: Generator | None = None
    ) -> float | Tensor:
        """Draw a sample; average several for a better estimate.

        Args:
            distribution: Of the random vector, `"rademacher"` or `"normal"`.
            generator: A torch generator on A's device to draw from. Default: NumPy's global one.

        Returns:
            The sample: a scalar tensor on A's device for our operators and tensors, a float for
            arrays and SciPy operators.

        Raises:
            ValueError: If the distribution is neither of the two.
        """
        v = self._draw(distribution, generator)
        estimate: Tensor = (v * (self._A @ v)).sum()
        return estimate if self._gives_tensors else estimate.item()


class HutchPPTraceEstimator(StochasticEstimator):
    """The Hutch++ estimator of the trace: exact on a subspace, Hutchinson's on the rest.

    Let Q be an orthonormal basis of the span of A S, for a random matrix S `[D, basis_dim]`. With a
    random vector v, E[v vᵀ] = I, and the projection P = I − Q Qᵀ, one sample is

        a = tr(Qᵀ A Q) + vᵀ P A P v.

    Unbiased for any Q, as tr(P A P) = tr(A) − tr(Qᵀ A Q); exact if `basis_dim` is D, and for a
    symmetric A of rank at most `basis_dim` whose range A S spans. Q is drawn once, with the first
    sample, which costs 2 basis_dim + 1 products (in two passes and one); each further one costs one
    product. It is drawn anew where A has changed: a tensor's values, or of an operator of ours the
    parameters, buffers and settings of model and loss, and its own. Of data, arrays and SciPy
    operators that is not seen; make a new estimator where they change. Its memory is basis_dim
    vectors and a copy of what it watches. At equal cost, `basis_dim` is to be a third of the number
    of vectors that Hutchinson's estimator would take.

    Args:
        A: A square matrix `[D, D]`: one of our operators, a SciPy operator, an array or a tensor.
        basis_dim: The dimension of the subspace, 1, …, D. Default: 1 % of D, at least 1 and at
            most 10.
        basis_distribution: Of the entries of S, `"rademacher"` or `"normal"`.

    Raises:
        ValueError: If A is not square, `basis_dim` is out of its range, or the distribution is
            unknown.

    Example:
        >>> from numpy import mean, trace
        >>> from numpy.random import rand, seed
        >>> seed(0)
        >>> A = rand(10, 10)
        >>> estimator = HutchPPTraceEstimator(A)
        >>> one = estimator.sample()
        >>> many = mean([estimator.sample() for _ in range(998)])
        >>> print(f"{trace(A):.4f} {one:.4f} {many:.4f}")
        4.4575 2.4085 4.5791

    References:
        Meyer, Musco, Musco & Woodruff (2020), https://arxiv.org/abs/2010.09649, Algorithm 1. There,
        the basis is drawn anew for each estimate.
    """

    def __init__(
        self, A: Any, basis_dim: int | None = None, basis_distribution: str = "rademacher"
    ) -> None:
        super().__init__(A)
        dim = self._A.shape[0]
        if basis_dim is None:
            basis_dim = min(10, max(1, dim // 100))
        self._basis_dim = as_integer("basis_dim", basis_dim, 1, dim, " (A's dimension)")
        check_choice("basis_distribution", basis_distribution, DISTRIBUTIONS)
        self._basis_distribution = basis_distribution
        self._subspace: tuple[Tensor, Tensor] | None = None
        self._drawn_at = Snapshot([])

    def sample(
        self, distribution: str = "rademacher", *, generator: Generator | None = None
    ) -> float | Tensor:
        """Draw a sample; average several for a better estimate.

        The first call draws the subspace as well, from the same generator.

        Args:
            distribution: Of the random vector v, `"rademacher"` or `"normal"`.
            generator: A torch generator on A's device to draw from. Default: NumPy's global one.

        Returns:
            The sample: a scalar tensor on A's device for our operators and tensors, a float for
            arrays and SciPy operators.

        Raises:
            ValueError: If the distribution is neither of the two.
        """
        check_choice("distribution", distribution, DISTRIBUTIONS)
        if self._subspace is None or not self._drawn_at.holds(self._A.sources()):
            self._drawn_at = Snapshot(self._A.sources())
            self._subspace = self._draw_subspace(generator)
        basis, subspace_trace = self._subspace
        v = self._draw(distribution, generator)
        v = v - basis @ (basis.mT @ v)
        estimate: Tensor = subspace_trace + (v * (self._A @ v)).sum()
        return estimate if self._gives_tensors else estimate.item()

    def _draw_subspace(self, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return Q `[D, basis_dim]` and tr(Qᵀ A Q)."""
        S = random_vectors(self._A, self._basis_dim, self._basis_distribution, generator)
        # Householder's Q is orthonormal even where A S has dependent columns.
        basis = torch.linalg.qr(self._A @ S).Q
        return basis, (basis * (self._A @ basis)).sum()
