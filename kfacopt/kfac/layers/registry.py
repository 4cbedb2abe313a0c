"""The kinds of modules that K-FAC knows, with their families; each family is a file of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kfacopt.kfac.layers.convolution import Convolution
from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.linear import Linear
from kfacopt.kfac.layers.transposed_convolution import TransposedConvolution

Kinds = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Entry:
    """A kind of modules, and a matrix that they have.

    Attributes:
        kind: The class of modules; subclasses count if they override nothing.
        family: What they compute.
        default: Whether `KFACOptimizer` preconditions them unless it is told which.
    """

    kind: type[nn.Module]
    family: LayerFamily
    default: bool


# Later ones go first. The one place that says what is preconditioned by default.
ENTRIES: list[Entry] = [
    Entry(nn.Linear, Linear(), default=True),
    Entry(nn.Conv1d, Convolution(1), default=True),
    Entry(nn.Conv2d, Convolution(2), default=True),
    Entry(nn.Conv3d, Convolution(3), default=True),
    Entry(nn.ConvTranspose1d, TransposedConvolution(1), default=True),
    Entry(nn.ConvTranspose2d, TransposedConvolution(2), default=True),
    Entry(nn.ConvTranspose3d, TransposedConvolution(3), default=True),
]


def all_kinds() -> Kinds:
    """Return all kinds of modules that K-FAC knows."""
    return tuple(dict.fromkeys(entry.kind for entry in ENTRIES))


def default_kinds() -> Kinds:
    """Return those that `KFACOptimizer` preconditions by default."""
    return tuple(dict.fromkeys(entry.kind for entry in ENTRIES if entry.default))


def described(kinds: Kinds) -> str:
    """Return the names of kinds of modules, torch's as users write them."""
    names = [
        f"nn.{k.__name__}" if k.__module__.startswith("torch.nn.") else k.__name__ for k in kinds
    ]
    return ", ".join(names)


def families_of(module: nn.Module) -> list[LayerFamily]:
    """Return the families of a module, one for each matrix of its own; none if it is not known."""
    found: list[LayerFamily] = []
    taken: set[str | None] = set()
    for entry in reversed(ENTRIES):
        names = {entry.family.weight_name, entry.family.bias_name} - {None}
        fits = isinstance(module, entry.kind) and not names & taken
        if fits and entry.family.computes(module, entry.kind):
            found.append(entry.family)
            taken |= names
    return found[::-1]


def is_supported(module: nn.Module) -> bool:
    """Tell whether a module is of a kind that is preconditioned by default."""
    return isinstance(module, default_kinds()) and bool(families_of(module))
