"""The measurements of `kfacopt.diagnose`, each of a subject; reports are made in `assembly`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from kfacopt.curvature.ggn import GGNLinearOperator
from kfacopt.diagnosis import exact
from kfacopt.diagnosis.candidates import (
    Candidate,
    can_decompose,
    ekfac_candidate,
    is_same,
    kfac_candidate,
)
from kfacopt.diagnosis.distances import Estimate, relative_distance, share_outside
from kfacopt.diagnosis.exact import Solve
from kfacopt.diagnosis.report import (
    BLOCKS,
    CLIPPED,
    GRADIENT,
    KFAC,
    OPTIMIZER,
    OutsideReport,
    StepReport,
)
from kfacopt.diagnosis.steps import LossAlong, compare
from kfacopt.diagnosis.subject import Subject

# The parts of the time that is left that the exact step, and the blocks after it, may take.
STEP_SHARE, BLOCKS_SHARE = 0.5, 0.85

Solved = tuple[Tensor, Solve]
Parts = dict[str, list[Tensor | None]]


@dataclass
class Blocks:
    """What is measured of the exact blocks, one entry each.

    Attributes:
        distance: To each candidate.
        estimator: How.
        exact: The block, or its products.
        step: Its damped inverse times the gradient.
        solve: How that was found.
    """

    distance: list[dict[str, Estimate]] = field(default_factory=list)
    estimator: list[str] = field(default_factory=list)
    exact: list[exact.ExactBlock | None] = field(default_factory=list)
    step: list[Tensor | None] = field(default_factory=list)
    solve: list[Solve | None] = field(default_factory=list)

    def skip(self) -> None:
        """Take note of a block that was not measured."""
        self.distance.append({})
        self.estimator.append("not measured")
        self.exact.append(None)
        self.add_step(None)

    def add_step(self, solved: Solved | None) -> None:
        """Add a block's step, if it was found to some accuracy."""
        self.step.append(solved[0] if solved is not None and solved[1].is_near else None)
        self.solve.append(None if solved is None else solved[1])


# Approximations ----------------------------------------------------------------------------------


def candidates_of(subject: Subject) -> list[Candidate]:
    """Return K-FAC, with the other of expand and reduce if it differs, EKFAC, the optimizer."""
    own, given, options, clock = subject.partition, subject.given, subject.options, subject.clock
    clock.begin("K-FAC")
    kfac = kfac_candidate(KFAC, options.approx, own, given, options)
    found = [kfac]
    clock.begin("expand and reduce")
    approx: Any = "reduce" if options.approx == "expand" else "expand"
    other = kfac_candidate(f"{KFAC} {approx}", approx, own, given, options)
    if not is_same(kfac, other):
        found.append(other)
    clock.begin("EKFAC")
    if clock.is_past():
        clock.cut.append("EKFAC")
    elif can_decompose(kfac):
        found.append(ekfac_candidate(own, given, options))
    else:
        subject.notes.append("EKFAC is left out: factors are too wide to be decomposed here.")
    running = _running_candidate(subject)
    return found if running is None else [*found, running]


def _running_candidate(subject: Subject) -> Candidate | None:
    seen, blocks = subject.plan.inspection, subject.partition.blocks
    if seen is None:
        return None
    kept = [seen.blocks.get(tuple(map(id, b.parameters))) for b in blocks]
    matrices = [None if x is None else x.matrix for x in kept]
    inverses = [None if x is None else x.inverse for x in kept]
    pairs = zip(subject.partition.names, inverses, strict=True)
    missing = [name for name, inverse in pairs if inverse is None]
    if missing:
        which = "of no block" if len(missing) == len(blocks) else f"not of {', '.join(missing)}"
        subject.notes.append(f"The optimizer has inverses {which} so far.")
    return Candidate(OPTIMIZER, matrices, inverses, blocks)


# The exact matrix --------------------------------------------------------------------------------


def whole_matrix(subject: Subject, ggn: GGNLinearOperator) -> Tensor | None:
    """Return the GGN in float64, if it is small."""
    is_small = exact.is_formed(ggn.shape[0], subject.coverage.operations)
    return exact.formed(ggn) if is_small else None


def exact_step(
    subject: Subject,
    ggn: GGNLinearOperator,
    matrix: Tensor | None,
    gradient: Tensor,
    kfac: Candidate,
) -> Solved | None:
    """Return (F + diag(δ))⁻¹ g; `None` if F has negative curvature, or there was no time."""
    column = subject.partition.damping_column(gradient)
    if matrix is not None:
        return exact.solve_dense(matrix, column[:, 0], gradient)

    def precondition(R: Tensor) -> Tensor:
        parts = [kfac.precondition(i, r) for i, r in enumerate(subject.partition.split(R))]
        return torch.cat([part for part in parts if part is not None])

    iterations, clock = exact.iterations_for(subject.coverage.operations), subject.clock
    start, limits = clock.seconds, (iterations, clock, clock.part(STEP_SHARE))
    solved = exact.solve_iteratively(_product(ggn), column, gradient, *limits, precondition)
    if solved is None or solved[1].converged or solved[1].iterations >= iterations:
        return solved
    taken = (clock.seconds - start) / solved[1].iterations
    return solved[0], replace(solved[1], enough_seconds=start + iterations * taken / STEP_SHARE)


def _product(ggn: GGNLinearOperator) -> Callable[[Tensor], Tensor]:
    def product(X: Tensor) -> Tensor:
        multiplied: Tensor = ggn @ X
        return multiplied

    return product


