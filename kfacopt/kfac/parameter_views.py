"""Which entries of a parameter an operand in the graph has; what is computed with it is elsewhere.

Slices, transposes, chunks, casts and copies of a parameter hand on its entries in another order.
Their nodes say in which, so that no tensor has to be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Size
from torch.nn import Parameter

Part = tuple[int, int]  # of an axis: its size, and how far apart entries are in the flat parameter


@dataclass(frozen=True)
class ParameterView:
    """Entries of a parameter, by their places in its flat form.

    Attributes:
        offset: The place of the first one.
        axes: For each axis its parts, the outermost first; their places add up.
    """

    offset: int
    axes: tuple[tuple[Part, ...], ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> ParameterView:
        """Return all entries in their own order."""
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        return cls(0, tuple(_parts([part]) for part in zip(shape, strides, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(prod(n for n, _ in parts) for parts in self.axes)

    def permuted(self, order: Sequence[int]) -> ParameterView:
        """Return the axes in another order."""
        return ParameterView(self.offset, tuple(self.axes[i] for i in order))

    def reshaped(self, shape: Sequence[int]) -> ParameterView | None:
        """Return the same order of entries in another shape; `None` if a part does not divide."""
        if 0 in shape or 0 in self.shape:
            return None
        left = [part for parts in self.axes for part in parts][::-1]  # the outermost is popped
        axes = []
        for size in shape:
            parts: list[Part] = []
            while size > 1:
                n, stride = left.pop()
                if size % n == 0:
                    parts.append((n, stride))
                    size //= n
                elif n % size == 0:
                    parts.append((size, stride * (n // size)))
                    left.append((n // size, stride))
                    size = 1
                else:
                    return None
            axes.append(_parts(parts))
        return ParameterView(self.offset, tuple(axes))

    def sliced(self, axis: int, start: int, length: int, step: int = 1) -> ParameterView | None:
        """Return part of an axis; `None` where its entries are not equally far apart."""
        parts = self.axes[axis]
        if length == (self.shape[axis]):
            return self
        if len(parts) != 1:
            return None
        stride = parts[0][1]
        own = _parts([(length, stride * step)])
        axes = (*self.axes[:axis], own, *self.axes[axis + 1 :])
        return ParameterView(self.offset + start * stride, axes)

    def selected(self, axis: int, index: int) -> ParameterView:
        """Return one index of an axis, which is gone then."""
        offset = self.offset
        for n, stride in reversed(self.axes[axis]):
            offset += index % n * stride
            index //= n
        return ParameterView(offset, (*self.axes[:axis], *self.axes[axis + 1 :]))

    def gathered(self, count: int) -> ParameterView:
        """Return entries of the first index of the first axis, in the place of those of others."""
        return ParameterView(self.offset, (_parts([(count, 0)]), *self.axes[1:]))

    def expanded(self, shape: Sequence[int]) -> ParameterView:
        """Return the entries repeated along axes of size 1, or new ones in front."""
        new = len(shape) - len(self.axes)
        own = ((),) * new + self.axes
        pairs = zip(shape, (1,) * new + self.shape, own, strict=True)
        axes = tuple(parts if n == old else _parts([(n, 0)]) for n, old, parts in pairs)
        return ParameterView(self.offset, axes)


def _parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return parts without those of size 1, neighbours as one where they are one."""
    joined: list[Part] = []
    for n, stride in parts:
        if n == 1:
            continue
        if joined and joined[-1][1] == n * stride:
            joined[-1] = (joined[-1][0] * n, stride)
        else:
            joined.append((n, stride))
    return tuple(joined)


def joined(axes: Sequence[tuple[Part, ...]]) -> tuple[Part, ...]:
    """Return the parts of several axes as those of one."""
    return _parts([part for parts in axes for part in parts])


_SAME = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0")
_RESHAPED = tuple(
    f"{name}Backward{number}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze")
    for number in (0, 1, 2, 3, 4)
)


def is_view(node: Any) -> bool:
    """Tell whether a node hands on entries of its one input as they are."""
    return node.name() in _KNOWN


def view_at(node: Any, output_nr: int, view: ParameterView) -> ParameterView | None:
    """Return what a node of `is_view` makes of entries; `None` where that is not known."""
    shape = tuple(node._input_metadata[output_nr].shape)
    found = _KNOWN[node.name()](node, output_nr, view, shape)
    return found if found is not None and found.shape == shape else None


