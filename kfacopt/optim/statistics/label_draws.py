"""The random numbers that labels are drawn from, on one rank or several; no label is drawn here."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor

from kfacopt.optim.watch.wrappers import WrapperWatch

# A generator and its state at some time.
Mark = tuple[Generator, Tensor]


class LabelDraws:
    """Says which generator labels are drawn from.

    One process draws from one generator that goes on from step to step, and is saved. Under DDP
    each rank starts a generator of its own at each step, from the seed, the rank and the step's
    number: ranks draw different labels, and what one of them saves says what all go on with,
    however many numbers each has drawn.

    Args:
        seed: The seed.
        device: Where labels are drawn.
        wrappers: Knows the DDP wrapper.

    Attributes:
        common: The generator of one process, whose initial seed is that of all ranks.
        step: The number of the step that draws next.
    """

    def __init__(self, seed: int, device: torch.device, wrappers: WrapperWatch) -> None:
        self._wrappers, self._seed = wrappers, seed
        self.step = 0
        self._start(device)

    def _start(self, device: torch.device) -> None:
        self.common = Generator(device).manual_seed(self._seed)
        self._own, self._key = self.common, (0, -1, -1)

    def move(self, device: torch.device) -> None:
        """Draw on a device from now on; from the seed again, if it is another one."""
        if self.common.device != device:
            self._start(device)

    def generator(self) -> Generator:
        """Return the generator to draw from now."""
        rank = self._wrappers.rank_among_several()
        if rank is None:
            return self.common
        key = (self.common.initial_seed(), rank, self.step)
        if key != self._key:
            digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
            self._own = Generator(self.common.device).manual_seed(int.from_bytes(digest, "big"))
            self._key = key
        return self._own

    def seed_of(self, number: int) -> int:
        """Return a seed for what else is drawn in this step, which leaves the labels alone.

        Args:
            number: Counts what is seeded in this step.
        """
        key = (self.generator().initial_seed(), self.step, number)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")

    def mark(self) -> Mark:
        """Return what `rewind` takes to draw the same numbers again."""
        generator = self.generator()
        return generator, generator.get_state()


def rewind(mark: Mark | None) -> None:
    """Take back what was drawn since a mark, if there is one."""
    if mark is not None:
        generator, state = mark
        generator.set_state(state)
