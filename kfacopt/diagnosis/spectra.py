"""Spectra of Kronecker factors, and what damping means beside them; nothing exact, no steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfacopt.diagnosis.candidates import WIDEST
from kfacopt.diagnosis.report import DampingReport, FactorReport
from kfacopt.linalg.kronecker import (
    DampingMethod,
    KroneckerProduct,
    dense,
    diagonal_of,
    eigendecomposition,
    factored_damping,
    is_diagonal,
)
from kfacopt.linalg.precision import null_directions

# So many eigenvalues of a factor are kept, at equally spaced ranks.
KEPT = 64


Spectrum = tuple[Tensor, Tensor]


def spectrum_of(factor: Tensor) -> Spectrum | None:
    """Return the eigenvalues `[B, d]` of a factor, and which of them are 0 but for round-off.

    `None` for a dense factor that is too wide to be decomposed.
    """
    if is_diagonal(factor):
        values, basis = eigendecomposition(factor)
    elif factor.shape[-1] > WIDEST:
        return None
    else:
        values, basis = torch.linalg.eigvalsh(factor).clamp(min=0), factor
    return values.double(), null_directions(values, basis)


def describe_factor(
    factor: Tensor, spectrum: Spectrum | None, damping: Tensor | None
) -> FactorReport:
    """Return what is known of a factor.

    Args:
        factor: `[B, d, d]`, or its diagonal `[B, d]`.
        spectrum: See `spectrum_of`.
        damping: What is added to it, `[B]`, with factored damping.
    """
    side, groups = factor.shape[-1], len(factor)
    diagonal = diagonal_of(factor).double()
    mean, zeros = float(diagonal.mean()), int((diagonal == 0).sum())
    added = None if damping is None else float(damping.double().mean())
    if spectrum is None:
        return FactorReport(side, groups, is_diagonal(factor), mean, added, zeros=zeros)
    values, null = spectrum
    shifted = values if damping is None else values + damping.double().unsqueeze(-1)
    ranked = values.flatten().sort(descending=True).values
    picks = torch.linspace(0, len(ranked) - 1, min(KEPT, len(ranked))).round().long()
    return FactorReport(
        side,
        groups,
        is_diagonal(factor),
        mean,
        added,
        int((~null).sum()),
        float(ranked[0]),
        float(ranked[-1]),
        math.inf if bool(null.any()) else _condition(values),
        None if damping is None else _condition(shifted),
        tuple(ranked[picks].tolist()),
        zeros,
        _is_blind(factor),
    )


def _is_blind(factor: Tensor) -> bool:
    """Tell whether a factor of one group maps constants to 0, but for round-off."""
    if is_diagonal(factor) or len(factor) != 1:
        return False
    side, eps = factor.shape[-1], torch.finfo(factor.dtype).eps
    rows = factor[0].double()
    most = rows.abs().sum(-1).amax()
    return bool(most > 0 and (rows.sum(-1).abs() <= 10 * side * eps * most).all())


def _condition(values: Tensor) -> float:
    """Return the worst of B ratios of the largest to the smallest; one, if B have one value."""
    values = values.mT if values.shape[-1] == 1 else values
    return float((values.amax(-1) / values.amin(-1)).max())


def describe_damping(
    matrix: KroneckerProduct, damping: float, method: DampingMethod
) -> tuple[FactorReport, FactorReport, DampingReport]:
    """Return a block's A and G, and δ beside them.

    Args:
        matrix: G ⊗ A.
        damping: δ.
        method: `"factored"` or `"exact"`.
    """
    G, A = dense(matrix.grad_output_factor), dense(matrix.input_factor)
    factored = method == "factored"
    on_g, on_a = factored_damping(G, A, damping) if factored else (None, None)
    spectrum_g, spectrum_a = spectrum_of(G), spectrum_of(A)
    share = effective = math.nan
    if spectrum_g is not None and spectrum_a is not None:
        products = spectrum_g[0].unsqueeze(-1) * spectrum_a[0].unsqueeze(-2)
        share = float((products < damping).double().mean())
        effective = float((products / (products + damping)).sum())
    pi = None
    if on_g is not None and on_a is not None and bool((on_g > 0).all()):
        pi = float((on_a.double() / on_g.double()).sqrt().mean())
    mean = float((diagonal_of(G).double().mean(-1) * diagonal_of(A).double().mean(-1)).mean())
    report = DampingReport(damping, pi, damping / mean if mean else math.inf, share, effective)
    sides = (describe_factor(A, spectrum_a, on_a), describe_factor(G, spectrum_g, on_g))
    return *sides, report
