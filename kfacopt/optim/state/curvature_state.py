"""The curvature that an optimizer keeps: running factors and damped inverses of its layers.

It lies in the optimizer's own `state`, by parameter; how an entry is computed is in
`running_averages` and `inverses`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import distributed as dist
from torch.nn import Parameter

from kfacopt.kfac.eigenvalues import Bases
from kfacopt.kfac.factor_forms import Factors
from kfacopt.kfac.factors import factor_dtype
from kfacopt.kfac.layers import Block, Layer
from kfacopt.linalg.kept_products import KeptProduct
from kfacopt.linalg.kronecker import DecompositionError, KroneckerMatrix
from kfacopt.linalg.triangles import Workspace
from kfacopt.optim.settings import Groups, Settings
from kfacopt.optim.state import inverses
from kfacopt.optim.state.conversions import follow_parameters
from kfacopt.optim.state.initial import complete_state, state_shapes
from kfacopt.optim.state.inverses_over_ranks import update_shared
from kfacopt.optim.state.running_averages import (
    FACTORS,
    States,
    fold_factors,
    fold_second_moments,
    grad_output_factor,
    input_factor,
)
from kfacopt.optim.statistics.averaging import average_second_moments
from kfacopt.optim.statistics.moments import Moments


class CurvatureState:
    """Factors and inverses of layers, kept in an optimizer's state.

    Args:
        settings: Those of the whole optimizer.

    Attributes:
        entries: The optimizer's `state`, which loading replaces.
        schedule: When factors and inverses are due.
        layers: The layers.
        blocks: Their blocks.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self.schedule = settings, settings.schedule
        self._form, self._inverse = settings.curvature.form, settings.inverse
        self.entries: States = {}
        self.layers: list[Layer] = []
        self.blocks: list[Block] = []

    def set_layers(self, layers: Iterable[Layer]) -> None:
        """Go on with layers that were found, or a state that was loaded; what fits is kept."""
        self.layers = list(layers)
        self.blocks = [block for layer in self.layers for block in layer.blocks]
        for layer in self.layers:
            inverses.discard_unfitting(self.entries, layer, self._form)

    def forget_missed(self, before: Iterable[Layer], step: int) -> None:
        """Let layers start anew that were no layers, and missed an update of their factors so.

        Args:
            before: The layers until now.
            step: The number of the next step.
        """
        anchors, due = {layer.anchor for layer in before}, self.schedule.factors_due
        for layer in self.layers:
            if layer.anchor not in anchors and self.has_statistics(layer):
                last = int(self.entries[layer.anchor]["factor_step"])
                if any(map(due, range(last + 1, step))):
                    inverses.discard(self.entries, layer)

    def has_statistics(self, layer: Layer) -> bool:
        """Tell whether a layer has had an update of its factors."""
        return bool(self.entries.get(layer.anchor, {}).get("factor_updates", 0))

    def is_complete(self) -> bool:
        """Tell whether all layers have."""
        return all(self.has_statistics(layer) for layer in self.layers)

    def named_factors(self, key: str | Parameter, names: Mapping[int, str]) -> Factors:
        """Return a layer's running factors.

        Raises:
            KeyError: If there is no such layer, or no statistics of it yet.
        """
        owners = [layer for layer in self.layers if layer.owns(key, names)]
        if len(owners) > 1:
            raise KeyError(
                f"{key!r} names {len(owners)} layers of different models; give a parameter."
            )
        if owners and self.has_statistics(owners[0]):
            state = self.entries[owners[0].anchor]
            own_a, own_g = (state[name].dtype for name in FACTORS)
            wide = factor_dtype(own_a) if owners[0].positions else own_a
            A, G = input_factor(state, owners[0], wide), grad_output_factor(state, own_g)
            return Factors.of(owners[0], A, G)
        known = [layer.name for layer in self.layers]
        raise KeyError(f"{key!r}: no such layer or parameter, or no step yet; layers: {known}.")

    def inverse(
        self, block: Block, damping: float, workspace: Workspace | None = None
    ) -> KroneckerMatrix | KeptProduct | None:
        """Return a block's damped inverse, or `None` if there is none yet."""
        return inverses.inverse_of(self.entries[block.anchor], damping, workspace)

    def bases(self) -> dict[Block, Bases]:
        """Return the eigenbases of the blocks whose second moments are kept."""
        found = {
            block: inverses.bases_of(self.entries.get(block.anchor, {})) for block in self.blocks
        }
        return {block: known for block, known in found.items() if known is not None}

    def fold(
        self,
        pending: Mapping[Layer, Moments],
        bases: Mapping[Block, Bases],
        step: int,
        group: dist.ProcessGroup | None,
    ) -> dict[Layer, Moments]:
        """Move the running factors, and second moments in known bases, to include statistics.

        Args:
            pending: What was collected since the last step.
            bases: The eigenbases that second moments were computed in.
            step: The number of the step.
            group: The ranks that average.

        Returns:
            The statistics of layers that have no eigenbases yet, for `fold_late`.
        """
        for layer, moments in pending.items():
            state = self.entries[layer.anchor]
            fold_factors(state, layer, moments, self._form, self.schedule.ema_decay, step)
        if not self._inverse.corrected:
            return {}
        new = dict.fromkeys(b.layer for b in self.blocks if b not in bases)
        known = [block for block in self.blocks if block.layer not in new]
        self._fold_second_moments(pending, known, group)
        return {layer: pending.get(layer, Moments()) for layer in new}

    def fold_late(self, late: Mapping[Layer, Moments], group: dist.ProcessGroup | None) -> None:
        """Fold the second moments of layers whose bases were not known when they were collected."""
        blocks = [
            b for la in late for b in la.blocks if inverses.has_inverse(self.entries[b.anchor])
        ]
        for layer, moments in late.items():
            own = {b: inverses.bases_of(self.entries[b.anchor]) for b in blocks if b.layer is layer}
            moments.project({b: known for b, known in own.items() if known is not None})
        self._fold_second_moments(late, blocks, group)

    def _fold_second_moments(
        self,
        pending: Mapping[Layer, Moments],
        blocks: Sequence[Block],
        group: dist.ProcessGroup | None,
    ) -> None:
        values = {b: v for moments in pending.values() for b, v in moments.second_moments.items()}
        if group is not None:
            values = average_second_moments(values, blocks, group)
        for block in blocks:
            moments = pending.get(block.layer)
            if moments is not None and block in values:
                state, decay = self.entries[block.anchor], self.schedule.ema_decay
                weight = moments.rows if block.layer.family.routed else moments.terms
                value = inverses.averaged_moments(state, values[block])
                fold_second_moments(state, value, weight, decay)

    def due_inverses(self, step: int) -> list[Block]:
        """Return the blocks to invert in a step: all where it is time, else those without one."""
        if self.schedule.inverses_due(step):
            return self.blocks
        fresh = [b for b in self.blocks if not inverses.has_inverse(self.entries[b.anchor])]
        return [block for block in fresh if self.has_statistics(block.layer)]

    def invert(
        self, blocks: list[Block], groups: Groups, step: int, ranks: dist.ProcessGroup | None
    ) -> None:
        """Renew the damped inverses of blocks from their layers' factors; ranks share the work.

        Raises:
            DecompositionError: If a layer's factors cannot be inverted (repeatedly).
        """
        damping = {id(p): group["damping"] for group in groups for p in group["params"]}
        compute = partial(self._compute_inverses, damping=damping, step=step)
        if ranks is None or dist.get_world_size(ranks) == 1:
            errors = compute(blocks)
        else:
            shapes = self.shapes([p for group in groups for p in group["params"]])
            errors = update_shared(self.entries, blocks, compute, shapes, step, ranks)
        for error in errors.values():
            raise error

    def _compute_inverses(
        self, blocks: list[Block], damping: Mapping[int, float], step: int
    ) -> dict[Block, DecompositionError]:
        """Compute the inverses of blocks; return the errors of those that cannot do without."""
        form = self._inverse
        entries = [(self.entries[b.layer.anchor], b, damping[id(b.anchor)]) for b in blocks]
        known = inverses.inverses_at_once(entries, form)
        errors: dict[Block, DecompositionError] = {}
        for layer_state, block, delta in entries:
            state, inverse = self.entries[block.anchor], known.pop(block, None)
            try:
                if inverses.refresh_inverse(state, layer_state, block, delta, form, inverse):
                    state["inverse_step"] = step
            except DecompositionError as error:
                errors[block] = error
        return errors

    def complete(self, groups: Groups) -> None:
        """Give every trained parameter the entries that it lacks; they change no later step."""
        complete_state(self.entries, self.layers, groups, self._settings)

    def shapes(self, params: Sequence[Parameter]) -> dict[Parameter, dict[str, tuple[int, ...]]]:
        """Return, for each parameter, the shapes that entries have where they exist."""
        return state_shapes(params, self.layers, self._form)

    def follow_parameters(self) -> None:
        """Move the entries to where their parameters are, after `model.to(...)`."""
        follow_parameters(self.entries, self._settings)
