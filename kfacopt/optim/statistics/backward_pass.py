"""What one backward pass adds to the factors, if it counts; a step's sums are in `moments`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Generator, Tensor

from kfacopt.kfac.capture import LayerUse, group_by_layer
from kfacopt.kfac.eigenvalues import Bases, block_second_moments
from kfacopt.kfac.factors import grad_output_moment, input_moment
from kfacopt.kfac.layers import Block, Layer
from kfacopt.kfac.live_rows import LiveRows
from kfacopt.kfac.subsampling import data_count, draw_subset, restricted_grad, restricted_use
from kfacopt.optim.settings import CurvatureSettings
from kfacopt.optim.statistics.moments import Moments, UnprojectedGradients, is_one


class CandidateMoments:
    """Moments of layers from the inputs and output gradients of one backward pass.

    Args:
        options: Which curvature is collected.
        generator: Draws the data that count, for `factor_batch_fraction`.
        bases: The blocks' eigenbases, as far as they are known.

    Attributes:
        by_layer: The moments so far.
        rows: Which rows received gradients.
    """

    def __init__(
        self, options: CurvatureSettings, generator: Generator, bases: Mapping[Block, Bases]
    ) -> None:
        self.by_layer: dict[Layer, Moments] = {}
        self._options, self._generator, self._bases = options, generator, bases
        self.rows = LiveRows()
        self._counted: dict[LayerUse, Tensor | None] = {}
        self._subsets: dict[int, Tensor] = {}  # by the number of data

    def count_gradients(
        self, layer: Layer, uses: Sequence[LayerUse], grads: Sequence[Tensor], scale: Tensor | float
    ) -> None:
        """Count the gradients by the outputs of a layer's uses in one forward pass.

        Args:
            layer: The layer.
            uses: Its uses.
            grads: The gradient by the output of each.
            scale: The factor of what is quadratic in them.
        """
        kept = [self._subset(use) for use in uses]
        grads = [
            g if k is None else restricted_grad(g, k) for g, k in zip(grads, kept, strict=True)
        ]
        own = self._restricted(uses)
        self.rows.add(uses, grads, own)
        moments = self._moments(layer)
        value = grad_output_moment(layer, own, grads, self._options.form)
        moments.add_grad_outputs(value if is_one(scale) else value.mul_(scale))
        if not self._options.corrected:
            return
        if any(block not in self._bases for block in layer.blocks):
            moments.unprojected.append(UnprojectedGradients(own, grads, scale))
            return
        for block in layer.blocks:
            squares = block_second_moments(block, own, grads, self._bases[block])
            moments.add_second_moments(block, squares * scale)

    def count_inputs(self, uses: Iterable[LayerUse]) -> None:
        """Count the inputs of uses of one forward pass once, however many losses reach them.

        Positions count when the first of these gives them a gradient.
        """
        new = [part for u in uses if (part := self._uncounted(u)) is not None]
        for layer, own in group_by_layer(new).items():
            value, rows = input_moment(layer, own, self._options.form)
            self._moments(layer).add_inputs(value, rows)

    def _uncounted(self, use: LayerUse) -> LayerUse | None:
        """Return a use with the rows that have a gradient and were not counted yet, if any."""
        live, first = self.rows.of(use), use not in self._counted
        before = self._counted.get(use)
        self._counted[use] = live
        (part,) = self._restricted([use])
        if first:
            return replace(part, live=live)
        if before is None:
            return None
        new = ~before if live is None else live & ~before
        return replace(part, live=new) if bool(new.any()) else None

    def count_terms(self, layer: Layer, terms: Tensor) -> None:
        """Count the terms of a loss whose gradients reached a layer."""
        self._moments(layer).terms += terms

    def count_terms_together(self, layer: Layer, terms: Tensor) -> None:
        """Count the terms of an objective once, whose gradients reach a layer in several ways."""
        self._moments(layer).terms = terms

    def share(self, terms: Tensor) -> Tensor | float:
        """Return what a backward pass's G counts in a step of several.

        A recognised loss brings its factor in the objective. A stated mean is taken for the mean
        over all data since the last step, whose sum is divided by the number of terms later.

        Args:
            terms: The loss's number of terms.
        """
        likelihood = self._options.likelihood
        return terms if likelihood is not None and likelihood.reduction == "mean" else 1.0

    def _moments(self, layer: Layer) -> Moments:
        return self.by_layer.setdefault(layer, Moments())

    def _subset(self, use: LayerUse) -> Tensor | None:
        """Return which data of a use count, the same for all uses by as many data."""
        count, fraction = data_count(use), self._options.batch_fraction
        if fraction == 1 or count is None:
            return None
        if count not in self._subsets:
            self._subsets[count] = draw_subset(count, fraction, self._generator)
        return self._subsets[count]

    def _restricted(self, uses: Sequence[LayerUse]) -> list[LayerUse]:
        kept = [(use, self._subset(use)) for use in uses]
        return [use if k is None else restricted_use(use, k) for use, k in kept]
