"""Random vectors with E[v vᵀ] = I, and what estimators that draw them share; no estimates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from kfacopt.argument_checks import check_choice
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.structured import square_operator

DISTRIBUTIONS = ("rademacher", "normal")


class StochasticEstimator:
    """An estimator from products of a square matrix with random vectors; see `sample`."""

    def __init__(self, A: Any) -> None:
        self._A = square_operator(A)
        # Estimates are tensors for ours and tensors, NumPy's for SciPy's and arrays.
        self._gives_tensors = isinstance(A, LinearOperator | Tensor)

    def _draw(self, distribution: str, generator: Generator | None) -> Tensor:
        """Return one random vector, `[D, 1]`."""
        check_choice("distribution", distribution, DISTRIBUTIONS)
        return random_vectors(self._A, 1, distribution, generator)


def random_vectors(
    A: LinearOperator, count: int, distribution: str, generator: Generator | None
) -> Tensor:
    """Draw independent vectors with E[v vᵀ] = I.

    Args:
        A: The operator that they are to be multiplied with.
        count: How many, K.
        distribution: `"rademacher"` (±1) or `"normal"`.
        generator: Where to draw from, on A's device; NumPy's global generator if `None`.

    Returns:
        The vectors `[D, K]`, on A's device, in A's dtype or float32 if that is wider.
    """
    dtype = torch.promote_types(A.torch_dtype, torch.float32)
    shape = (count, A.shape[1])
    if generator is None:
        # The generator, the call and its order follow the documented examples' numbers.
        if distribution == "rademacher":
            drawn = 2.0 * np.random.binomial(1, 0.5, size=shape) - 1.0  # noqa: NPY002
        else:
            drawn = np.random.standard_normal(shape)  # noqa: NPY002
        return torch.from_numpy(drawn).to(A.device, dtype).mT
    options: dict[str, Any] = {"generator": generator, "device": A.device}
    if distribution == "rademacher":
        return 2 * torch.randint(2, shape, **options).to(dtype).mT - 1
    return torch.randn(shape, dtype=dtype, **options).mT
