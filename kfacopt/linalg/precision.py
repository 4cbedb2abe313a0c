"""What rounding lets one expect of computed products; what follows from it, callers decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROUND_OFFS = 100
_HALF_ROUND_OFFS = 4


def round_off(dtype: torch.dtype) -> float:
    """Return the relative error below which results of products in a dtype are not told apart.

    Which last digits a product has depends on the processor: on the order of its sums. Their errors
    are a few eps of the product's norm, and grow like the square root of the number of terms at the
    most; 100 eps leaves room for matrices that were themselves products. In half precision, sums
    are kept in float32 and rounded once.

    Decisions that a smaller difference would change (whether terms grow, whether eigenvalues are
    equal) must not hinge on it.
    """
    eps = float(torch.finfo(dtype).eps)
    return (_ROUND_OFFS if eps < torch.finfo(torch.float16).eps else _HALF_ROUND_OFFS) * eps


def null_directions(eigenvalues: Tensor, basis: Any) -> Tensor:
    """Tell which eigenvalues `[B, d]` of a semi-definite matrix are 0 but for round-off.

    Of those that are computed, d eps λ_max; of a diagonal matrix, whose basis is `None`, they are
    known as they are.
    """
    eps = 0.0 if basis is None else torch.finfo(eigenvalues.dtype).eps
    return eigenvalues <= eigenvalues.shape[-1] * eps * eigenvalues.amax(-1, keepdim=True)
