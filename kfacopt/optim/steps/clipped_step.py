"""Steps with a given learning rate and the KL clip; those that tune themselves are next door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from kfacopt.optim.settings import Groups
from kfacopt.optim.state.initial import momentum_buffer
from kfacopt.optim.state.running_averages import States
from kfacopt.optim.steps.kl_clip import kl_clip_scale
from kfacopt.optim.steps.trust_region import TrustRegion
from kfacopt.optim.steps.update import ByParameter, apply_step, decay_of


class ClippedStep:
    """Moves parameters along ν lr Δ, with momentum and decoupled weight decay.

    ν bounds the step that the rates which the optimizer was made with would take. So it does not
    depend on what a schedule makes of lr: half of lr is half of the step, clipped or not, as if κ
    were multiplied by (lr / initial lr)².

    Args:
        kl_clip: κ; `None` does not clip; `"auto"` follows the data, see `trust_region`.

    Attributes:
        scale: ν of the last step; `None` before one, and without a clip.
        size: The size of the last step, in units of `lr`, which weight decay follows.
        trust_region: What κ follows the data by; `None` where it is given.
    """

    size = 1.0

    def __init__(self, kl_clip: float | Literal["auto"] | None) -> None:
        self._kl_clip = None if kl_clip == "auto" else kl_clip
        self.trust_region = TrustRegion() if kl_clip == "auto" else None
        self.scale: Tensor | None = None

    @property
    def trouble(self) -> str:
        """Why κ does not follow the data, if it should."""
        return "" if self.trust_region is None else self.trust_region.trouble

    def step(
        self,
        states: States,
        groups: Groups,
        gradients: ByParameter,
        directions: ByParameter,
        objective: Callable[[], Any] | None,
    ) -> bool:
        """Update parameters in place.

        Args:
            states: The optimizer's state, which has the momentum.
            groups: The parameter groups.
            gradients: ∇ of each parameter.
            directions: Δ of those that have one; changed.
            objective: Returns what the step is measured by; `None` where it is not.

        Returns:
            That a step was taken.
        """
        group_of = {p: group for group in groups for p in group["params"]}
        region, clip = self.trust_region, self._kl_clip
        if region is not None:
            clip = region.clip(groups)
        if directions and clip is not None:
            grads = [gradients[p] for p in directions]
            lrs = [group_of[p]["base_lr"] or group_of[p]["lr"] for p in directions]
            self.scale = kl_clip_scale(grads, list(directions.values()), lrs, clip)
        measured = region is not None and objective is not None
        before = {p: p.detach().clone() for p in directions} if measured else {}
        factors: dict[tuple[float, torch.device], Any] = {}
        for p, d in directions.items():
            lr = group_of[p]["lr"]
            key = (lr, d.device)
            if key not in factors:
                factors[key] = lr if self.scale is None else lr * self.scale.to(d.device)
            d.mul_(factors[key])
        for group in groups:
            own = [p for p in group["params"] if p in directions]
            if own:
                steps, decay = [directions[p] for p in own], decay_of(group)
                options = {name: group[name] for name in ("momentum", "nesterov", "foreach")}
                buffers = [momentum_buffer(states[p], p) for p in own if options["momentum"]]
                apply_step(own, steps, buffers, decay=decay, **options)
        if before and region is not None and objective is not None:
            region.follow(groups, before, objective)
        return True

    def scalars(self, groups: Groups) -> dict[str, float]:
        """Return what is to be logged of the last step, κ, and the last measurement."""
        scale = {"kl_clip_scale": 1.0 if self.scale is None else float(self.scale)}
        if self.trust_region is None:
            return scale
        measured = {name: float(x) for name, x in vars(self.trust_region.statistics).items()}
        return scale | {"trust_region": self.trust_region.clip(groups)} | measured
