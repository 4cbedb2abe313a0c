"""The objective's quadratic model along a few directions, with the exact GGN; it moves nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from kfacopt.likelihoods import widened
from kfacopt.optim.steps.replay import ReplayedTerm, replay
from kfacopt.optim.watch.recorded_calls import ScalarTerm, Term

Direction = Mapping[Parameter, Tensor]

# Of the pivots of the small system, relative to its diagonal: directions that are collinear to
# round-off count as one.
_COLLINEAR = 1e-10


@dataclass(frozen=True)
class QuadraticModel:
    """M(d) = L + gᵀd + ½ dᵀ(F + Λ)d for d = Σ_k c_k d_k, F the exact GGN, Λ the damping.

    Attributes:
        loss: L.
        slopes: gᵀd_k.
        curvature: d_jᵀ F d_k.
        damped: d_jᵀ (F + Λ) d_k.
        mismatch: The largest relative deviation of a loss's input z, evaluated again, from what the
            user's own forward pass gave.
        loss_slopes: The derivatives of the recognised losses along d_k; those of the objective,
            `slopes`, are the same unless it has other terms, or the gradients were changed.
        lengths: ‖g‖ ‖d_k‖, which round-off of the slopes is relative to.
    """

    loss: float
    slopes: list[float]
    curvature: list[list[float]]
    damped: list[list[float]]
    mismatch: float
    loss_slopes: list[float]
    lengths: list[float]

    def is_complete(self, tolerance: float, factor: float = 1.0) -> bool:
        """Tell whether the gradient is `factor` times that of the recognised losses.

        Args:
            tolerance: Of the slopes, relative to ‖g‖ ‖d_k‖.
            factor: What the gradient may have been clipped by.
        """
        noise = tolerance**2 * abs(self.loss)  # a gradient that is all round-off, at a minimum
        triples = zip(self.slopes, self.loss_slopes, self.lengths, strict=True)
        return all(
            abs(g - factor * own) <= tolerance * length + noise for g, own, length in triples
        )

    def minimiser(self, more_damping: float = 1.0) -> list[float]:
        """Return the coefficients c that minimise M; 0 for directions that add nothing.

        Args:
            more_damping: What Λ is multiplied with.
        """
        size = range(len(self.slopes))
        F, both = (torch.tensor(m, dtype=torch.float64) for m in (self.curvature, self.damped))
        damped = F + more_damping * (both - F)
        used: list[int] = []
        for k in size:
            rest = damped[k, k]
            if used:
                cross = damped[used, k]
                rest = rest - cross @ torch.linalg.solve(damped[used][:, used], cross)
            if rest > _COLLINEAR * damped[k, k]:
                used.append(k)
        slopes = torch.tensor([self.slopes[k] for k in used], dtype=torch.float64)
        found = torch.linalg.solve(damped[used][:, used], -slopes).tolist() if used else []
        coefficients = dict(zip(used, found, strict=True))
        return [coefficients.get(k, 0.0) for k in size]

    def predicted_change(self, coefficients: Sequence[float]) -> float:
        """Return gᵀd + ½ dᵀFd, without damping: exact where the objective is quadratic."""
        linear = sum(c * s for c, s in zip(coefficients, self.slopes, strict=True))
        quadratic = sum(
            cj * ck * value
            for cj, row in zip(coefficients, self.curvature, strict=True)
            for ck, value in zip(coefficients, row, strict=True)
        )
        return linear + 0.5 * quadratic

    def scalars(self) -> list[float]:
        """Return all numbers of the model, to check them."""
        return [self.loss, *self.slopes, *(x for row in self.damped for x in row)]


def quadratic_model(
    terms: Sequence[Term],
    grads: Direction,
    directions: Sequence[Direction],
    damping: Mapping[Parameter, float],
    loss_scale: float,
    over_ranks: Callable[[Tensor], Tensor],
) -> QuadraticModel:
    """Evaluate the objective's quadratic model along directions.

    d_jᵀ F d_k = Σ_terms (J d_j)ᵀ H (J d_k) takes one forward pass in forward mode for each
    direction, and no backward pass; all numbers are fetched from the device at once.

    Args:
        terms: The losses of the objective.
        grads: g, the gradient by each parameter.
        directions: d_k, a tensor for each parameter.
        damping: Λ's entry for each parameter.
        loss_scale: What a `GradScaler` multiplied the objective with.
        over_ranks: Averages numbers over all processes, whose data are parts of one batch.

    Raises:
        NotImplementedError: If an operation of the model has no forward-mode derivative.

    References:
        Martens & Grosse (2015), https://arxiv.org/abs/1503.05671, sections 6.4 and 7.
    """
    evaluations = [_along(terms, direction) for direction in directions]
    replayed = [term for term, _ in evaluations[0]]
    tangents = [[tangent for _, tangent in own] for own in evaluations]
    products = [
        [
            product
            for derived, t in zip(replayed, own, strict=True)
            for product in derived.term.curvature_product(derived.outputs, t, loss_scale)
        ]
        for own in tangents
    ]
    flat = [[tangent for own in by_term for tangent in own] for by_term in tangents]
    pairs = [(j, k) for j in range(len(directions)) for k in range(j + 1)]
    loss = _value([(own.contribution, own.term) for own in replayed]) / loss_scale
    rates = [[_scalar(term.rate) for term, _ in own] for own in evaluations]
    numbers = [
        [loss, _mismatch(terms, replayed), _dot(grads, grads)],
        [_dot(grads, direction) for direction in directions],
        [torch.stack(own).sum() / loss_scale for own in rates],
        [_dot(direction, direction) for direction in directions],
        [_sum_of_products(flat[j], products[k]) for j, k in pairs],
        [_dot(directions[j], directions[k], damping) for j, k in pairs],
    ]
    fetched = iter(over_ranks(torch.stack([x for group in numbers for x in group])).tolist())
    (value, mismatch, square), slopes, loss_slopes, squares, curved, damped = (
        [next(fetched) for _ in group] for group in numbers
    )
    lengths = [(square * own) ** 0.5 for own in squares]
    undamped = _symmetric(pairs, curved)
    both = _symmetric(pairs, [c + d for c, d in zip(curved, damped, strict=True)])
    return QuadraticModel(value, slopes, undamped, both, mismatch, loss_slopes, lengths)


def evaluate(
    terms: Sequence[Term],
    values: Sequence[Parameter],
    loss_scale: float,
    over_ranks: Callable[[Tensor], Tensor],
) -> float:
    """Return the objective at the present values of parameters, with the same random numbers.

    Args:
        terms: The losses of the objective.
        values: The parameters that changed since.
        loss_scale: What a `GradScaler` multiplied the objective with.
        over_ranks: Averages numbers over all processes.
    """
    replayed = replay(terms, {id(p): p.detach() for p in values})
    total = _value([(term.contribution, term) for term in replayed])
    return float(over_ranks(total)) / loss_scale


def losses_and_mismatch(
    terms: Sequence[Term], values: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the objective of this process at values of parameters, and what it misses.

    Args:
        terms: The losses of the objective.
        values: What takes the place of parameters, by their `id`.

    Returns:
        The sum of losses, with the loss scale, and the largest deviation of a loss's input from its
        record, relative to the largest entry: 0 up to round-off where nothing has changed.
    """
    replayed = replay(terms, values)
    total = _value([(term.contribution, term) for term in replayed])
    return total, _mismatch(terms, replayed)


