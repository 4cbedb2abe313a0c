"""What a choice of kinds of modules leaves out, and what it names that is no layer by itself."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn import Parameter

from kfacopt.kfac.layers import RECURRENT, Kinds, described, families_of
from kfacopt.kfac.unrolled import is_recurrent


def left_out(modules: Iterable[nn.Module], kinds: Kinds) -> dict[int, str]:
    """Return the `id`s of parameters of modules whose kind is known, but was not chosen.

    Biases have no matrix of their own, and may still be added to other products.

    Args:
        modules: The modules.
        kinds: Those that were chosen.

    Returns:
        For each parameter the kind of the module, as users write it.
    """
    found: dict[int, str] = {}
    for module in modules:
        if isinstance(module, tuple(kinds)):
            continue
        if is_recurrent(module):
            kind = next(k for k in RECURRENT if isinstance(module, k))
            found |= {id(p): described((kind,)) for p in module._parameters.values()}
        for family in families_of(module):
            p = module._parameters.get(family.weight_name)
            found[id(p)] = described((type(module),))
    found.pop(id(None), None)
    return found


def recurrent_parameters(modules: Iterable[nn.Module], kinds: Kinds) -> set[Parameter]:
    """Return the parameters of recurrent modules that were chosen, whose products are layers."""
    chosen = [m for m in modules if is_recurrent(m) and isinstance(m, tuple(kinds))]
    return {p for module in chosen for p in module._parameters.values() if p is not None}
