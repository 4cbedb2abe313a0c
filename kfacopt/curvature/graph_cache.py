"""Graphs of batches, kept between products while they are right; not how they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kfacopt.data import Batch
from kfacopt.linalg.snapshots import Observation, Snapshot, strided_parts

T = TypeVar("T")


class NetworkState:
    """What the outputs of modules depend on: their tensors and their settings.

    Tensors are compared by version too: a write of the same values changes it, and with it what
    graphs that saved the tensor allow.

    Args:
        roots: The modules, and further tensors.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self._snapshot = Snapshot([*roots, *_autocast()])
        self.renew_versions()

    def renew_versions(self) -> None:
        """Accept the present versions, after writes that are known to have been undone."""
        self._versions = _versions(self._snapshot.tensors)

    def holds(self, roots: Sequence[Any]) -> bool:
        """Tell whether modules and tensors are still as they were."""
        present = Observation([*roots, *_autocast()])
        return _versions(present.tensors) == self._versions and self._snapshot.is_like(present)


def _autocast() -> tuple[bool, torch.dtype]:
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


@contextmanager
def measure_saved_bytes(known: Sequence[Tensor]) -> Iterator[list[int]]:
    """Count the bytes that graphs save, each storage once.

    Args:
        known: Tensors that exist anyway and are not counted.

    Yields:
        A list of the sizes of storages.
    """
    seen = {part.untyped_storage().data_ptr() for t in known for part in strided_parts(t)}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        for part in strided_parts(tensor):
            if part._is_zerotensor():  # a tangent that is zero has no memory
                continue
            pointer = part.untyped_storage().data_ptr()
            if pointer not in seen:
                seen.add(pointer)
                sizes.append(part.untyped_storage().nbytes())
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
    def use(self, roots: Sequence[Any]) -> Iterator[None]:
        """Use the cache within a pass over the data; stale terms are dropped first.

        Args:
            roots: The modules and tensors that the terms depend on. Writes to them in the context
                must have been undone at its end.
        """
        if self._state is not None and not self._state.holds(roots):
            self.clear()
        try:
            yield
        except BaseException:
            self.clear()
            raise
        if self._state is not None:
            self._state.renew_versions()
        elif self._terms:
            self._state = NetworkState(roots)

    def get(self, index: int, batch: Batch) -> T | None:
        """Return the term of a batch, if it is kept and the batch is still the same."""
        if index < len(self._terms) and self._terms[index].belongs_to(batch):
            return self._terms[index].term
        del self._terms[index:]
        return None

    def note_size(self, size: int) -> None:
        """Note the size of the next batch's term."""
        self._bytes.append(size)

    def size_of(self, index: int) -> int | None:
        """Return the measured size of a batch's term, if it is known."""
        return self._bytes[index] if index < len(self._bytes) else None

    def room(self) -> int:
        """Return how many bytes are left."""
        return self._max_bytes - sum(t.size for t in self._terms)

    def offer(self, index: int, batch: Batch, term: T, size: int) -> None:
        """Keep a term of that size if all before it are kept and it fits."""
        in_tensors = all(x is None or isinstance(x, Tensor) for x in batch)
        if in_tensors and index == len(self._terms) and size <= self.room():
            self._terms.append(_Kept(batch, size, term))


class _Kept(Generic[T]):
    """A term, its size in bytes, and its batch of tensors (and `None` for no targets)."""

    def __init__(self, batch: Batch, size: int, term: T) -> None:
        self.size, self.term = size, term
        self._batch, self._tensors = tuple(batch), [x for x in batch if x is not None]
        self._versions = [x._version for x in self._tensors]
        self._values = Snapshot(self._tensors)

    def belongs_to(self, batch: Batch) -> bool:
        same = all(a is b for a, b in zip(self._batch, batch, strict=True))
        if not same or [x._version for x in self._tensors] != self._versions:
            return False
        return self._values.holds(self._tensors)  # a write through `.data` or NumPy has no version
