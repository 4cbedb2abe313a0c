"""Layers' sums of moments that wait for a step; what one backward pass adds is elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from kfacopt.kfac.layers import Layer
from kfacopt.optim.statistics.moments import Moments


@dataclass
class WaitingMoments:
    """Sums of moments by layer.

    Attributes:
        moments: Sums in which G carries a factor on the objective once.
        squares: Those of whole objectives' gradients, in which G carries it squared.
    """

    moments: dict[Layer, Moments] = field(default_factory=dict)
    squares: dict[Layer, Moments] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Tell whether anything waits."""
        return bool(self.moments or self.squares)

    def take(self, layer: Layer, other: WaitingMoments) -> bool:
        """Add another record's sums of a layer, which it lacks then; tell whether it had any."""
        found = False
        for own, theirs in ((self.moments, other.moments), (self.squares, other.squares)):
            candidate = theirs.pop(layer, None)
            if candidate is not None:
                own.setdefault(layer, Moments()).add(candidate)
                found = True
        return found

    def keep(self, layers: Collection[Layer]) -> None:
        """Forget all other layers."""
        for own in (self.moments, self.squares):
            for layer in [layer for layer in own if layer not in layers]:
                del own[layer]

    def summed(self, loss_scale: float) -> dict[Layer, Moments]:
        """Return the sums of both; they are taken over.

        The empirical Fisher of an objective L = 1/N Σ_n ℓ_n is N Σ_n ∇L_n ∇L_nᵀ, ∇L_n = ∇ℓ_n / N,
        with N the data of all backward passes since the last step.

        Args:
            loss_scale: What a `GradScaler` multiplied the objective with.
        """
        for layer, moments in self.squares.items():
            moments.scale_curvature(moments.terms / loss_scale)
            known = self.moments.setdefault(layer, Moments())
            terms = torch.maximum(*map(torch.as_tensor, (known.terms, moments.terms)))
            known.add(moments)
            known.terms = terms
        return self.moments
