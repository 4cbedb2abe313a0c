"""Random vectors with E[v vᵀ] = I, and the matrix of an estimator; no estimates."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.structured import check_square, operator_from

Distribution = Literal["rademacher", "normal"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("rademacher", "normal")


def check_distribution(distribution: str, name: str = "distribution") -> Distribution:
    """Return the distribution, or raise a `ValueError` that lists those that there are."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"{name} must be one of {DISTRIBUTIONS}, got {distribution!r}.")
    return distribution


def square_operator(A: Any) -> LinearOperator:
    """Return a square matrix in any of the usual forms as one of our operators."""
    operator = operator_from(A)
    check_square(operator)
    return operator


def is_torch_matrix(A: Any) -> bool:
    """Tell whether estimates for `A` are tensors (ours, tensors) or NumPy's (SciPy, arrays)."""
    return isinstance(A, LinearOperator | Tensor)


def random_vectors(
    A: LinearOperator, count: int, distribution: Distribution, generator: Generator | None
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
