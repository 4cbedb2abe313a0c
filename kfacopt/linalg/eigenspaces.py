"""Eigenspaces in which rounding alone decides on a basis, and values that do not depend on it.

Where eigenvalues of a factor are equal, as in its null space, any orthonormal basis of their space
is one of eigenvectors, and which one comes out, round-off decides. What is known of single vectors
in it, as their second moments, is then arbitrary too; its mean over the space is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.linalg.kronecker import multiply_left, multiply_right
from kfacopt.linalg.split_factors import SplitBasis

# Of one side's basis: nothing of a diagonal one, `[B, d]` of a dense one, two of a split one.
Levels = tuple[Tensor, ...]


def levels_of(eigenvalues: Tensor, stored: torch.dtype) -> Tensor:
    """Return eigenvalues `[B, d]` in units of the distance below which they count as close.

    An error of E in A turns eigenvectors by E / (distance of their eigenvalues). Closer than
    eps^(2/3) λ_max, an eps in A may turn them by more than eps^(1/3); and rounding A to the dtype
    that it is kept in adds a matrix of the norm 0.6 eps λ_max / √d at the most, if its entries'
    errors are independent.

    Args:
        eigenvalues: λ ≥ 0.
        stored: The dtype that A is kept in.
    """
    own, kept = (float(torch.finfo(x).eps) for x in (eigenvalues.dtype, stored))
    share = max(own ** (2 / 3), kept / eigenvalues.shape[-1] ** 0.5)
    unit = share * eigenvalues.amax(-1, keepdim=True)
    return eigenvalues / torch.where(unit > 0, unit, 1.0)


def averaged(values: Tensor, levels: tuple[Levels, Levels], look: bool = True) -> Tensor:
    """Return values `[B, d_out, d_in]` with each row and column averaged with the close ones.

    The weight of j in the mean for i is max(0, 1 − |l_i − l_j|): within an eigenspace all weights
    are equal, and there is no distance at which a small change of the eigenvalues decides.

    Args:
        values: One for each product of an eigenvector of G and one of A.
        levels: Those of G, and of A.
        look: Whether to look at the levels first, and do nothing where none are close; it waits for
            a GPU.
    """
    of_g, of_a = (_averages(own, look) for own in levels)
    if of_g:
        values = multiply_left(of_g[0].to(values.dtype), values)
    if len(of_a) == 1:
        values = multiply_right(values, of_a[0].mT.to(values.dtype))
    elif of_a:
        columns = values.shape[-1]
        joint = columns > of_a[0].shape[-1] * of_a[1].shape[-1]
        values = multiply_right(values, SplitBasis(of_a[0].mT, of_a[1].mT, joint))
    return values


def _averages(levels: Levels, look: bool) -> Levels:
    """Return the matrices of weights `[B, d, d]`; nothing where no levels are close."""
    if look and not any(bool((own.sort(-1)[0].diff(dim=-1) < 1).any()) for own in levels):
        return ()
    found = []
    for own in levels:
        weights = (1 - (own.unsqueeze(-1) - own.unsqueeze(-2)).abs()).clamp(min=0)
        found.append(weights / weights.sum(-1, keepdim=True))
    return tuple(found)
