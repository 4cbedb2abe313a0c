"""What nodes of autograd's graph have kept, also where activation checkpointing recomputes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from kfacopt.kfac.capture import would_be_pass

T = TypeVar("T")


class RecomputedError(Exception):
    """A saved tensor is recomputed, and may be read in a backward pass of its own alone."""


# Not a context variable: with CUDA, hooks may run in threads of the autograd engine.
_own_passes = 0


def kept(node: Any, saved: str) -> Any:
    """Return a saved tensor, or several; `None` where it cannot be had, as its memory is gone.

    Raises:
        RecomputedError: If activation checkpointing recomputes it, and none of `in_own_pass` runs.
    """
    if not _own_passes and _is_recomputed(getattr(node, saved.replace("_saved_", "_raw_saved_"))):
        raise RecomputedError
    try:
        return getattr(node, saved)
    except RuntimeError:  # changed in place since, or its memory is gone
        return None


def _is_recomputed(raw: Any) -> bool:
    if isinstance(raw, tuple | list):
        return any(map(_is_recomputed, raw))
    hook = getattr(raw, "unpack_hook", None)
    return getattr(hook, "__qualname__", "").startswith("_checkpoint_hook")


def where_it_can_be_read(function: Callable[[], T]) -> T:
    """Call a function that reads with `kept`, in a backward pass of its own where it has to be.

    Activation checkpointing recomputes for each backward pass once, and then hands out each tensor
    once: the user's own pass lacks none, and not each tensor is computed on its own.

    Args:
        function: Reads each tensor at most once.
    """
    try:
        return function()
    except RecomputedError:
        return _in_own_pass(function)


def _in_own_pass(function: Callable[[], T]) -> T:
    found: list[T] = []

    def read(_: Any) -> None:
        global _own_passes
        _own_passes += 1
        try:
            found.append(function())
        finally:
            _own_passes -= 1

    with would_be_pass(), torch.enable_grad():
        start = torch.zeros((), requires_grad=True)
        end = start.view_as(start)
        end.register_hook(read)
        torch.autograd.grad(end, start)
    return found[0]
