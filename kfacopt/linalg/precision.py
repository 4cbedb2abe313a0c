"""What rounding lets one expect of computed products."""

from __future__ import annotations

import torch

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
