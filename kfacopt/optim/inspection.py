"""An optimizer's settings and running curvature, for those who examine it; nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.layers import Block, Kinds, default_kinds
from kfacopt.linalg.kept_products import KeptProduct
from kfacopt.linalg.kronecker import KroneckerEigendecomposition, KroneckerMatrix
from kfacopt.optim.kfac import KFACOptimizer
from kfacopt.optim.monitoring import Scalars, block_statistics
from kfacopt.optim.settings import Settings, as_number
from kfacopt.optim.state.inverses import _factors, bases_of
from kfacopt.optim.state.running_averages import State, has_weight
from kfacopt.optim.steps.fallback import rate_of
from kfacopt.optim.steps.kl_clip import kl_clip_scale
from kfacopt.optim.steps.trust_region import FIRST_KL_CLIP


@dataclass(frozen=True)
class RunningBlock:
    """What an optimizer keeps of a block of F.

    Attributes:
        matrix: Ḡ ⊗ Ā, or EKFAC's second moments in their bases; `None` before there is one.
        inverse: The damped inverse that gradients are multiplied by.
        scalars: The block's entries in `KFACOptimizer.statistics`.
    """

    matrix: KroneckerMatrix | None
    inverse: KroneckerMatrix | None
    scalars: Scalars


@dataclass(frozen=True)
class Inspection:
    """What an optimizer is set to, and what it has.

    Attributes:
        settings: Those of the whole optimizer.
        damping: δ of each parameter's group.
        blocks: What is kept of each block, by the `id`s of its parameters.
        num_steps: How many steps were made.
        rates: lr of each parameter's group, as it is and as it was at first.
        kl_clip: κ as it is; `None` without a clip.
        fallback_lr: At which AdamW trains each parameter, if it has no curvature.
    """

    settings: Settings
    damping: dict[Parameter, float]
    blocks: dict[tuple[int, ...], RunningBlock]
    num_steps: int
    rates: dict[Parameter, tuple[float, float]]
    kl_clip: float | None
    fallback_lr: dict[Parameter, float]

    @property
    def kinds(self) -> Kinds:
        """The kinds of modules that are preconditioned."""
        chosen = self.settings.layers
        return default_kinds() if chosen is None else chosen

    def step_lengths(
        self, params: Sequence[Parameter], gradients: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> list[float]:
        """Return by what a step with a given rate multiplies directions: lr ν.

        Args:
            params: The parameters.
            gradients: Their gradients.
            directions: The gradients, preconditioned.
        """
        scale = 1.0
        if self.kl_clip is not None:
            first = [self.rates[p][1] or self.rates[p][0] for p in params]
            scale = float(kl_clip_scale(gradients, directions, first, self.kl_clip))
        return [self.rates[p][0] * scale for p in params]


def inspect(optimizer: KFACOptimizer) -> Inspection:
    """Return an optimizer's settings and running curvature."""
    groups, curvature = optimizer.param_groups, optimizer._curvature
    damping = {p: float(as_number(g["damping"])) for g in groups for p in g["params"]}
    steps = int(groups[0]["num_steps"])
    blocks = {}
    for block in curvature.blocks:
        delta, states = damping[block.anchor], curvature.entries
        own, state = states.get(block.anchor, {}), states.get(block.layer.anchor, {})
        known = block.anchor in states
        inverse = curvature.inverse(block, delta) if known else None
        if isinstance(inverse, KeptProduct):
            inverse = inverse.dense()
        blocks[tuple(map(id, block.parameters))] = RunningBlock(
            _matrix(own, state, block) if known else None,
            None if inverse is None else inverse.widened(),
            block_statistics(states, block, delta, steps),
        )
    rates = {p: (as_number(g["lr"]), as_number(g["base_lr"])) for g in groups for p in g["params"]}
    clip = optimizer._settings.steps.kl_clip
    kappa = float(groups[0].get("trust_region", FIRST_KL_CLIP)) if clip == "auto" else clip
    kinds = (optimizer._connection.vectors, optimizer._settings.steps.vector_lr)
    fallback = {p: as_number(rate_of(p, g, *kinds)) for g in groups for p in g["params"]}
    return Inspection(optimizer._settings, damping, blocks, steps, rates, kappa, fallback)


def _matrix(own: State, layer_state: State, block: Block) -> KroneckerMatrix | None:
    if not has_weight(layer_state):
        return None
    bases = bases_of(own)
    if bases is not None:
        return KroneckerEigendecomposition(*bases, own["second_moments"]).widened()
    return _factors(layer_state, block).widened()
