"""The kinds of modules that K-FAC knows, with their families; each family is a file of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kfacopt.kfac.layers.convolution import Convolution
from kfacopt.kfac.layers.embedding import Embedding, EmbeddingBag
from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.linear import LinearFamily
from kfacopt.kfac.layers.normalization import (
    Scale,
    Shift,
    batch_normalized,
    group_normalized,
    instance_normalized,
    layer_normalized,
    rms_normalized,
)
from kfacopt.kfac.layers.transposed_convolution import TransposedConvolution

Kind = type[nn.Module] | type[nn.Parameter]
Kinds = tuple[Kind, ...]


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

    @property
    def matrix(self) -> tuple[type[nn.Module], str, str | None]:
        """Which matrix of which modules it is."""
        return self.kind, self.family.weight_name, self.family.bias_name


# Later ones go first. The one place that says what is preconditioned by default.
ENTRIES: list[Entry] = [
    Entry(nn.Linear, LinearFamily(), default=True),
    Entry(nn.Conv1d, Convolution(1), default=True),
    Entry(nn.Conv2d, Convolution(2), default=True),
    Entry(nn.Conv3d, Convolution(3), default=True),
    Entry(nn.ConvTranspose1d, TransposedConvolution(1), default=True),
    Entry(nn.ConvTranspose2d, TransposedConvolution(2), default=True),
    Entry(nn.ConvTranspose3d, TransposedConvolution(3), default=True),
    Entry(nn.Embedding, Embedding(), default=False),
    Entry(nn.EmbeddingBag, EmbeddingBag(), default=False),
]

# Without a family: the products in them are found in the graph, see `kfac/unrolled.py`. Options,
# since an LSTM's curvature was not worth its time (docs/layers.md).
RECURRENT: tuple[type[nn.Module], ...] = (
    nn.LSTM,
    nn.GRU,
    nn.RNN,
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
)

# Parameters by their entries, past modules: `kfac/entry_uses.py`. An option, as normalisations are.
ENTRYWISE: Kinds = (nn.Parameter,)

for _normalized, _channels_last, _kinds in (
    (layer_normalized, True, (nn.LayerNorm,)),
    (rms_normalized, True, (nn.RMSNorm,)),
    (group_normalized, False, (nn.GroupNorm,)),
    (batch_normalized, False, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    (instance_normalized, False, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
):
    for _family in (Scale(_normalized, _channels_last), Shift(_normalized, _channels_last)):
        ENTRIES += [Entry(_kind, _family, default=False) for _kind in _kinds]


def register_layer(kind: type[nn.Module], family: LayerFamily, default: bool = True) -> None:
    """Let K-FAC know a kind of modules: the operators, and optimizers that are made from then on.

    A kind may have several matrices [W | b]: register one family for each, with other names of
    parameters. What is registered goes before what was known of a module, and replaces what was
    registered for the same kind and parameters.

    Args:
        kind: The class of modules; subclasses count that do not override `forward`.
        family: How inputs and output gradients become a and g, and which parameters W and b are.
        default: Whether `KFACOptimizer` preconditions them if it has no `layers=`.

    Raises:
        ValueError: If `kind` is not a class of modules, or `family` not a `LayerFamily`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from kfacopt import KFACLinearOperator, LinearFamily
        >>> class Squares(nn.Module):  # z = W [x, x²], with W under another name
        ...     def __init__(self, d_in, d_out):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(d_out, 2 * d_in))
        ...     def forward(self, x):
        ...         return torch.cat([x, x.square()], dim=-1) @ self.kernel.mT
        >>> class SquaresFamily(LinearFamily):
        ...     def inputs(self, module, x, reduce):
        ...         return super().inputs(module, torch.cat([x, x.square()], dim=-1), reduce)
        >>> register_layer(Squares, SquaresFamily(weight_name="kernel", bias_name=None))
        >>> model, data = Squares(3, 2), [(torch.rand(8, 3), torch.rand(8, 2))]
        >>> K = KFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
        >>> K.factors("kernel").input_factor.shape
        torch.Size([6, 6])
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"kind must be a class of nn.Module, got {kind!r}.")
    if not isinstance(family, LayerFamily):
        raise ValueError(f"family must be a LayerFamily, made, got {family!r}.")
    new = Entry(kind, family, default)
    ENTRIES[:] = [entry for entry in ENTRIES if entry.matrix != new.matrix] + [new]


def all_kinds() -> Kinds:
    """Return all kinds of modules that K-FAC knows."""
    return tuple(dict.fromkeys([*(entry.kind for entry in ENTRIES), *RECURRENT]))


def default_kinds() -> Kinds:
    """Return those that `KFACOptimizer` preconditions unless it is told which.

    Example:
        >>> from torch import nn
        >>> from kfacopt import default_layers
        >>> nn.Linear in default_layers(), nn.Embedding in default_layers()
        (True, False)
    """
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
