"""Which data are looked at, and on what the steps found there are tried; no model is evaluated."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from kfacopt.data import Batch, show_progress, some, tensors_in


@dataclass(frozen=True)
class Sample:
    """Batches in memory.

    Attributes:
        batches: What is looked at.
        held_out: What follows them, at most as many; empty if nothing does.
        num_data: How many data there are in the batches; `None` if they do not tell.
    """

    batches: list[Batch]
    held_out: list[Batch]
    num_data: int | None


@contextmanager
def generators_put_back(data: Any) -> Iterator[None]:
    """Put back the generators of Python, NumPy and a `DataLoader`, of which reading data draws."""
    own = [getattr(owner, "generator", None) for owner in (data, getattr(data, "sampler", None))]
    generators = [g for g in own if isinstance(g, Generator)]
    states = [g.get_state() for g in generators]
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def read(data: Iterable[Batch], count: int) -> list[Batch]:
    """Return the first batches of data."""
    return list(some(islice(show_progress(data, False, ""), count)))


def size_of(batch: Batch) -> int | None:
    """Return the number of data of a batch that can be cut: the length of all first axes."""
    tensors = tensors_in(batch)
    sizes = {len(t) if t.ndim else None for t in tensors}
    if len(sizes) != 1 or not all(map(_can_be_cut, batch)):
        return None
    return sizes.pop()


def _can_be_cut(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.layout == torch.strided and not x.is_nested
    if type(x) is dict:
        return all(map(_can_be_cut, x.values()))
    return type(x) in (list, tuple) and len(x) > 0 and all(map(_can_be_cut, x))


def cut(x: Any, part: slice) -> Any:
    """Return a part of the data in tensors, lists, tuples and dictionaries."""
    if isinstance(x, Tensor):
        return x[part]
    if isinstance(x, dict):
        return {key: cut(value, part) for key, value in x.items()}
    return type(x)(cut(value, part) for value in x)


def divide(batches: Sequence[Batch], max_batches: int, max_data: int) -> Sample:
    """Take data from the front, and hold out as many of those that follow.

    Batches that cannot be cut, as their tensors have first axes of several lengths, are taken
    whole; the first one always.

    Args:
        batches: The batches.
        max_batches: How many batches are looked at, at most.
        max_data: How many data are looked at, at most.
    """
    taken: list[Batch] = []
    held_out: list[Batch] = []
    count: int | None = 0
    for batch in batches:
        size = size_of(batch)
        room = max_data - (count or 0)
        wanted = len(taken) < max_batches and room > 0 and not held_out and count is not None
        if size is None:
            if taken:
                held_out = held_out or [batch]
            else:
                taken, count = [batch], None
        elif wanted and size <= room:
            taken, count = [*taken, batch], (count or 0) + size
        else:
            start = room if wanted else 0
            if wanted:
                taken = [*taken, cut(batch, slice(0, room))]
                count = (count or 0) + room
            rest = slice(start, start + (count or size))
            held_out = held_out or [cut(batch, rest)]
        if held_out:
            break
    return Sample(taken, held_out, count)
