"""Derivatives of functions of θ along vectors, in forward mode; other ways are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from kfacopt.curvature.batched_autograd import if_possible, quiet_vmap
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.data import attributes_put_back, random_devices, same_random_numbers


class ForwardMode:
    """Derivatives in forward mode at θ; whether they are right, others find out.

    Args:
        model: f and θ.
        X: The inputs of one batch.
        random_state: That of torch's generators before the forward pass.

    Attributes:
        can_substitute: Whether f can be evaluated with other tensors in the place of θ.
    """

    def __init__(self, model: ParametrizedModel, X: Any, random_state: list[Tensor]) -> None:
        self._model, self._inputs, self._random_state = model, X, random_state
        self.can_substitute = model.can_substitute()

    def is_complete(self) -> bool:
        """Tell whether substitution sees every path from θ to z.

        A module may reach a parameter past its own name (in a closure, a list, a plain
        attribute); with other tensors in the place of θ, the predictions then still depend on it.
        """
        return self.can_substitute and self._sees_all

    @cached_property
    def _sees_all(self) -> bool:
        model, values = self._model, [p.detach() for p in self._model.leaves]
        with torch.enable_grad(), torch.random.fork_rng(random_devices()):
            reached = if_possible(lambda: model.reached_by(model.at(values, self._inputs)))
        return reached is False  # `None`: parts in TorchScript take no other tensors

    def derivatives(
        self, function: Callable[..., tuple[Tensor, ...]], V: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """Return the derivatives of a function of θ along K vectors, or `None` if torch cannot."""
        primals = tuple(p.detach() for p in self._model.leaves)

        def along(*v: Tensor) -> tuple[Tensor, ...]:
            derivatives: tuple[Tensor, ...] = jvp(function, primals, v)[1]
            return derivatives

        with torch.no_grad(), quiet_vmap(), self.once_more():
            if V[0].shape[0] == 1:
                found = if_possible(lambda: [x.unsqueeze(0) for x in along(*(v[0] for v in V))])
            else:
                found = if_possible(lambda: list(vmap(along, randomness="same")(*V)))
        if found is None:
            self.can_substitute = False
        return found

    @contextmanager
    def once_more(self) -> Iterator[None]:
        """Run the model as in the forward pass that made z, without a trace."""
        # Tensors that are assigned inside a transformation cannot be used outside of it.
        with attributes_put_back(*self._model.modules()), same_random_numbers(self._random_state):
            yield
