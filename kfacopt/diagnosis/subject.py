"""What is examined: a model and its loss on a sample, and the blocks that K-FAC covers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kfacopt.curvature.ggn import GGNLinearOperator
from kfacopt.data import Batch
from kfacopt.diagnosis import exact
from kfacopt.diagnosis.candidates import Options, Partition
from kfacopt.diagnosis.clock import Clock
from kfacopt.diagnosis.coverage import Coverage, blocks_of, find_coverage
from kfacopt.diagnosis.plan import MOST_DATA, MOST_OPERATIONS, Plan
from kfacopt.diagnosis.reductions import Reduced, reduction_by_trial, said_of
from kfacopt.diagnosis.sample import Sample, cut, divide, read, size_of

# How many data show what a forward pass takes, and whether a loss is a mean or a sum.
FIRST_LOOK, TRIED = 4, 32


@dataclass(frozen=True)
class Limits:
    """The numbers that `kfacopt.diagnose` is given.

    Attributes:
        max_batches: See there.
        max_data: See there.
        max_seconds: See there.
        seed: See there.
        batch_size_fn: See there.
    """

    max_batches: int
    max_data: int | None
    max_seconds: float
    seed: int
    batch_size_fn: Any


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        model: The model.
        loss_func: The loss.
        plan: How K-FAC is set.
        limits: What was asked for.
        clock: The time.
        sample: The data.
        coverage: What K-FAC covers.
        partition: The blocks.
        options: How factors are formed.
        first: The first batch, whole.
        notes: What is to be told of the way.
    """

    model: nn.Module
    loss_func: Any
    plan: Plan
    limits: Limits
    clock: Clock
    sample: Sample
    coverage: Coverage
    partition: Partition
    options: Options
    first: Batch
    notes: list[str]

    @property
    def given(self) -> tuple[nn.Module, Any, list[Batch]]:
        """What operators are made of."""
        return self.model, self.loss_func, self.sample.batches

    @property
    def is_cheap(self) -> bool:
        """Whether products are."""
        return self.coverage.operations <= exact.CHEAP

    def ggn(self, params: Sequence[nn.Parameter], check: bool = False) -> GGNLinearOperator:
        """Return the exact GGN over some parameters; see `exact.operator_of`."""
        return exact.operator_of(self.given, list(params), self.limits.batch_size_fn, check)


def take(
    model: nn.Module,
    loss_func: Any,
    data: Iterable[Batch],
    plan: Plan,
    limits: Limits,
    clock: Clock,
) -> Subject:
    """Read the data, and find what K-FAC covers.

    Raises:
        ValueError: If it covers nothing, or parameters of several dtypes or devices.
    """
    clock.begin("reading data")
    batches = read(data, limits.max_batches + 1)
    most, notes = limits.max_batches, list[str]()
    if plan.reduction is None:
        found_out = reduction_by_trial(model, loss_func, _some(batches[0], TRIED))
        notes.append(said_of(found_out))
        if found_out is None:
            most = 1
        else:
            plan, loss_func = replace(plan, reduction=found_out), Reduced(loss_func, found_out)
    sample = divide(batches, most, limits.max_data or _affordable(model, plan, batches[0]))
    found = _coverage(model, plan, sample.batches)
    if not found.params:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.uncovered.items())[:3])
        raise ValueError(f"model: K-FAC covers none of its trained parameters ({reasons}).")
    if len({(p.dtype, p.device) for p in found.params}) > 1:
        raise ValueError("model: the parameters that K-FAC covers must share one dtype and device.")
    names = {id(p): name for name, p in model.named_parameters()}
    blocks = blocks_of(model, found.params, plan.separate, sample.batches)
    partition = Partition.of(blocks, names, plan.damping)
    options = plan.options(found.outputs, limits.seed, limits.batch_size_fn)
    own = (sample, found, partition, options, batches[0], notes)
    return Subject(model, loss_func, plan, limits, clock, *own)


def _affordable(model: nn.Module, plan: Plan, batch: Batch) -> int:
    """Return how many data a forward pass may have."""
    size, first = size_of(batch), _some(batch, FIRST_LOOK)
    cost = _coverage(model, plan, [first]).operations
    return max(1, min(MOST_DATA, MOST_OPERATIONS * min(size or 1, FIRST_LOOK) // max(cost, 1)))


def _some(batch: Batch, count: int) -> Batch:
    """Return the first data of a batch; all of one that cannot be cut."""
    if size_of(batch) is None:
        return batch
    part: Batch = cut(batch, slice(0, count))
    return part


def _coverage(model: nn.Module, plan: Plan, batches: Sequence[Batch]) -> Coverage:
    return find_coverage(model, batches, plan.kinds, plan.separate, plan.allowed)
