"""The exact GGN: its blocks, formed or probed, their steps, and the whole one's; no K-FAC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Parameter

from kfacopt.curvature.ggn import GGNLinearOperator
from kfacopt.diagnosis.clock import Clock
from kfacopt.estimators.random_vectors import random_vectors
from kfacopt.linalg.conjugate_gradients import NotPositiveDefiniteError, conjugate_gradients

# A block is formed if it has at most so many columns, and if these take at most so many
# multiplications in about 6 forward passes each; else it is probed with random signs: with few
# where a forward pass takes more than so many multiplications.
FORMED = 1024
MOST_FORMED = 3 * 10**11
PASSES = 6
MANY_PROBES, FEW_PROBES, CHEAP = 16, 4, 10**8

# Of conjugate gradients: the relative residual, and the iterations for the whole matrix (between
# two bounds, in all at most so many multiplications) and for blocks.
TOLERANCE = 1e-5
FEWEST, MOST = 32, 300
MOST_ITERATED = 3 * 10**11
FEW_ON_BLOCKS, MANY_ON_BLOCKS = 12, 100
# A step is shown if its relative residual is at most that, or if the last half of the
# iterations has turned it little: else it is still near K-FAC's, from which they start.
LARGEST_RESIDUAL, SMALLEST_COSINE = 0.25, 0.8

# Columns that are multiplied at once have together at most so many entries.
ENTRIES = 2**26
CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Solve:
    """How a damped system was solved.

    Attributes:
        method: `"solved"` for a dense matrix, or `"CG"`.
        iterations: How many, of CG.
        residual: ‖g − (F + δI) x‖ / ‖g‖.
        converged: Whether that is small enough.
        halfway: The cosine of the iterate after half the iterations to the last one; 1 where none
            are needed, 0 where there was time for one alone.
        enough_seconds: The `max_seconds` that would let all iterations run, if time ended them.
    """

    method: str
    iterations: int
    residual: float
    converged: bool
    halfway: float
    enough_seconds: float | None = None

    @property
    def is_near(self) -> bool:
        """Whether the step is shown, and compared with."""
        return self.residual <= LARGEST_RESIDUAL or self.halfway >= SMALLEST_COSINE


@dataclass(frozen=True)
class ExactBlock:
    """A diagonal block of the GGN.

    Attributes:
        matrix: The block `[D, D]` in float64, if it was formed.
        probes: Signs `[D, K]`.
        products: The block times these.
    """

    matrix: Tensor | None
    probes: Tensor
    products: Tensor


class _TimeIsUpError(Exception):
    pass


def operator_of(
    given: Sequence[Any], params: list[Parameter], batch_size_fn: Any, check: bool = False
) -> GGNLinearOperator:
    """Return the GGN over some parameters.

    Args:
        given: Model and loss, and the data.
        params: The parameters.
        batch_size_fn: See `GGNLinearOperator`.
        check: Whether to check that model and data are deterministic.
    """
    model, loss_func, batches = given
    return GGNLinearOperator(
        model,
        loss_func,
        params,
        batches,
        check_deterministic=check,
        cache_bytes=CACHE_BYTES,
        batch_size_fn=batch_size_fn,
    )


def products(ggn: GGNLinearOperator, X: Tensor) -> Tensor:
    """Return the GGN times X `[D, K]`, a few columns at a time."""
    width = max(1, ENTRIES // max(len(X), 1))
    return torch.cat([ggn @ part for part in X.split(width, dim=1)], dim=1)


def is_formed(size: int, operations: int) -> bool:
    """Tell whether a block of some size is formed, for a forward pass of some cost."""
    return size <= FORMED and size * operations * PASSES <= MOST_FORMED


def exact_block(ggn: GGNLinearOperator, operations: int, generator: Generator) -> ExactBlock:
    """Form a block, or multiply it onto random signs.

    Args:
        ggn: The GGN over the block's parameters.
        operations: The multiplications of a forward pass.
        generator: Draws the signs.
    """
    size = ggn.shape[0]
    count = MANY_PROBES if operations <= CHEAP else FEW_PROBES
    probes = random_vectors(ggn, count, "rademacher", generator).contiguous()
    if not is_formed(size, operations):
        return ExactBlock(None, probes, products(ggn, probes))
    return formed_block(formed(ggn), probes)


def formed(ggn: GGNLinearOperator) -> Tensor:
    """Return the GGN as a matrix in float64."""
    identity = torch.eye(ggn.shape[0], dtype=ggn.torch_dtype, device=ggn.device)
    matrix = products(ggn, identity).double()
    return (matrix + matrix.mT) / 2


def formed_block(matrix: Tensor, probes: Tensor) -> ExactBlock:
    """Return a block that was formed; probes `[D, K]` are of the model's dtype."""
    return ExactBlock(matrix, probes, (matrix @ probes.double()).to(probes.dtype))


