"""Find the loss scale that a `GradScaler` multiplied the loss with; nothing is unscaled here."""

from __future__ import annotations

import sys

from torch.amp import GradScaler

# Deep enough for the wrappers that schedulers and profilers put around `step`.
_MAX_FRAMES = 16


def calling_loss_scale() -> float:
    """Return the scale of the `GradScaler` that is calling `Optimizer.step`; 1 without one.

    The scaler unscales `.grad` itself, but the derivative of the objective by the loss, which the
    statistics carry as a factor, still has the scale. An optimizer is not told about its scaler,
    except by opting in to `_step_supports_amp_scaling`, which passes `None` after `unscale_`; so
    the calling frames are asked.
    """
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame.f_back is None:
            break
        frame = frame.f_back
        if frame.f_globals.get("__name__") == GradScaler.__module__:
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, GradScaler):
                return float(scaler.get_scale())
    return 1.0