def measure_blocks(
    subject: Subject,
    candidates: Sequence[Candidate],
    gradient: Sequence[Tensor],
    whole: Tensor | None,
) -> Blocks:
    """Measure the diagonal blocks one after the other, each in its part of the time.

    Args:
        subject: What is examined.
        candidates: What they are compared with; the first one is where iterations start from.
        gradient: g in the blocks' parts.
        whole: F, if it was formed.
    """
    found, clock = Blocks(), subject.clock
    generator = Generator(gradient[0].device).manual_seed(subject.limits.seed)
    end, start = clock.part(BLOCKS_SHARE), 0
    names, sizes = subject.partition.names, subject.partition.sizes
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        clock.begin(name)
        part, start = slice(start, start + size), start + size
        if clock.is_past(end):
            clock.cut.append(f"block {name}")
            found.skip()
            continue
        deadline = clock.seconds + (end - clock.seconds) / (len(names) - i)
        ggn = subject.ggn(subject.partition.blocks[i].parameters)
        if whole is None:
            block = exact.exact_block(ggn, subject.coverage.operations, generator)
        else:
            block = exact.formed_block(whole[part, part], gradient[i].new_zeros(size, 0))
        estimates = {c.name: relative_distance(c, i, block) for c in candidates}
        found.distance.append({name: x for name, x in estimates.items() if x is not None})
        count = block.probes.shape[1]
        found.estimator.append(f"{count} probes" if block.matrix is None else "formed")
        found.exact.append(block)
        found.add_step(_block_step(subject, i, candidates[0], ggn, block, gradient[i], deadline))
    return found


def _block_step(
    subject: Subject,
    index: int,
    kfac: Candidate,
    ggn: GGNLinearOperator,
    block: exact.ExactBlock,
    gradient: Tensor,
    deadline: float,
) -> Solved | None:
    damping = subject.partition.damping[index]
    if block.matrix is not None:
        return exact.solve_dense(block.matrix, damping, gradient)

    def precondition(R: Tensor) -> Tensor:
        product = kfac.precondition(index, R)
        assert product is not None
        return product

    iterations = exact.MANY_ON_BLOCKS if subject.is_cheap else exact.FEW_ON_BLOCKS
    limits = (iterations, subject.clock, deadline)
    return exact.solve_iteratively(_product(ggn), damping, gradient, *limits, precondition)


def measure_outside(
    subject: Subject, ggn: GGNLinearOperator, matrix: Tensor | None, found: Blocks
) -> OutsideReport | None:
    """Return the share of curvature outside of the blocks; `None` if one was not measured."""
    blocks = [b for b in found.exact if b is not None]
    if len(blocks) < len(found.exact):
        return None
    if matrix is not None:
        own = sum(float(b.matrix.square().sum()) for b in blocks if b.matrix is not None)
        whole = float(matrix.square().sum())
        return OutsideReport(1 - own / whole, 0.0) if whole else None
    if subject.clock.is_past():
        subject.clock.cut.append("the share of curvature outside of the blocks")
        return None
    probes = torch.cat([b.probes for b in blocks])
    return OutsideReport(*share_outside(blocks, exact.products(ggn, probes)))


# Directions --------------------------------------------------------------------------------------


def directions_of(
    subject: Subject, candidates: Sequence[Candidate], found: Blocks, gradient: Tensor
) -> Parts:
    """Return each direction in the blocks' parts; `None` where there is none."""
    parts = subject.partition.split(gradient)
    steps: Parts = {GRADIENT: list(parts)}
    for c in candidates:
        own = [c.precondition(i, g.unsqueeze(1)) for i, g in enumerate(parts)]
        steps[c.name] = [None if x is None else x[:, 0] for x in own]
    clipped = clipped_parts(subject, parts, steps.get(OPTIMIZER))
    return steps | ({} if clipped is None else {CLIPPED: clipped}) | {BLOCKS: found.step}


def clipped_parts(
    subject: Subject, gradients: Sequence[Tensor], directions: Sequence[Tensor | None] | None
) -> list[Tensor | None] | None:
    """Return a step of the optimizer's at its rates and with its KL clip, without momentum.

    `None` without an optimizer, for `lr="auto"` and where a block has no direction.
    """
    seen = subject.plan.inspection
    if seen is None or seen.settings.steps.tuned or directions is None:
        return None
    known = [d for d in directions if d is not None]
    if len(known) < len(directions):
        return None
    params, sizes = subject.partition.params, [p.numel() for p in subject.partition.params]
    own = [torch.cat(list(x)).split(sizes) for x in (gradients, known)]
    lrs, steps = seen.step_lengths(params, *own), own[1]
    whole = torch.cat([lr * d for lr, d in zip(lrs, steps, strict=True)])
    return list(subject.partition.split(whole))


def compare_directions(
    subject: Subject, steps: Parts, best: Tensor | None, gradient: Tensor, ggn: GGNLinearOperator
) -> tuple[StepReport, ...]:
    """Return how directions that have all parts compare with the exact step, if it was found."""
    whole = {
        name: torch.cat([x for x in parts if x is not None])
        for name, parts in steps.items()
        if all(x is not None for x in parts)
    }
    all_steps = whole if best is None else {"": best, **whole}
    curved = exact.products(ggn, torch.stack(list(all_steps.values()), dim=1)).unbind(1)
    products = dict(zip(all_steps, curved, strict=True))
    batches = (subject.sample.batches, subject.sample.held_out)
    given = (subject.model, subject.loss_func, subject.partition, batches)
    losses = LossAlong(*given, subject.limits.batch_size_fn)
    damping = subject.partition.damping_column(gradient)
    return compare(whole, best, gradient, products, damping, losses)
