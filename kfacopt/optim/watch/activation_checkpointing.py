"""Recognise reentrant checkpointing, which hides its layers; the other kind needs nothing."""

from __future__ import annotations

import sys
from types import FrameType

from torch.utils.checkpoint import CheckpointFunction

_CODE = (CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__)


def refuse_reentrant_checkpointing(layer_name: str) -> None:
    """Raise if the running forward pass is one of reentrant activation checkpointing.

    The first one runs without gradients, the second one within a backward pass of its own, which
    cannot be asked for gradients by outputs.

    Args:
        layer_name: The layer that is being called without gradients, or in a backward pass.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CODE:
            raise RuntimeError(
                f"layer {layer_name!r}: KFACOptimizer does not work with reentrant activation "
                "checkpointing. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        frame = frame.f_back
