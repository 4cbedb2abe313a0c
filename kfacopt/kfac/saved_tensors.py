"""What nodes of autograd's graph have kept, also where activation checkpointing recomputes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfacopt.kfac.capture import would_be_pass

T = TypeVar("T")


def kept(node: Any, saved: str) -> Tensor | None:
    """Return a saved tensor; `None` where it cannot be had, as its memory is gone.

    One that is recomputed is there once in each backward pass, see `in_own_pass`.
    """
    try:
        tensor: Tensor | None = getattr(node, saved)
    except RuntimeError:  # changed in place since, or its memory is gone
        return None
    return tensor


def is_recomputed(node: Any, saved: Iterable[str]) -> bool:
    """Tell whether activation checkpointing recomputes any of some saved tensors."""
    for name in saved:
        raw = getattr(node, name.replace("_saved_", "_raw_saved_"), None)
        hook = getattr(raw, "unpack_hook", None)
        if getattr(hook, "__qualname__", "").startswith("_checkpoint_hook"):
            return True
    return False


def in_own_pass(function: Callable[[], T]) -> T:
    """Call a function within a backward pass of its own, through nothing.

    Activation checkpointing recomputes for each backward pass once, and then hands out each tensor
    once: what is read here is not taken from the user's own pass, nor computed for each tensor.
    """
    found: list[T] = []
    with would_be_pass(), torch.enable_grad():
        start = torch.zeros((), requires_grad=True)
        end = start.view_as(start)
        end.register_hook(lambda _: found.append(function()))
        torch.autograd.grad(end, start)
    return found[0]