def _reshaped(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    return view.reshaped(shape)


def _turned(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    return view.permuted(range(len(view.axes))[::-1])


def _transposed(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    order = list(range(len(view.axes)))
    i, j = (_axis(dim, view) for dim in (node._saved_dim0, node._saved_dim1))
    order[i], order[j] = j, i
    return view.permuted(order)


def _permuted(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    return view.permuted([_axis(dim, view) for dim in node._saved_dims])


def _expanded(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    return view.expanded(shape)


def _selected(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    axis = _axis(node._saved_dim, view)
    return view.selected(axis, _signed(node._saved_index) % view.shape[axis])


def _unbound(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    return view.selected(_axis(node._saved_dim, view), nr)


def _sliced(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    axis, start = _axis(node._saved_dim, view), _signed(node._saved_start or 0)
    start = max(start + view.shape[axis], 0) if start < 0 else start
    return view.sliced(axis, start, shape[axis], node._saved_step)


def _split(node: Any, nr: int, view: ParameterView, shape: Size) -> ParameterView | None:
    axis = _axis(node._saved_dim, view)
    start = sum(m.shape[axis] for m in node._input_metadata[:nr])
    return view.sliced(axis, start, shape[axis])


_KNOWN = {
    **dict.fromkeys(_SAME, lambda node, nr, view, shape: view),
    **dict.fromkeys(_RESHAPED, _reshaped),
    "TBackward0": _turned,
    "TransposeBackward0": _transposed,
    "PermuteBackward0": _permuted,
    "ExpandBackward0": _expanded,
    "SelectBackward0": _selected,
    "UnbindBackward0": _unbound,
    "SliceBackward0": _sliced,
    "SplitBackward0": _split,
    "SplitWithSizesBackward0": _split,
}


def _signed(number: int) -> int:
    """Return a number that a node has kept; negative ones come out as if they had no sign."""
    return number - 2**64 if number >= 2**63 else number


def _axis(dim: int, view: ParameterView) -> int:
    return _signed(dim) % max(len(view.axes), 1)


def parameter_behind(node: Any, output_nr: int) -> tuple[Parameter, ParameterView] | None:
    """Return the parameter whose entries an edge of the graph has, and which ones."""
    passed = []
    while node is not None and not hasattr(node, "variable"):
        if not is_view(node):
            return None
        passed.append((node, output_nr))
        node, output_nr = node.next_functions[0]
    p = getattr(node, "variable", None)
    if not isinstance(p, Parameter):
        return None
    view: ParameterView | None = ParameterView.whole(p.shape)
    for n, nr in reversed(passed):
        view = None if view is None else view_at(n, nr, view)
    return None if view is None else (p, view)


@dataclass(frozen=True)
class AxisRange:
    """Which of a parameter's entries along one axis a view has.

    Attributes:
        axis: The axis.
        start: The first index.
        length: How many.
    """

    axis: int
    start: int
    length: int


def ranges_of(view: ParameterView, shape: Sequence[int]) -> list[list[AxisRange]] | None:
    """Return which range of which of a parameter's axes each axis of a view has.

    Args:
        view: The view.
        shape: The parameter's shape.

    Returns:
        A list for each axis of the view; an axis of the parameter that no list has is one of a
        single index. `None` if the view is not made of ranges: of every second row, for instance,
        or of repeated entries.
    """
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    starts = [view.offset // stride % n for stride, n in zip(strides, shape, strict=True)]
    found = []
    for parts in view.axes:
        ranges: list[AxisRange] = []
        for n, stride in parts:
            own: list[AxisRange] = []
            while n > 1:
                fits = [i for i, s in enumerate(strides) if s == stride and shape[i] > 1]
                if not fits:
                    return None
                axis = fits[0]
                length = min(n, shape[axis] - starts[axis])
                own.insert(0, AxisRange(axis, starts[axis], length))
                if n > length and (length != shape[axis] or n % length):
                    return None
                n, stride = n // length, stride * length
            ranges += own
        found.append(ranges)
    axes = [r.axis for ranges in found for r in ranges]
    return found if len(axes) == len(set(axes)) else None