def solve_dense(matrix: Tensor, damping: Tensor | float, gradient: Tensor) -> tuple[Tensor, Solve]:
    """Return (F + diag(δ))⁻¹ g for a dense F."""
    shift = torch.as_tensor(damping, dtype=matrix.dtype, device=matrix.device)
    damped = matrix + torch.diag(shift.expand(len(matrix)))
    g = gradient.to(matrix.dtype)
    x = torch.linalg.solve(damped, g)
    residual = float((g - damped @ x).norm() / g.norm()) if g.any() else 0.0
    return x.to(gradient.dtype), Solve("solved", 0, residual, True, 1.0)


def solve_iteratively(
    multiply: Callable[[Tensor], Tensor],
    damping: Tensor | float,
    gradient: Tensor,
    iterations: int,
    clock: Clock,
    deadline: float,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Solve] | None:
    """Return (F + diag(δ))⁻¹ g by conjugate gradients, as far as time allows.

    Args:
        multiply: X `[D, K]` ↦ F X.
        damping: δ, `[D, 1]` or a number.
        gradient: g `[D]`.
        iterations: How many, at most.
        clock: Tells the time.
        deadline: When to stop.
        precondition: See `conjugate_gradients`.

    Returns:
        x and what it achieved; `None` if there was no time for an iteration, or if F has negative
        curvature.
    """
    B = gradient.unsqueeze(1)
    norm = float(B.norm())
    if norm == 0:
        return torch.zeros_like(gradient), Solve("CG", 0, 0.0, True, 1.0)
    seen: dict[int, Tensor] = {}

    def damped(X: Tensor) -> Tensor:
        return multiply(X) + damping * X

    def note(X: Tensor) -> None:
        count = max(seen, default=0) + 1
        # The halves of this and of later numbers, and the last one.
        kept = {i: x for i, x in seen.items() if i >= count // 2 and i % stride == 0}
        seen.clear()
        seen.update(kept | {count: X})
        if clock.is_past(deadline):
            raise _TimeIsUpError

    stride = max(1, iterations // 8)
    tolerances = torch.full((1,), TOLERANCE * norm, dtype=B.dtype, device=B.device)
    try:
        x, report = conjugate_gradients(
            damped, B, None, tolerances, iterations, precondition, callback=note
        )
        residual, converged = float(report.residual_norms[0]), bool(report.converged[0])
    except _TimeIsUpError:
        x = seen[max(seen)]
        residual, converged = float((B - damped(x)).norm()), False
    except NotPositiveDefiniteError:
        return None
    count = max(seen)
    half = min(seen, key=lambda i: abs(i - count / 2))
    cosine = torch.nn.functional.cosine_similarity(seen[half][:, 0], x[:, 0], dim=0)
    halfway = 0.0 if half == count else float(cosine)
    return x[:, 0], Solve("CG", count, residual / norm, converged, halfway)


def iterations_for(operations: int) -> int:
    """Return how many iterations with the whole matrix are allowed."""
    return min(max(MOST_ITERATED // max(PASSES * operations, 1), FEWEST), MOST)
