"""What a step costs beside a forward and a backward pass and AdamW; on copies, nothing is kept."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from kfacopt.data import attributes_put_back, random_devices, to_device
from kfacopt.diagnosis.report import CostReport
from kfacopt.diagnosis.subject import Subject
from kfacopt.optim.kfac import KFACOptimizer
from kfacopt.optim.rehearsal import Rehearsal

# The share of the time that is left which this may take, and about how many passes it takes.
SHARE, PASSES = 0.25, 25
MOST_ROUNDS = 5

NO_OPTIMIZER = (
    "What a step costs beside one of AdamW is measured where optimizer= is given; seconds are not "
    "looked at here."
)


def cost_of(
    subject: Subject, optimizer: KFACOptimizer | None
) -> tuple[CostReport | None, str | None]:
    """Return what a step costs, on the first batch and in the modes that the model is in.

    Returns:
        The cost, and why it was not measured, if it was not.
    """
    if optimizer is None:
        return None, NO_OPTIMIZER
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None, "What a step costs was not measured: there are several processes."
    seconds = subject.clock.part(SHARE) - subject.clock.seconds
    try:
        with (
            _gradients_put_back(subject.model),
            attributes_put_back(subject.model),
            torch.random.fork_rng(random_devices()),
            warnings.catch_warnings(),
            _silent(logging.getLogger("kfacopt")),
        ):
            warnings.simplefilter("ignore")
            rehearsal = Rehearsal.of(subject.model, subject.loss_func, optimizer)
            return _Timing(subject, rehearsal).report(seconds)
    except Exception as error:  # copies and steps run code of the user's
        line = (str(error).splitlines() or [""])[0][:100]
        return None, f"What a step costs was not measured: {type(error).__name__}: {line}"


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Let a copy not tell again what the optimizer has told."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _gradients_put_back(model: nn.Module) -> Iterator[None]:
    """Put gradients back at the end: a loss may differentiate parameters past the copies."""
    kept = [(p, p.grad) for p in model.parameters()]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in kept:
            p.grad = grad


class _Timing:
    """Times of steps of a copy.

    Args:
        subject: Has the first batch.
        rehearsal: Has the copies.
    """

    def __init__(self, subject: Subject, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._device = next(rehearsal.model.parameters()).device
        self._batch = tuple(to_device(x, self._device) for x in subject.first)
        self._values = [p.detach().clone() for p in rehearsal.model.parameters()]

    def report(self, seconds: float) -> tuple[CostReport | None, str | None]:
        """Return the cost, measured in about so many seconds."""
        model, start = self._rehearsal.model, time.monotonic()
        self._rehearsal.rest()
        self._pass()
        first = time.monotonic()
        self._pass()
        if (time.monotonic() - first) * PASSES > seconds:
            return None, "What a step costs was not measured: that takes too long here."
        found: dict[str, list[float]] = {"pass": [], "adamw": []}
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for _ in range(MOST_ROUNDS):
            self._rehearsal.rest()
            for _ in range(2):
                found["pass"].append(self._time(self._pass))
                found["adamw"].append(self._time(partial(self._pass, adamw)))
            for kind, step in self._rehearsal.steps():
                found.setdefault(kind, []).append(self._time(partial(step, self._differentiate)))
                self._put_back()
            if time.monotonic() - start > seconds / 2:
                break
        return _report(
            self._rehearsal, {kind: median(times) for kind, times in found.items()}
        ), None

    def _put_back(self) -> None:
        """Put the copy's parameters back, so that no number of steps learns the batch by heart."""
        with torch.no_grad():
            for p, value in zip(self._rehearsal.model.parameters(), self._values, strict=True):
                p.copy_(value)

    def _differentiate(self) -> None:
        X, y = self._batch
        self._rehearsal.loss_func(self._rehearsal.model(X), y).backward()

    def _pass(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._rehearsal.model.zero_grad()
        self._differentiate()
        if optimizer is not None:
            optimizer.step()

    def _time(self, run: Callable[[], Any]) -> float:
        on_gpu = self._device.type == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        if on_gpu:
            torch.cuda.synchronize(self._device)
        start = clock()
        run()
        if on_gpu:
            torch.cuda.synchronize(self._device)
        return clock() - start


def _report(rehearsal: Rehearsal, found: dict[str, float]) -> CostReport:
    one = found["pass"]
    passes = {kind: seconds / one for kind, seconds in found.items()}
    return CostReport(
        one,
        rehearsal.average(passes),
        passes.get("plain"),
        passes.get("factors"),
        passes["inverses"],
        passes["adamw"],
    )
