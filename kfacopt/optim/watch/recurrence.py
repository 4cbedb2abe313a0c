"""When a recurrent module shows the products in it; how it does that is in `kfac/unrolled.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from kfacopt.data import is_evaluating
from kfacopt.kfac.layers import Kinds
from kfacopt.kfac.unrolled import is_recurrent, unroll
from kfacopt.optim.watch.hooks import module_hooks


class Collecting(Protocol):
    """Who knows whether statistics are due."""

    collecting: bool


class RecurrenceWatch:
    """Makes loops of recurrent modules in passes whose gradients are collected.

    Args:
        receiver: Knows whether they are.
        kinds: The kinds of modules that are layers; the products in others do not matter.
        evaluates: Whether kfacopt evaluates the model itself.
    """

    def __init__(self, receiver: Collecting, kinds: Kinds, evaluates: bool) -> None:
        self._receiver, self._kinds, self._evaluates = receiver, tuple(kinds), evaluates

    def hooks(self, modules: Iterable[nn.Module]) -> list[Any]:
        """Put hooks on those of some modules that may have to be loops; return the handles."""
        own = [m for m in modules if is_recurrent(m)]
        wanted = [m for m in own if self._evaluates or isinstance(m, self._kinds)]
        return module_hooks(wanted, self._enter)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments that a recurrent module is to be called with, if others.

        kfacopt's own evaluations always are: forward mode does not know the fused kernel.
        """
        collecting = self._receiver.collecting and isinstance(module, self._kinds)
        if is_evaluating() or (collecting and torch.is_grad_enabled()):
            return unroll(module, args, kwargs)
        return None
