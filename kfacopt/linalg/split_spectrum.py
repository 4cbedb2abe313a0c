"""The ends of a split inverse's spectrum, for monitoring, without a matrix of all its columns."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.linalg.split_factors import SplitInverse

_HALVINGS = 100


def spectrum_ends(inverse: SplitInverse) -> Tensor:
    """Return the smallest and the largest eigenvalue `[B, 2]` of ⊕_k M_k − w wᵀ.

    In the blocks' eigenbases it is D − z zᵀ, whose eigenvalues are zeros of 1 − Σ z² / (d − x), one
    between each two entries of D and one below all of them.
    """
    B, K, C, _ = inverse.blocks.shape
    values, vectors = torch.linalg.eigh(inverse.blocks.double())
    w = inverse.update[:, : C * K].double().unflatten(-1, (C, K)).mT.unsqueeze(-1)
    d, z = values.reshape(B, K * C), (vectors.mT @ w).reshape(B, K * C)
    if inverse.joint:
        own = inverse.update[:, -2:].double()
        d, z = torch.cat([d, own[:, 1:]], 1), torch.cat([z, own[:, :1]], 1)
    ordered = d.sort(dim=1).values
    low = torch.stack([torch.zeros_like(ordered[:, 0]), ordered[:, -2]], 1)
    high = torch.stack([ordered[:, 0], ordered[:, -1]], 1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        gaps = d.unsqueeze(1) - middle.unsqueeze(2)
        below = 1 - (z.square().unsqueeze(1) / gaps).sum(2) > 0  # the zero is further up
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