def _value(contributions: Iterable[tuple[Tensor, ReplayedTerm]]) -> Tensor:
    return torch.stack([_scalar(x) for x, term in contributions if term.counts]).sum()


@dataclass(frozen=True)
class _DerivedTerm:
    """A term of the objective and its derivative along a direction.

    Attributes:
        term: The term, evaluated again.
        output: What has to be the same again, without a derivative.
        outputs: The tensors z, without derivatives.
        contribution: What it adds to the objective.
        rate: The derivative of that.
    """

    term: ReplayedTerm
    output: Tensor
    outputs: Sequence[Tensor]
    contribution: Tensor
    rate: Tensor


def _along(terms: Sequence[Term], direction: Direction) -> list[tuple[_DerivedTerm, list[Tensor]]]:
    """Return the terms, and the derivatives of their tensors z along a direction."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        # torch's own forward-mode formulas are scripted when they are first needed.
        warnings.filterwarnings("ignore", ".*torch.jit.script")
        duals = {
            id(p): forward_ad.make_dual(p.detach(), tangent.to(p.dtype))
            for p, tangent in direction.items()
        }
        result = []
        for term in replay(terms, duals):
            pairs = [_unpacked(z) for z in term.outputs]
            outputs, tangents = [z for z, _ in pairs], [tangent for _, tangent in pairs]
            value, rate = _unpacked(term.contribution)
            if isinstance(term.recorded, ScalarTerm):  # backward mode knows more operations
                gradients = term.recorded.gradients
                rate = _sum_of_products([widened(t) for t in tangents], map(widened, gradients))
            output = _unpacked(term.output)[0]
            result.append((_DerivedTerm(term, output, outputs, value, rate), tangents))
        return result


def _unpacked(dual: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(dual)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def _mismatch(terms: Sequence[Term], replayed: Sequence[_DerivedTerm | ReplayedTerm]) -> Tensor:
    """Return the largest deviation of any z from its record, relative to the largest entry."""
    deviations = []
    for term, again in zip(terms, replayed, strict=True):
        if term.output.shape != again.output.shape:
            return torch.full((), torch.inf, dtype=torch.float64)
        known, found = widened(term.output), widened(again.output)
        if not known.numel():
            deviations.append(torch.zeros((), dtype=torch.float64, device=known.device))
            continue
        scale = known.abs().amax().clamp(min=torch.finfo(known.dtype).tiny)
        deviations.append(_scalar((found - known).abs().amax() / scale))
    return torch.stack(deviations).amax()


def _scalar(x: Tensor) -> Tensor:
    return x.to(torch.float64)


def _dot(
    one: Direction, other: Direction, weights: Mapping[Parameter, float] | None = None
) -> Tensor:
    products = [
        _scalar((one[p] * other[p]).sum()) * (1.0 if weights is None else weights[p])
        for p in one
        if p in other
    ]
    return torch.stack(products).sum()


def _sum_of_products(ones: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
    products = [_scalar((a.to(b.dtype) * b).sum()) for a, b in zip(ones, others, strict=True)]
    return torch.stack(products).sum()


def _symmetric(pairs: Sequence[tuple[int, int]], entries: Sequence[float]) -> list[list[float]]:
    by_pair = dict(zip(pairs, entries, strict=True))
    size = max(pairs)[0] + 1
    return [[by_pair[max(j, k), min(j, k)] for k in range(size)] for j in range(size)]
