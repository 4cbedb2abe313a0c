"""Values of tensors, kept to tell whether they have changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Snapshot:
    """The values of tensors at one moment.

    Versions of tensors do not tell it: a write through `.data` leaves them as they were.

    Args:
        tensors: The tensors, which are copied.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._values = [t.detach().clone() for t in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether tensors have these values, shapes and devices."""
        if len(tensors) != len(self._values):
            return False
        pairs = list(zip(tensors, self._values, strict=True))
        if any(t.shape != value.shape or t.device != value.device for t, value in pairs):
            return False
        if all(t.device.type == "cpu" for t in tensors):
            return all(torch.equal(t, value) for t, value in pairs)
        # one synchronisation with the device in place of one for each tensor
        same = [torch.eq(t, value).all().to(tensors[0].device) for t, value in pairs]
        return bool(torch.stack(same).all())
