"""An optimizer that keeps running Kronecker factors and damped inverses of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.nn import Parameter

from kfacopt.kfac.factors import Factors
from kfacopt.kfac.layers import Block, Layer
from kfacopt.linalg.kronecker import DecompositionError
from kfacopt.optim.connected import ConnectedOptimizer
from kfacopt.optim.distributed import (
    average_moments,
    average_second_moments,
    group_of,
    refuse_different_optimizers,
)
from kfacopt.optim.initial_state import state_shapes
from kfacopt.optim.loss_scale import calling_loss_scale
from kfacopt.optim.messages import (
    log_new_layer,
    missing_statistics,
    stale_factors,
    uncompiled_cause,
    unwrapped_averaging,
    without_curvature,
)
from kfacopt.optim.moments import Moments
from kfacopt.optim.preconditioner import (
    bases_of,
    has_inverse,
    inverse_of,
    inverses_at_once,
    precondition,
    refresh_inverse,
)
from kfacopt.optim.running_factors import fold_factors, fold_second_moments
from kfacopt.optim.shared_inverses import align_parameters, update_shared


class PreconditioningOptimizer(ConnectedOptimizer):
    """Turns statistics into factors, factors into inverses, and gradients into directions.

    A base of `KFACOptimizer`.
    """

    def factors(self, key: str | Parameter) -> Factors:
        """Return the running averages of a layer's Kronecker factors.

        Args:
            key: The layer's name, a parameter's name, or a parameter.

        Raises:
            KeyError: If there is no such layer, or no statistics of it yet.
        """
        owners = [layer for layer in self._layers if layer.owns(key, self._names)]
        if len(owners) > 1:
            raise KeyError(
                f"{key!r} names {len(owners)} layers of different models; give a parameter."
            )
        if owners and self._has_statistics(owners[0]):
            state = self.state[owners[0].anchor]
            return Factors.of(owners[0], state["input_factor"], state["grad_output_factor"])
        known = [layer.name for layer in self._layers]
        raise KeyError(f"{key!r}: no such layer or parameter, or no step yet; layers: {known}.")

    def _data_parallel_group(self) -> Any:
        wrapper = self._ddp.wrapper(self._parameters())
        return None if wrapper is None else group_of(wrapper)

    def _refuse_different_ranks(self) -> None:
        """Raise on all ranks if their optimizers are not the same, before they exchange more."""
        wrapper = self._ddp.wrapper(self._parameters())
        assert wrapper is not None
        positions = {id(p): i for i, p in enumerate(wrapper.parameters())}
        layers = [
            (positions.get(id(p)), layer.groups, layer.d_in, layer.d_out, p.dtype)
            for layer in self._layers
            for p in (layer.anchor,)
        ]
        settings = (layers, self._schedule, self._curvature.form, self._curvature.fisher_type)
        steps, device = self.param_groups[0]["num_steps"], self._parameters()[0].device
        refuse_different_optimizers(repr(settings), steps, device, self._ddp_group)

    def _update_factors(self) -> dict[Layer, Moments]:
        """Fold the statistics since the last step; return what has no eigenbases yet."""
        self._ddp_group = self._data_parallel_group()
        unknown_losses, forward_seen = self._collector.unknown_losses, self._collector.forward_seen
        ignored = self._collector.unknown_objectives
        reached, exchanged = self._collector.reached, self._collector.exchange.noticed()
        used = self._collector.used
        pending = self._collector.finish()
        form = self._curvature.form
        if exchanged and self._ddp_group is None:
            self._warn("exchanged", unwrapped_averaging())
        if self._ddp_group is not None:
            self._refuse_different_ranks()
            pending = average_moments(pending, self._layers, form, self._ddp_group)
        if pending and ignored and self._curvature.likelihood is None:
            self._warn(
                "ignored-loss",
                f"the objective contains {', '.join(sorted(ignored))}, whose curvature is not "
                "known: it counts by its gradient alone.",
            )
        if not pending:
            if not self._collector.undercounted and (used or not forward_seen):
                self._report_missing_loss(forward_seen, unknown_losses)
        else:
            self._report_stale(layer for layer in reached if layer not in pending)
        if not self._due(self._schedule.factor_update_interval):  # here for new layers alone
            pending = {la: m for la, m in pending.items() if not self._has_statistics(la)}
        self._report_uncompiled()
        loss_scale = calling_loss_scale() ** self._curvature.loss_scale_power
        for layer, moments in pending.items():
            state = self.state[layer.anchor]
            moments.scale_curvature(1 / loss_scale)
            step = self.param_groups[0]["num_steps"]
            fold_factors(state, layer, moments, form, self._schedule.ema_decay, step)
        if not self._schedule.inverse.corrected:
            return {}
        bases = self._collector.bases
        new = dict.fromkeys(b.layer for b in self._blocks if b not in bases)
        known = [block for block in self._blocks if block.layer not in new]
        self._update_second_moments(pending, known)
        return {layer: pending.get(layer, Moments()) for layer in new}

    def _start_second_moments(self, first: dict[Layer, Moments]) -> None:
        """Fold the second moments of layers whose bases were not known when they were collected."""
        blocks = [b for la in first for b in la.blocks if has_inverse(self.state[b.anchor])]
        for layer, moments in first.items():
            own = {b: bases_of(self.state[b.anchor]) for b in blocks if b.layer is layer}
            moments.project({b: known for b, known in own.items() if known is not None})
        self._update_second_moments(first, blocks)

    def _update_second_moments(self, pending: dict[Layer, Moments], blocks: list[Block]) -> None:
        values = {b: v for moments in pending.values() for b, v in moments.second_moments.items()}
        if self._ddp_group is not None:
            values = average_second_moments(values, blocks, self._ddp_group)
        for block in blocks:
            moments = pending.get(block.layer)
            if moments is not None and block in values:
                state, decay = self.state[block.anchor], self._schedule.ema_decay
                fold_second_moments(state, values[block], moments.terms, decay)

    def _report_uncompiled(self) -> None:
        kind = self._collector.uncompiled
        interval = 1 if self._tuning is not None else self._schedule.factor_update_interval
        cause = None if kind is None else uncompiled_cause(kind, interval)
        if cause is not None:
            self._warn("uncompiled", cause)

    def _report_stale(self, layers: Iterable[Layer]) -> None:
        """Tell of layers that had statistics before, and have a gradient without any now."""
        for layer in layers:
            if self._has_statistics(layer) and self._due(self._schedule.factor_update_interval):
                self._warn(f"stale {layer.name}", stale_factors(layer))

    def _report_missing_loss(self, forward_seen: bool, unknown_losses: set[str]) -> None:
        owned = [p for layer in self._layers for p in (layer.weight, layer.bias)]
        if not any(p is not None and p.grad is not None for p in owned):
            return
        cause = missing_statistics(forward_seen, unknown_losses)
        if any(self._has_statistics(layer) for layer in self._layers):
            self._warn("missing-loss", f"{cause} The step uses the curvature of earlier steps.")
        else:
            raise RuntimeError(f"KFACOptimizer: {cause}")

    def _update_inverses(self, blocks: Iterable[Block]) -> None:
        blocks = list(blocks)
        if not blocks:  # of most steps
            return
        group = self._data_parallel_group()
        if group is None or dist.get_world_size(group) == 1:
            errors = self._compute_inverses(blocks)
        else:
            shapes = state_shapes(self._parameters(), self._layers, self._curvature.form)
            step = self.param_groups[0]["num_steps"]
            exchanged = (self._compute_inverses, shapes, step, group)
            errors = update_shared(self.state, blocks, *exchanged)
        for error in errors.values():
            raise error

    def _align_ranks(self) -> None:
        """Let ranks have the same parameters to the bit, where factors were due."""
        wrapper = self._ddp.wrapper(self._parameters())
        if wrapper is not None and dist.get_world_size(wrapper.process_group) > 1:
            params = [p for block in self._blocks for p in block.parameters]
            align_parameters(self.state, params, wrapper)

    def _compute_inverses(self, blocks: list[Block]) -> dict[Block, DecompositionError]:
        """Compute the inverses of blocks; return the errors of those that cannot do without."""
        damping = {id(p): g["damping"] for g in self.param_groups for p in g["params"]}
        form = self._schedule.inverse
        entries = [(self.state[b.layer.anchor], b, damping[id(b.anchor)]) for b in blocks]
        known = inverses_at_once(entries, form)
        errors: dict[Block, DecompositionError] = {}
        for layer_state, block, delta in entries:
            state, inverse = self.state[block.anchor], known.pop(block, None)
            try:
                if refresh_inverse(state, layer_state, block, delta, form, inverse):
                    state["inverse_step"] = self.param_groups[0]["num_steps"]
            except DecompositionError as error:
                errors[block] = error
        return errors

    def _directions(self, gradients: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """Return the preconditioned gradients of the parameters in layers."""
        directions: dict[Parameter, Tensor] = {}
        damping = {p: group["damping"] for group in self.param_groups for p in group["params"]}
        for block in self._blocks:
            grads = [gradients.get(p) for p in block.parameters]
            if all(g is None for g in grads):
                continue
            inverse = inverse_of(self.state[block.anchor], damping[block.anchor])
            if inverse is None and self._waiting:
                log_new_layer(block.layer)
                continue
            if inverse is None:
                otherwise = block.layer in self._collector.undercounted
                self._warn(
                    f"uncaptured {block.layer.name}", without_curvature(block.layer, otherwise)
                )
                continue
            products = precondition(inverse, block, grads)
            with_grad = zip(block.parameters, products, strict=True)
            directions.update({p: d for p, d in with_grad if p in gradients})
        return directions
