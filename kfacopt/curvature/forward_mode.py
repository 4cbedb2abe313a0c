"""Derivatives of functions of θ along vectors, in forward mode; other ways are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from kfacopt.curvature.batched_autograd import quiet_vmap
from kfacopt.curvature.confirmation import random_like
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.data import random_devices, same_random_numbers, tensors_put_back


class ForwardMode:
    """Derivatives in forward mode at θ, confirmed once for the functions of a graph.

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
        self._complete: bool | None = None

    def along(
        self,
        key: tuple[str, int],
        function: Callable[..., tuple[Tensor, ...]],
        V: Sequence[Tensor],
        is_right: Callable[[list[Tensor], list[Tensor]], bool | None],
    ) -> list[Tensor] | None:
        """Return derivatives along K vectors in forward mode, or `None` where it fails or is wrong.

        One random vector more, along all of θ, is multiplied with the first vectors that a graph of
        the same functions meets; not with those of every product.

        Args:
            key: Which derivative, and of which functions.
            function: Maps θ to what is differentiated.
            V: The vectors.
            is_right: Judges the derivatives along the random vector. `None`: it cannot tell, and
                will be asked again.
        """
        confirmed = self._model.confirmed
        if key in confirmed:
            return self._derivatives(function, V) if confirmed[key] else None
        probe = random_like(self._model.leaves)
        result = self._derivatives(
            function, [torch.cat([v, r]) for v, r in zip(V, probe, strict=True)]
        )
        verdict = False if result is None else is_right(probe, [x[-1:] for x in result])
        if verdict is not None:
            confirmed[key] = verdict
        return [x[:-1] for x in result] if result is not None and verdict else None

    def is_complete(self) -> bool:
        """Tell whether substitution sees every path from θ to z.

        A module may reach a parameter past its own name (in a closure, a list, a plain
        attribute); with other tensors in the place of θ, the predictions then still depend on it.
        """
        if self.can_substitute and self._complete is None:
            values = [p.detach() for p in self._model.leaves]
            with torch.enable_grad(), torch.random.fork_rng(random_devices()):
                try:
                    self._complete = not self._model.reached_by(
                        self._model.at(values, self._inputs)
                    )
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # parts in TorchScript take no other tensors
                    self._complete = False
        return self.can_substitute and bool(self._complete)

    def _derivatives(
        self, function: Callable[..., tuple[Tensor, ...]], V: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """Return the derivatives of a function of θ along K vectors, or `None` if torch cannot."""
        primals = tuple(p.detach() for p in self._model.leaves)

        def along(*v: Tensor) -> tuple[Tensor, ...]:
            derivatives: tuple[Tensor, ...] = jvp(function, primals, v)[1]
            return derivatives

        with torch.no_grad(), quiet_vmap(), self.once_more():
            try:
                if V[0].shape[0] == 1:
                    return [x.unsqueeze(0) for x in along(*(v[0] for v in V))]
                return list(vmap(along, randomness="same")(*V))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError):
                self.can_substitute = False
                return None

    @contextmanager
    def once_more(self) -> Iterator[None]:
        """Run the model as in the forward pass that made z, without a trace."""
        # Tensors that are assigned inside a transformation cannot be used outside of it.
        with tensors_put_back(*self._model.modules()), same_random_numbers(self._random_state):
            yield
