"""Parameters that are added to activations, scale them or stand among them: positions, tokens.

They are no layers unless `nn.Parameter` is asked for, but no matrices either: AdamW trains them at
another rate. A weight that is scaled, or made by a network, is none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter

from kfacopt.kfac.added_biases import Parents
from kfacopt.kfac.entry_uses import EntryUses
from kfacopt.kfac.parameter_views import is_view

_SUMS, _PRODUCT, _CAT = ("AddBackward0", "SubBackward0"), "MulBackward0", "CatBackward0"
_REPEATS = ("ExpandBackward0", "RepeatBackward0")
_CHOICES = ("IndexBackward0", "IndexSelectBackward0", "SliceBackward0")


def added_tables(
    parents: Parents, params: Iterable[Parameter], known: Iterable[Any]
) -> list[Parameter]:
    """Return the parameters all of whose uses are such.

    Args:
        parents: The graph.
        params: The parameters to look for.
        known: Nodes whose outputs depend on data; see `EntryUses`.
    """
    leaves = {id(n.variable): n for n in parents if hasattr(n, "variable")}
    data = EntryUses(parents, known, ())
    return [p for p in params if id(p) in leaves and _is_added(leaves[id(p)], parents, data)]


def _is_added(leaf: Any, parents: Parents, data: EntryUses) -> bool:
    waiting, found = [(leaf, False)], False  # nodes with the parameter's entries; repeated ones
    for node, repeated in waiting:  # which grows
        for parent, place in parents[node]:
            name = parent.name() if place >= 0 else ""
            if place < 0:
                if not repeated:
                    return False  # the input of a layer, as a weight may be
                found = True
            elif name in _REPEATS:
                waiting.append((parent, True))
            elif is_view(parent) or name in _CHOICES:
                waiting.append((parent, repeated))
            elif name == _CAT:
                others = [n for k, (n, _) in enumerate(parent.next_functions) if k != place]
                if repeated or any(n is not None and data.has_data(n) for n in others):
                    found = True
                else:
                    waiting.append((parent, repeated))
            elif name in _SUMS or (name == _PRODUCT and not repeated):
                added = _meets_activations(parent, place, data)
                if added is None:
                    return False
                found = found or added
                waiting += [] if added else [(parent, repeated)]
            else:
                return False
    return found


def _meets_activations(node: Any, place: int, data: EntryUses) -> bool | None:
    """Tell whether a sum's or product's other operand is an activation that is as large as it.

    Returns:
        `False` for a sum with another parameter, of which the sum is like one; `None` for all else.
    """
    other, number = node.next_functions[1 - place]
    if other is None:
        return None
    if not data.has_data(other):
        return False if node.name() in _SUMS else None
    shape = tuple(node._input_metadata[0].shape)
    is_whole = hasattr(other, "variable") or tuple(other._input_metadata[number].shape) == shape
    own, nr = node.next_functions[place]
    entries = own.variable.shape if hasattr(own, "variable") else own._input_metadata[nr].shape
    return True if is_whole and math.prod(entries) < math.prod(shape) else None
