"""How far matrices are from each other, exactly or from probes, with the probes' error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.diagnosis.candidates import Candidate
from kfacopt.diagnosis.exact import ExactBlock
from kfacopt.linalg.kronecker import KroneckerProduct, dense

Estimate = tuple[float, float]  # a number and its standard error, 0 if it is exact


def ratio_of_means(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean(a) / mean(b), and the same without each of the K samples, `[K]`.

    Args:
        above: a `[K]`.
        below: b `[K]`.
    """
    left_out = (above.sum() - above) / (below.sum() - below)
    return above.sum() / below.sum(), left_out


def jackknife_error(left_out: Tensor) -> float:
    """Return the standard error of an estimate from what it is without each of K samples."""
    K = len(left_out)
    return float(((K - 1) / K * (left_out - left_out.mean()).square().sum()).sqrt())


def relative_distance(candidate: Candidate, index: int, exact: ExactBlock) -> Estimate | None:
    """Return ‖M − F‖_F / ‖F‖_F of a block M of a candidate and the exact F.

    Of a block that was not formed, E‖(M − F) v‖² / E‖F v‖² over random signs v estimates the
    square; its error is the jackknife's.
    """
    if candidate.matrices[index] is None:
        return None
    if exact.matrix is not None:
        identity = torch.eye(len(exact.matrix), dtype=exact.probes.dtype)
        approximate = candidate.multiply(index, identity.to(exact.probes.device))
        assert approximate is not None
        norm = float(exact.matrix.norm())
        distance = float((approximate.double() - exact.matrix).norm())
        return (distance / norm if norm else math.nan), 0.0
    approximate = candidate.multiply(index, exact.probes)
    assert approximate is not None
    wrong = (approximate - exact.products).double().square().sum(0)
    right = exact.products.double().square().sum(0)
    if not bool(right.any()):
        return math.nan, 0.0
    ratio, left_out = ratio_of_means(wrong, right)
    return float(ratio.sqrt()), jackknife_error(left_out.sqrt())


def share_outside(blocks: Sequence[ExactBlock], whole: Tensor) -> Estimate:
    """Return 1 − Σ_l ‖F_ll‖² / ‖F‖² from products of both with the same random signs.

    Args:
        blocks: The diagonal blocks' products.
        whole: F times all blocks' probes, one below the other, `[D, K]`.
    """
    own = torch.stack([b.products.double().square().sum(0) for b in blocks]).sum(0)
    every = whole.double().square().sum(0)
    if not bool(every.any()):
        return math.nan, 0.0
    ratio, left_out = ratio_of_means(own, every)
    return 1 - float(ratio), jackknife_error(left_out)


def product_distance(first: KroneckerProduct, second: KroneckerProduct) -> float:
    """Return ‖G₁ ⊗ A₁ − G₂ ⊗ A₂‖_F / ‖G₂ ⊗ A₂‖_F, from inner products of the factors."""
    pairs = ((first, first), (first, second), (second, second))
    one, both, two = (float(_inner(x, y)) for x, y in pairs)
    return math.sqrt(max(one - 2 * both + two, 0.0) / two) if two else math.nan


def _inner(x: KroneckerProduct, y: KroneckerProduct) -> Tensor:
    sides = (
        (dense(x.grad_output_factor), dense(y.grad_output_factor)),
        (dense(x.input_factor), dense(y.input_factor)),
    )
    sums = [(a.double() * b.double()).flatten(1).sum(1) for a, b in sides]
    return (sums[0] * sums[1]).sum()
