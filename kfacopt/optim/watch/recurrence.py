"""When a recurrent module shows the products in it; how it does that is in `kfac/unrolled.py`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from kfacopt.data import is_evaluating
from kfacopt.kfac.unrolled import unroll


class Collecting(Protocol):
    """Who knows whether statistics are due."""

    collecting: bool


class RecurrenceWatch:
    """Makes loops of recurrent modules in passes whose gradients are collected.

    Args:
        receiver: Knows whether they are.
    """

    def __init__(self, receiver: Collecting) -> None:
        self._receiver = receiver

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments that a recurrent module is to be called with, if others.

        kfacopt's own evaluations always are: forward mode does not know the fused kernel.
        """
        if is_evaluating() or (self._receiver.collecting and torch.is_grad_enabled()):
            return unroll(module, args, kwargs)
        return None
