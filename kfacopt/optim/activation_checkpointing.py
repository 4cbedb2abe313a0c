"""Recognise reentrant activation checkpointing, which hides its layers from the would-be pass."""

from __future__ import annotations

import sys
from types import FrameType

from torch.utils.checkpoint import CheckpointFunction


def refuse_reentrant_checkpointing(layer_name: str) -> None:
    """Raise if the running forward pass is the first one of reentrant activation checkpointing.

    It runs without gradients, and its backward pass cannot be asked for gradients by outputs.

    Args:
        layer_name: The layer that is being called without gradients.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise RuntimeError(
                f"layer {layer_name!r}: KFACOptimizer does not work with reentrant activation "
                "checkpointing. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        frame = frame.f_back
