"""Which positions of layers receive any gradient; padded ones are none of A's, nor of its count.

F = Σ g gᵀ ⊗ a aᵀ has no part of positions with g = 0. Where g and a are independent it is Σ g gᵀ
times the mean of a aᵀ over the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from kfacopt.kfac.capture import LayerUse
from kfacopt.kfac.layers.linear import LinearFamily
from kfacopt.kfac.layers.matrix import Matrix
from kfacopt.likelihoods import Likelihood

# How many entries of all rows are looked at first: most rows have one among them that is not 0.
_FIRST = 8


class LiveRows:
    """Which rows of uses received gradients so far.

    Rows without any are left out where something has masked them, not by the accidents of ReLUs and
    pooling: the positions `[N, S, ...]` of linear layers, and in other layers the rows whose own
    target is ignored.
    """

    def __init__(self) -> None:
        """Start without any row."""
        self._live: dict[LayerUse, Tensor | None] = {}  # None: all of them
        self._ignored: dict[int, Tensor] = {}  # by their number

    def ignore(self, likelihood: Likelihood | None, target: Any) -> None:
        """Take note of the targets that a loss ignores."""
        index = getattr(likelihood, "ignore_index", None)
        if index is None or not isinstance(target, Tensor) or target.is_floating_point():
            return
        ignored = (target == index).flatten()
        if ignored.device.type == "cpu" and not bool(ignored.any()):
            return
        known = self._ignored.get(len(ignored))
        self._ignored[len(ignored)] = ignored if known is None else known | ignored

    def add(self, use: LayerUse, grad: Tensor, part: LayerUse | None = None) -> None:
        """Take note of a gradient by a use's output.

        Args:
            use: The use.
            grad: The gradient.
            part: The use by the part of the data whose gradient it is, if not by all.
        """
        if use in self._live and self._live[use] is None:
            return
        positions = _has_positions(use)
        if not _may_be_masked(use) or not (positions or self._ignored):
            return
        rows = (use if part is None else part).grad_rows(grad)
        ignored = self._ignored.get(rows.shape[1:3].numel())
        if not positions and ignored is None:
            return
        live = _not_zero(rows)
        if not positions and ignored is not None:
            live = live | ~ignored.reshape(live.shape)
        known = self._live.get(use)
        live = live if known is None else live | known
        whole = live.device.type == "cpu" and bool(live.all())
        self._live[use] = None if whole else live

    def of(self, use: LayerUse) -> Tensor | None:
        """Return which rows `[N, S]` received any; `None` for all, also if none did by accident."""
        live = self._live.get(use)
        if live is None or bool(live.all()):
            return None
        return live if bool(live.any()) or self._all_ignored() else None

    def _all_ignored(self) -> bool:
        """Tell whether there are targets, and losses ignore all of them."""
        return bool(self._ignored) and all(bool(x.all()) for x in self._ignored.values())

    def restricted(self, use: LayerUse) -> LayerUse:
        """Return a use whose A has these rows alone."""
        live = self.of(use)
        return use if live is None else replace(use, live=live)


def _may_be_masked(use: LayerUse) -> bool:
    family = use.family
    if family.diagonal_input or family.elementwise or family.routed:
        return False
    return use.layer.weight is not None


def _has_positions(use: LayerUse) -> bool:
    if isinstance(use.family, Matrix) or use.module is None:
        return bool(getattr(use.call, "positions", False))
    return isinstance(use.family, LinearFamily) and use.input.ndim > 2


def _not_zero(rows: Tensor) -> Tensor:
    """Return which rows `[N, S]` of g `[B, N, S, d_out]` have an entry that is not 0."""
    rows = rows[0] if len(rows) == 1 else rows.permute(1, 2, 0, 3).flatten(2)
    if rows.device.type != "cpu":
        return (rows != 0).any(-1)
    columns = rows[..., :_FIRST].unbind(-1)
    live: Tensor = columns[0] != 0
    if bool(live.all()):
        return live
    for column in columns[1:]:
        live |= column != 0
    rest = ~live
    if bool(rest.any()):
        live[rest] = (rows[rest] != 0).any(-1)
    return live
