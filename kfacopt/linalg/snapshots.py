"""What a matrix is computed from, kept to tell whether it changed; not what then happens."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import partial
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None)})
_SEQUENCES = (list, tuple, set, frozenset, deque)
# Known by identity, although they may have attributes.
_OPAQUE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)

# A search ends there; what is found up to here takes tens of milliseconds.
_MAX_ENTRIES = 100_000


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold a sparse tensor's entries; itself, if it is strided."""
    if tensor.layout == torch.strided:
        return [] if tensor.is_mkldnn else [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def same_entries(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of the same layout have the same entries."""
    parts = strided_parts(one), strided_parts(other)
    return len(parts[0]) == len(parts[1]) and all(map(torch.equal, *parts))


class Observation:
    """The tensors and settings that are reached from some objects.

    A tensor of the roots, and a parameter, buffer or attribute of a module, is in `tensors`. Any
    other is known by identity and version. Settings are numbers and strings, NumPy's arrays and
    numbers by their contents, functions and classes by identity, and what is found in containers,
    modules and the attributes of plain objects.

    Args:
        roots: Tensors, modules, or any other objects.

    Attributes:
        tensors: Tensors that are to be compared by value.
        complete: Whether the search reached its end.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self._tensors = {id(x): x for x in roots if isinstance(x, Tensor)}
        self._values: list[Any] = []  # compared by ==
        self._objects: list[Any] = []  # compared by `is`
        seen: set[int] = set()
        entries, stack = 0, [x for x in roots if not isinstance(x, Tensor)]
        # Only what outlives the search goes onto the stack: another object could have its id.
        while stack and entries < _MAX_ENTRIES:
            x = stack.pop()
            entries += 1
            if type(x) in _SCALARS:
                self._values.append(x)
            elif id(x) not in seen:
                seen.add(id(x))
                self._visit(x, stack)
        self.complete = not stack
        self.tensors = list(self._tensors.values())

    def _visit(self, x: Any, stack: list[Any]) -> None:
        """Note what is known of an object itself; put what it holds on the stack."""
        if isinstance(x, nn.Module):
            self._objects.append(x)
            for name, value in vars(x).items():
                if isinstance(value, Tensor):
                    self._tensors[id(value)] = value
                elif name in ("_parameters", "_buffers"):
                    self._tensors.update((id(t), t) for t in value.values() if t is not None)
                elif type(value) not in (OrderedDict, dict) or value:  # not the many empty hooks
                    stack += (name, value)
        elif isinstance(x, Tensor):
            self._objects.append(x)
            self._values.append(None if x.is_inference() else x._version)
        elif isinstance(x, dict):
            self._values.append(len(x))
            stack += x.keys()
            stack += x.values()
        elif isinstance(x, _SEQUENCES):
            self._values.append(len(x))
            stack += x
        elif isinstance(x, np.ndarray | np.generic):
            self._values.append((x.shape, x.dtype.str, x.tobytes()))
        else:
            self._objects.append(x)
            if isinstance(x, partial):
                stack += (x.func, x.args, x.keywords)
            elif not isinstance(x, _OPAQUE):
                attributes = getattr(x, "__dict__", {})
                stack += attributes.keys()
                stack += attributes.values()

    def has_settings_of(self, other: Observation) -> bool:
        """Tell whether all that was found but `tensors` is the same."""
        return (
            self.complete
            and other.complete
            and len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
            and self._values == other._values
        )


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.layout, tensor.device, tensor.dtype


class Snapshot:
    """What is reached from some objects, as it is at one moment.

    Versions of tensors do not tell their values: a write through `.data` leaves them as they were.
    What nobody can see from the objects themselves is not compared: attributes of classes, and
    what functions close over or read from their module.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self._observation = Observation(roots)
        self._values = [t.detach().clone() for t in self._observation.tensors]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors whose values are known."""
        return self._observation.tensors

    def holds(self, roots: Sequence[Any]) -> bool:
        """Tell whether all of it is as it was; never where the search had to be cut off."""
        return self.is_like(Observation(roots))

    def is_like(self, present: Observation) -> bool:
        """Tell whether an observation has these settings, and tensors of these values."""
        if not present.has_settings_of(self._observation):
            return False
        tensors = present.tensors
        if list(map(_kind_of, tensors)) != list(map(_kind_of, self._values)):
            return False
        pairs = zip(tensors, self._values, strict=True)
        if all(t.device.type == "cpu" or t.layout != torch.strided for t in tensors):
            return all(same_entries(t, value) for t, value in pairs)
        # one synchronisation with the device in place of one for each tensor
        same = [torch.eq(t, value).all().to(tensors[0].device) for t, value in pairs]
        return bool(torch.stack(same).all())
