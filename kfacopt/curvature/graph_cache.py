"""Graphs of batches, kept from product to product for as long as they are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kfacopt.data import Batch
from kfacopt.linalg.snapshots import Snapshot

T = TypeVar("T")


class NetworkState:
    """What the outputs of modules depend on: their tensors and their settings.

    Tensors are compared by identity, version and value: a write through `.data` leaves the
    version as it was, and a write of the same values changes it. Settings are the numbers,
    strings, booleans, functions and containers among a module's attributes, hooks included.

    Args:
        modules: The modules.
        tensors: Further tensors.
    """

    def __init__(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> None:
        self._settings = _settings(modules)
        self._tensors = _tensors(modules, tensors)
        self._versions = [t._version for t in self._tensors]
        self._values = Snapshot(self._tensors)

    def renew_versions(self) -> None:
        """Accept the present versions, after writes that are known to have been undone."""
        self._versions = [t._version for t in self._tensors]

    def holds(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> bool:
        """Tell whether modules and tensors are still as they were."""
        present = _tensors(modules, tensors)
        if len(present) != len(self._tensors) or _settings(modules) != self._settings:
            return False
        pairs = list(zip(present, self._tensors, strict=True))
        if any(a is not b for a, b in pairs):
            return False
        if [t._version for t in present] != self._versions:
            return False
        return self._values.holds(present)


_TENSORS_AND_MODULES = ("_parameters", "_buffers", "_modules")


def _settings(modules: Sequence[nn.Module]) -> list[Any]:
    simple = (bool, int, float, str)
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    found: list[Any] = [autocast]
    for module in chain.from_iterable(m.modules() for m in modules):
        found.append(id(module))
        # Functions and containers by what they print, which is their address or their contents.
        found += [
            (k, v if isinstance(v, simple) else repr(v))
            for k, v in vars(module).items()
            if isinstance(v, simple)
            or (callable(v) and not isinstance(v, nn.Module))
            or (isinstance(v, list | tuple | dict) and k not in _TENSORS_AND_MODULES)
        ]
    return found


def _tensors(modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> list[Tensor]:
    found = list(tensors)
    for module in modules:
        found += [*module.parameters(), *module.buffers()]
        for part in module.modules():
            found += [v for v in vars(part).values() if isinstance(v, Tensor)]
    return found


@contextmanager
def measure_saved_bytes(known: Sequence[Tensor]) -> Iterator[list[int]]:
    """Count the bytes that graphs save, each storage once.

    Args:
        known: Tensors that exist anyway and are not counted.

    Yields:
        A list of the sizes of storages.
    """
    seen = {t.untyped_storage().data_ptr() for t in known}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in seen:
            seen.add(pointer)
            sizes.append(tensor.untyped_storage().nbytes())
        # detach: torch asks a hook not to return the tensor itself, which would be a cycle
        return tensor.detach(), tensor._version

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                "model_func: a tensor that its derivative needs was changed in place after use."
            )
        return tensor

    with saved_tensors_hooks(pack, unpack):
        yield sizes


class GraphCache(Generic[T]):
    """The terms of the first batches of a data set that fit into a number of bytes.

    The first pass over the data measures, from the second one on terms are kept: an operator that
    is multiplied once keeps nothing alive.

    Args:
        max_bytes: Bound on what the kept terms' graphs save, without parameters and data.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes: list[int] = []
        self._terms: list[_Kept[T]] = []
        self._state: NetworkState | None = None

    def clear(self) -> None:
        """Forget everything that was kept; what was measured stays."""
        self._terms, self._state = [], None

    @contextmanager
    def use(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> Iterator[None]:
        """Use the cache within a pass over the data; stale terms are dropped first.

        Args:
            modules: What the terms depend on. Writes to it in the context must have been undone
                at its end.
            tensors: Further tensors that they depend on.
        """
        if self._state is not None and not self._state.holds(modules, tensors):
            self.clear()
        try:
            yield
        except BaseException:
            self.clear()
            raise
        if self._state is not None:
            self._state.renew_versions()
        elif self._terms:
            self._state = NetworkState(modules, tensors)

    def get(self, index: int, batch: Batch) -> T | None:
        """Return the term of a batch, if it is kept and the batch is still the same."""
        if index >= len(self._terms):
            return None
        if self._terms[index].version.holds(batch):
            return self._terms[index].term
        del self._terms[index:]
        return None

    def is_measured(self, index: int) -> bool:
        """Tell whether the size of a batch's term is known."""
        return index < len(self._bytes)

    def note_size(self, size: int) -> None:
        """Note the size of the next batch's term."""
        self._bytes.append(size)

    def size_of(self, index: int) -> int:
        """Return the measured size of a batch's term."""
        return self._bytes[index]

    def room(self) -> int:
        """Return how many bytes are left."""
        return self._max_bytes - sum(t.size for t in self._terms)

    def offer(self, index: int, batch: Batch, term: T, size: int) -> None:
        """Keep a term of that size if all before it are kept and it fits."""
        if not all(x is None or isinstance(x, Tensor) for x in batch):
            return
        if index == len(self._terms) and size <= self.room():
            self._terms.append(_Kept(_BatchVersion(batch), size, term))


def _tensors_of(batch: Batch) -> list[Tensor]:
    return [x for x in batch if x is not None]


class _BatchVersion:
    """A batch of tensors (and `None` for no targets), with their versions and values."""

    def __init__(self, batch: Batch) -> None:
        self._batch = tuple(batch)
        self._versions = [x._version for x in _tensors_of(batch)]
        self._values = Snapshot(_tensors_of(batch))

    def holds(self, batch: Batch) -> bool:
        same = all(a is b for a, b in zip(self._batch, batch, strict=True))
        if not same or [x._version for x in _tensors_of(batch)] != self._versions:
            return False
        return self._values.holds(
            _tensors_of(batch)
        )  # a write through `.data` or NumPy has no version


@dataclass(frozen=True, eq=False)
class _Kept(Generic[T]):
    """A term, the batch it belongs to, and its size in bytes."""

    version: _BatchVersion
    size: int
    term: T
