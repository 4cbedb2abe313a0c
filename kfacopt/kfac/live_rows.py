"""Which positions of layers receive any gradient; padded ones are none of A's, nor of its count.

F = Σ g gᵀ ⊗ a aᵀ has no part of positions with g = 0. Where g and a are independent it is Σ g gᵀ
times the mean of a aᵀ over the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.layers import Layer
from kfacopt.kfac.layers.convolution import Convolution
from kfacopt.kfac.layers.linear import LinearFamily
from kfacopt.kfac.layers.matrix import Matrix
from kfacopt.kfac.masked_lines import has_all_ends, inner_positions
from kfacopt.likelihoods import Likelihood

# How many entries of all rows are looked at first: most rows have one among them that is not 0.
_FIRST = 8


# Reshapes, and choices of rows.
_CHOOSING = ("ViewBackward0", "UnsafeViewBackward0", "IndexBackward0", "IndexSelectBackward0")


def ignored_targets(likelihood: Likelihood | None, target: Any) -> Tensor | None:
    """Return which targets a loss ignores, flat; `None` if it knows of none such."""
    index = getattr(likelihood, "ignore_index", None)
    if index is None or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    ignored: Tensor = target == index
    return ignored.flatten()


class LiveRows:
    """Which rows of uses received gradients so far.

    Rows without any are left out where they are positions: `[N, S, ...]` of linear layers and
    embeddings, and those of convolutions of sequences; rows of layers that one forward pass uses
    several times; the places of experts; rows that are not as many as the losses' data. Of images
    it is the outermost lines, of other layers the rows whose own term the objective ignores: a
    datum that is 0 by the accidents of ReLUs stays.
    """

    def __init__(self) -> None:
        """Start without any row."""
        self._live: dict[LayerUse, Tensor | None] = {}  # None: all of them
        self._spatial: dict[LayerUse, torch.Size] = {}  # of images
        self._reached: set[Layer] = set()  # of which any row received a gradient
        self._ignored: dict[int, Tensor] = {}  # by their number
        self._data: set[int] = set()  # how many losses have

    def note(
        self,
        likelihood: Likelihood | None,
        output: Tensor,
        target: Any,
        upstream: Tensor | None = None,
    ) -> None:
        """Take note of a loss: how many data it has, and which of them it ignores.

        Args:
            likelihood: What it means, if that is known.
            output: z.
            target: Its target.
            upstream: The derivative of the objective by it, for each term where it has no sum.
        """
        self._data.add(len(output) if output.ndim else 1)
        ignored = ignored_targets(likelihood, target)
        if ignored is not None:
            self.ignore(ignored)
        if upstream is not None and upstream.ndim:  # a mask times the terms
            zero = upstream == 0
            self.ignore((zero.all(-1) if 1 < zero.ndim == output.ndim else zero).flatten())

    def ignore(self, ignored: Tensor) -> None:
        """Take note of the terms that a loss ignores."""
        if ignored.device.type == "cpu" and not bool(ignored.any()):
            return
        known = self._ignored.get(len(ignored))
        self._ignored[len(ignored)] = ignored if known is None else known | ignored

    def add(
        self,
        uses: Sequence[LayerUse],
        grads: Sequence[Tensor],
        parts: Sequence[LayerUse] | None = None,
    ) -> None:
        """Take note of the gradients by the outputs of a layer's uses in one forward pass.

        Args:
            uses: The uses.
            grads: The gradient by the output of each.
            parts: The uses by the part of the data whose gradients they are, if not by all.
        """
        for use, part, grad in zip(uses, uses if parts is None else parts, grads, strict=True):
            if use not in self._live or self._live[use] is not None:
                self._add(use, part, grad, len(uses) > 1)

    def _add(self, use: LayerUse, part: LayerUse, grad: Tensor, several: bool) -> None:
        if not _may_be_masked(use):
            return
        live = self._live_now(use, part, grad, several)
        if live is None:
            return
        known = self._live.get(use)
        live = live if known is None else live | known
        if live.device.type == "cpu" and bool(live.any()):
            self._reached.add(use.layer)
        whole = live.device.type == "cpu" and bool(live.all())
        self._live[use] = None if whole else live

    def _live_now(
        self, use: LayerUse, part: LayerUse, grad: Tensor, several: bool
    ) -> Tensor | None:
        """Return which rows have a gradient, or may have one; `None` if that is not looked for."""
        routed, family = use.family.routed, use.family
        dims = family.dims if isinstance(family, Convolution) else 0
        positions = routed or (several and dims < 2) or _has_positions(use)
        if not (positions or dims > 1 or self._ignored or self._data):
            return None
        rows = part.grad_rows(grad)
        if positions:
            return _not_zero(rows, routed)
        ignored = self._ignored.get(rows.shape[1:3].numel())
        if ignored is not None:
            live = _not_zero(rows, False)
            return live | ~ignored.reshape(live.shape)
        if not dims and self._data and rows.shape[1] not in self._data:
            return _not_zero(rows, routed)  # a loss has chosen some of the rows, or they were bags
        if dims < 2 or not grad.numel():
            return None
        self._spatial[use] = grad.shape[-dims:]  # gaps are filled when all gradients have come
        if has_all_ends(grad if grad.ndim == dims + 2 else grad.unsqueeze(0)):
            return torch.ones(rows.shape[1:3], dtype=torch.bool, device=rows.device)
        return _not_zero(rows, False)

    def of(self, use: LayerUse) -> Tensor | None:
        """Return which rows `[N, S]` received any; `None` for all, also if none did by accident.

        Of experts they are `[B, N, S]`.
        """
        live = self._live.get(use)
        if live is None or bool(live.all()):
            return None
        if not (self._all_ignored(live.numel()) or self._is_reached(use.layer)):
            return None
        if use in self._spatial:
            live = inner_positions(live.unflatten(1, self._spatial[use])).flatten(1)
            return None if bool(live.all()) else live
        return live

    def _all_ignored(self, count: int) -> bool:
        """Tell whether losses ignore all of so many data, or if none has so many, all of theirs."""
        own = [self._ignored[count]] if count in self._ignored else self._ignored.values()
        return bool(own) and all(bool(ignored.all()) for ignored in own)

    def _is_reached(self, layer: Layer) -> bool:
        """Tell whether any row of a layer received a gradient."""
        if layer in self._reached:
            return True
        own = (live for use, live in self._live.items() if use.layer is layer)
        return any(live is None or bool(live.any()) for live in own)

    def restricted(self, use: LayerUse) -> LayerUse:
        """Return a use whose A has these rows alone."""
        live = self.of(use)
        return use if live is None else replace(use, live=live)


def _may_be_masked(use: LayerUse) -> bool:
    family = use.family
    return not family.elementwise and use.layer.weight is not None


def _has_positions(use: LayerUse) -> bool:
    if isinstance(use.family, Convolution):
        return use.family.dims == 1
    if isinstance(use.family, Matrix) or use.module is None:
        return bool(getattr(use.call, "positions", False))
    if not isinstance(use.family, LinearFamily):
        return False
    more = use.input.ndim > use.family.datum_axes + 1
    return more or any(_were_positions(edge.node) for edge in use.input_edges[:1])


def _were_positions(node: Any) -> bool:
    """Tell whether rows were flattened from, or chosen among, positions `[N, S, ...]`."""
    while node is not None and node.name() in _CHOOSING:
        before, rows = node._saved_self_sym_sizes, node._input_metadata[0].shape[:1]
        if len(before) > 2 and rows and before[0] != rows[0]:
            return True
        node = node.next_functions[0][0]
    return False


def _not_zero(rows: Tensor, routed: bool) -> Tensor:
    """Return which rows of g `[B, N, S, d_out]` have an entry that is not 0.

    They are `[N, S]`, or `[B, N, S]` where groups have rows of their own.
    """
    if not routed:
        rows = rows[0] if len(rows) == 1 else rows.permute(1, 2, 0, 3).flatten(2)
    if rows.device.type != "cpu":
        return (rows != 0).any(-1)
    live: Tensor = rows[..., 0] != 0
    if bool(live.all()):
        return live
    for column in rows[..., 1:_FIRST].unbind(-1):
        live |= column != 0
    rest = ~live
    if bool(rest.any()):
        live[rest] = (rows[rest] != 0).any(-1)
    return live
