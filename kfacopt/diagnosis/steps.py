"""Directions beside the exact damped step, and what the loss does along them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.curvature.ggn import GGNLinearOperator
from kfacopt.data import Batch
from kfacopt.diagnosis.candidates import Partition
from kfacopt.diagnosis.report import CLIPPED, StepReport


def cosine(x: Tensor, y: Tensor) -> float:
    """Return the cosine of two vectors; NaN if one is 0."""
    x, y = x.double(), y.double()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else math.nan


def compare(
    steps: Mapping[str, Tensor],
    exact: Tensor | None,
    gradient: Tensor,
    products: Mapping[str, Tensor],
    damping: Tensor,
    losses: LossAlong,
) -> tuple[StepReport, ...]:
    """Return how directions compare with the exact damped step.

    With B = F + diag(δ), a direction d (to be subtracted) decreases the damped model by
    α gᵀd − ½ α² dᵀBd, at most by (gᵀd)² / (2 dᵀBd), at its best length α = gᵀd / dᵀBd. The clipped
    step alone has a length of its own.

    Args:
        steps: The directions `[D]` by name.
        exact: The exact step; `None` if it was not found.
        gradient: g `[D]`.
        products: F d for each direction, and for the exact step under `""`, if there is one.
        damping: δ, `[D, 1]`.
        losses: The loss along directions.
    """
    g, delta = gradient.double(), damping[:, 0].double()

    def along(d: Tensor, product: Tensor) -> tuple[float, float, float]:
        d, Fd = d.double(), product.double()
        return float(g @ d), float(d @ Fd), float(d @ (delta * d))

    best = math.nan if exact is None else _decrease(*along(exact, products[""]))
    reports = []
    for name, d in steps.items():
        slope, curvature, extra = along(d, products[name])
        longest = slope / (curvature + extra) if curvature + extra > 0 else math.nan
        length = 1.0 if name == CLIPPED else longest
        predicted = length * slope - 0.5 * length**2 * curvature
        true, held_out = losses.decreases(d * length) if math.isfinite(length) else (None, None)
        decrease = predicted - 0.5 * length**2 * extra
        reports.append(
            StepReport(
                name,
                math.nan if exact is None else cosine(d, exact),
                decrease / best if best > 0 else math.nan,
                math.nan if true is None else _ratio(true, predicted),
                None if held_out is None else _ratio(held_out, predicted),
                length / longest if longest else math.nan,
            )
        )
    return tuple(reports)


def _decrease(slope: float, curvature: float, extra: float) -> float:
    return slope**2 / (curvature + extra) / 2 if curvature + extra > 0 else math.nan


def _ratio(true: float, predicted: float) -> float:
    return true / predicted if predicted > 0 else math.nan


class LossAlong:
    """The loss of the sample and of held-out data, at other parameters than the model's.

    Args:
        model: The model, which keeps its parameters.
        loss_func: The loss.
        partition: θ.
        batches: The sample, and the held-out data, which may be none.
        batch_size_fn: See `GGNLinearOperator`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: Any,
        partition: Partition,
        batches: tuple[Sequence[Batch], Sequence[Batch]],
        batch_size_fn: Any,
    ) -> None:
        self._given, self._batches = (model, loss_func), batches
        self._options = {"check_deterministic": False, "batch_size_fn": batch_size_fn}
        names = {id(p): name for name, p in model.named_parameters()}
        self._params = {names[id(p)]: p for p in partition.params}
        self._before = self._losses(torch.zeros(sum(partition.sizes)))

    def decreases(self, step: Tensor) -> tuple[float, float | None]:
        """Return L(θ) − L(θ − step) of the sample, and of the held-out data if there are any."""
        pairs = zip(self._before, self._losses(step), strict=True)
        true, held_out = (None if x is None or y is None else x - y for x, y in pairs)
        assert true is not None
        return true, held_out

    def _losses(self, step: Tensor) -> list[float | None]:
        sizes = [p.numel() for p in self._params.values()]
        pairs = zip(self._params.items(), step.split(sizes), strict=True)
        moved = {
            name: (p.detach() - d.reshape(p.shape).to(p)).requires_grad_() for (name, p), d in pairs
        }
        return [self._loss(moved, batches) for batches in self._batches]

    def _loss(self, params: dict[str, Tensor], batches: Sequence[Batch]) -> float | None:
        if not batches:
            return None
        operator = GGNLinearOperator(*self._given, params, list(batches), **self._options)
        return float(operator.gradient_and_loss()[1])
