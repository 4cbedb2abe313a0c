"""Why a parameter that a graph has is no layer, in words; nothing is computed with it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter

from kfacopt.kfac.added_biases import Parents
from kfacopt.kfac.convolution_uses import CONVOLUTION
from kfacopt.kfac.lookup_uses import LOOKUP
from kfacopt.kfac.matrix_products import PRODUCTS
from kfacopt.kfac.parameter_views import is_view

_MANY = 3  # operations that are named
_BY_ENTRIES = {"Add", "Sub", "Mul", "Div", "Repeat", "Expand"}
_WEIGHT_NORM = "WeightNormInterface"


def reasons_against(parents: Parents, params: Iterable[Parameter]) -> dict[Parameter, str]:
    """Return why parameters whose uses are no products of one layout are in no layer.

    Args:
        parents: The graph.
        params: The parameters; those that it lacks are left out.
    """
    leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
    return {p: _reason(leaves[id(p)], parents) for p in params if id(p) in leaves}


def _reason(leaf: Any, parents: Parents) -> str:
    waiting, names = [leaf], []
    for node in waiting:  # which grows
        for parent, place in parents[node]:
            name = parent.name()
            if place >= 0 and is_view(parent):
                waiting += [] if parent in waiting else [parent]
            elif place < 0:
                names.append("a layer's input")
            elif name not in PRODUCTS and name not in (CONVOLUTION, LOOKUP):
                names.append(re.sub(r"Backward\d*$", "", name))
    own = list(dict.fromkeys(names))
    if not own:
        return "its products and lookups make it no matrix of one kind"
    if own == [_WEIGHT_NORM]:
        return "weight norm makes a layer's weight of it; without, the layer has curvature"
    if set(own) <= _BY_ENTRIES:
        return (
            "multiplied or added entry by entry; where that is with data, nn.Parameter among "
            "layers= has it, and a weight that is scaled may scale the layer's output instead"
        )
    more = ", ..." if len(own) > _MANY else ""
    return (
        f"used in {', '.join(own[:_MANY])}{more}, of which K-FAC knows nothing; register_layer "
        "tells it of a module"
    )
