"""What a choice of kinds of modules leaves out, and what it names that is no layer by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter

from kfacopt.kfac.layers import RECURRENT, Kinds, described, families_of
from kfacopt.kfac.matrix_layouts import MatrixLayout
from kfacopt.kfac.unrolled import is_recurrent


@dataclass(frozen=True)
class Choice:
    """Which matrices may be layers.

    Attributes:
        kinds: The kinds of modules that are layers; a product is what `nn.Linear` does.
        left_out: Parameters of modules whose kind is known, but was not chosen, by their `id`, and
            that kind as users write it.
        recurrent: Parameters of recurrent modules that were chosen, whose products are layers.
        ties: Whether an embedding that is tied to a head is a layer.
        by_entries: Whether parameters that are multiplied or added entry by entry are.
    """

    kinds: Kinds
    left_out: dict[int, str]
    recurrent: frozenset[Parameter]
    ties: bool
    by_entries: bool

    @classmethod
    def of(cls, modules: Iterable[nn.Module], kinds: Kinds, corrected: bool) -> Choice:
        """Return what kinds mean for modules.

        Args:
            modules: The modules.
            kinds: Those that were chosen.
            corrected: Whether second moments are collected, as EKFAC does; not of tied weights.
        """
        left_out: dict[int, str] = {}
        recurrent: set[Parameter] = set()
        for module in modules:
            params = [p for p in module._parameters.values() if p is not None]
            chosen = isinstance(module, tuple(kinds))
            if is_recurrent(module) and chosen:
                recurrent.update(params)
            elif is_recurrent(module):
                kind = next(k for k in RECURRENT if isinstance(module, k))
                left_out |= {id(p): described((kind,)) for p in params}
            for family in [] if chosen else families_of(module):
                names = [family.weight_name, *([family.bias_name] if family.bias_name else [])]
                own = {id(module._parameters.get(name)) for name in names}
                left_out |= dict.fromkeys(own, described((type(module),)))
        ties = nn.Linear in kinds and nn.Embedding in kinds and not corrected
        return cls(tuple(kinds), left_out, frozenset(recurrent), ties, nn.Parameter in kinds)

    def looks_for(self, p: Parameter) -> bool:
        """Tell whether uses of a parameter in no layer are looked for."""
        if p.ndim < 2 and not self.by_entries:
            return False
        return bool(self.kinds) and id(p) not in self.left_out

    def leaves_out(self, p: Parameter, layout: MatrixLayout) -> str:
        """Say why a matrix that is used in some way is no layer.

        Args:
            p: The matrix.
            layout: How it is used.
        """
        if layout.is_tied:
            return "looked up and multiplied; nn.Linear and nn.Embedding among layers= have it"
        return f"{described((layout.kind(p),))} is not among layers="

    def makes_layer(self, p: Parameter, layout: MatrixLayout) -> bool:
        """Tell whether a matrix that is used in some way is a layer."""
        if layout.is_tied:
            return self.ties
        if id(p) in self.left_out:
            return False
        return p in self.recurrent or layout.kind(p) in self.kinds
