"""The truncated Neumann series as a function, and its trust; the operator is in `inverses`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.precision import round_off


class NeumannConvergenceWarning(RuntimeWarning):
    """A truncated Neumann series is not near the solution."""


# What a sum may leave out of the solution without a warning.
NEAR = 0.1


def neumann_series(
    multiply: Callable[[Tensor], Tensor],
    X: Tensor,
    num_terms: int,
    scale: float,
    check_nan: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return α Σ_{k=0}^{K} (I − αA)ᵏ X.

    Args:
        multiply: X ↦ A X.
        X: `[D, N]`, in at least float32: terms are accumulated in its dtype.
        num_terms: K, the number of products.
        scale: α.
        check_nan: Raise an error where the series diverges, and warn where it is not near A⁻¹ X.
        dtype: In which products with A are computed.

    Raises:
        ValueError: If `check_nan` is set and X or a term is not finite, or the last term is larger
            than the one before, or its negative.
    """
    if check_nan and not bool(X.isfinite().all()):
        raise ValueError("x has NaN or infinite entries; A⁻¹ x is not defined.")
    previous, term, total = X, X, X.clone()
    checked = check_nan and num_terms > 0 and X.numel() > 0
    unit = X.abs().amax(0) if checked else X
    unit = torch.where(unit > 0, unit, 1.0)
    length = (X / unit).norm(dim=0) if checked else X
    start = length
    for k in range(1, num_terms + 1):
        previous, term = term, term - scale * multiply(term)
        total += term
        if check_nan and not bool(term.isfinite().all()):
            _raise_diverged(f"term {k} has NaN or infinite entries", scale)
        if checked:
            length = length + (term / unit).norm(dim=0)
    if checked:
        terms = _LastTerms.of(X, previous, term, total)
        _check_growth(terms, scale, dtype)
        relative = (length / torch.where(start > 0, start, 1.0)).to("cpu", torch.float64)
        _check_distance(terms, torch.finfo(dtype).eps * relative, num_terms, scale)
    return scale * total


class _LastTerms(NamedTuple):
    """What a series that was summed up tells of what is left out; norms `[N]`, in float64.

    Attributes:
        share: ‖t_K‖ / ‖t_0‖; t_K is all but the residual b − A x, which is the next term.
        factor: q = ‖t_K‖ / ‖t_{K−1}‖, what a further product makes of a term.
        cosine: Between these two.
        sum_share: ‖Σ t_k‖ / ‖t_0‖.
    """

    share: Tensor
    factor: Tensor
    cosine: Tensor
    sum_share: Tensor

    @classmethod
    def of(cls, first: Tensor, previous: Tensor, last: Tensor, total: Tensor) -> _LastTerms:
        """Compare terms, column by column; where a term is 0, nothing is left out."""
        norms, directions = zip(*map(_polar, (first, previous, last, total)), strict=True)
        size, before, now, whole = norms
        gone = now == 0
        factor = torch.where(gone, 0.0, now / before.masked_fill(gone, 1.0))
        cosine = (directions[1] * directions[2]).sum(0).to(now)
        size = size.masked_fill(size == 0, 1.0)
        return cls(now / size, factor, cosine, whole / size)


def _polar(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of columns, in float64 on the CPU, and the columns in units of them.

    Squares of entries overflow, or vanish, where the entries themselves do not.
    """
    largest = X.abs().amax(0)
    scaled = X / torch.where(largest > 0, largest, 1.0)
    norms = scaled.norm(dim=0)
    directions = scaled / torch.where(norms > 0, norms, 1.0)
    return largest.to("cpu", torch.float64) * norms.to("cpu", torch.float64), directions


def _check_growth(terms: _LastTerms, scale: float, dtype: torch.dtype) -> None:
    """Raise if the last term is larger than that before: what stays does not decay.

    A product's relative error moves q by about as much (α‖A‖ ≤ 2): terms of constant size, where
    A x = 0, are no growth. What is below √eps of the first term may be noise that grows.
    """
    noise = round_off(dtype)
    matters = terms.share > torch.finfo(dtype).eps ** 0.5
    grows = matters & (terms.factor > 1 + noise)
    if bool(grows.any()):
        largest = torch.where(grows, terms.factor, 0.0).argmax()
        _raise_diverged(
            f"its last term, {terms.share[largest].item():.2g} times its first, is "
            f"{terms.factor[largest].item():.6g} times the one before and grows",
            scale,
        )
    if bool((matters & (terms.factor > 1 - noise) & (terms.cosine < -1 + noise)).any()):
        _raise_diverged("its terms only change their sign", scale)


def _check_distance(terms: _LastTerms, noise: Tensor, num_terms: int, scale: float) -> None:
    """Warn if what is left out is not small against the sum.

    If the last terms lie where I − αA has the eigenvalues ±q, (t_K + q t_{K−1}) / 2 is the part of
    +q, and what follows adds up to q / (1 − q) times it; the rest alternates, to q / (1 + q) times
    it. For a symmetric A, q grows with K: more may be missing. Round-off leaves up to eps Σ ‖t_k‖,
    the noise, in directions that A does not reach; of them nothing can be said.
    """
    factor = terms.factor.clamp(max=1 - torch.finfo(torch.float64).eps)
    along = terms.share * ((1 + terms.cosine) / 2).clamp(0, 1).sqrt()
    against = terms.share * ((1 - terms.cosine) / 2).clamp(0, 1).sqrt()
    left_out = along * factor / (1 - factor) + against * factor / (1 + factor)
    known = terms.share > noise.clamp(max=NEAR)
    missing = torch.where(known, left_out / (left_out + terms.sum_share), 0.0)
    far = missing > NEAR
    if not bool(far.any()):
        return
    worst = missing.argmax()
    share, before = terms.share[worst].item(), terms.factor[worst].item()
    warnings.warn(
        f"The Neumann series of {num_terms} terms is not near the solution in {int(far.sum())} of "
        f"{len(far)} columns: its last term is {share:.2g} times its first, and {before:.6g} times "
        f"the one before, so that at least {min(missing[worst].item(), 0.99):.0%} are missing. An "
        f"eigenvalue of A is near 0 (add damping, raise scale={scale:g} or num_terms) or near 2 / "
        "scale (decrease it); or use CGInverseLinearOperator. check_nan=False silences this.",
        NeumannConvergenceWarning,
        stacklevel=2,
    )


def _raise_diverged(symptom: str, scale: float) -> None:
    raise ValueError(
        f"The Neumann series diverges: {symptom}. It converges where all eigenvalues of A lie "
        f"between 0 and 2 / scale; decrease scale={scale:g}, or use CGInverseLinearOperator. "
        "check_nan=False takes the sum as it is."
    )
