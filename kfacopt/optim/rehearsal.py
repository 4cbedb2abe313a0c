"""Steps of a copy of an optimizer, for those who time them; the optimizer itself does none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from kfacopt.optim.kfac import KFACOptimizer


@dataclass(frozen=True)
class Rehearsal:
    """A copy of a model, of its loss and of its optimizer.

    Attributes:
        model: The copy of the model.
        loss_func: That of the loss, which may have parameters.
        optimizer: That of the optimizer, of these parameters.
    """

    model: nn.Module
    loss_func: Any
    optimizer: KFACOptimizer

    @classmethod
    def of(cls, model: nn.Module, loss_func: Any, optimizer: KFACOptimizer) -> Rehearsal:
        """Copy all three, with their state."""
        return cls(*copy.deepcopy((model, loss_func, optimizer)))

    def rest(self) -> None:
        """Take the optimizer's hooks off, so that passes cost what they cost without it."""
        self.optimizer._watch.active = False

    def steps(self) -> Iterator[tuple[str, Callable[[Any], None]]]:
        """Yield steps of all kinds that there are: `"plain"`, `"factors"`, `"inverses"`.

        The first ones are `"warm-up"`. What is yielded is a function that, given what leaves
        gradients, makes the step. The measurement of `kl_clip="auto"`, one step in thirty, is not
        among them where that can be avoided.
        """
        schedule = self.optimizer._settings.schedule
        factors, inverses = schedule.factor_update_interval, schedule.inverse_update_interval
        self._go_to(self.optimizer._num_steps)
        yield from (("warm-up", self._step) for _ in range(2))  # which find layers
        starts = [k * factors * inverses for k in range(1, 7)]
        due = schedule.measurement_due
        both = next((n for n in starts if not (due(n) or due(n + factors))), starts[0])
        wanted = dict.fromkeys([both, both + 1, both + factors, both + factors + 1])
        for number in [both - 1, *wanted]:
            self._go_to(number)
            yield "warm-up" if number == both - 1 else self.kind(number), self._step

    def kind(self, step: int) -> str:
        """Return what is due in a step, counted from 0."""
        schedule = self.optimizer._settings.schedule
        if schedule.inverses_due(step):
            return "inverses"
        return "factors" if schedule.factors_due(step) else "plain"

    def average(self, of_kind: dict[str, float]) -> float:
        """Return the mean over all steps of a number that each kind of step has."""
        schedule = self.optimizer._settings.schedule
        period = schedule.factor_update_interval * schedule.inverse_update_interval
        numbers = range(min(period, 100_000))
        return sum(of_kind[self.kind(step)] for step in numbers) / len(numbers)

    def _step(self, differentiate: Callable[[], Any]) -> None:
        self.optimizer.zero_grad()
        differentiate()
        self.optimizer.step()

    def _go_to(self, step: int) -> None:
        """Get ready for a step, counted from 0, whatever the last one was."""
        for group in self.optimizer.param_groups:
            group["num_steps"] = step
        due = self.optimizer._settings.schedule.factors_due(step)
        self.optimizer._set_watching(due or not self.optimizer._curvature.is_complete())
