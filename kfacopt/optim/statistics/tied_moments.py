"""Moments of weights with uses of different kinds, which were collected apart, as one layer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch

from kfacopt.kfac.factor_forms import FactorForm
from kfacopt.kfac.layers import Layer
from kfacopt.kfac.layers.tied import joined_factors
from kfacopt.optim.statistics.moments import Moments


def joined(
    pending: Mapping[Layer, Moments], layers: Sequence[Layer], form: FactorForm
) -> dict[Layer, Moments]:
    """Return the moments of layers, of those of their parts.

    Args:
        pending: By part, or by layer where it has none.
        layers: The layers.
        form: How factors are formed.
    """
    found: dict[Layer, Moments] = {}
    for layer in layers:
        own = {part: pending[part] for part in layer.collected if part in pending}
        if own and layer.parts:
            factors = {part: moments.take_factors() for part, moments in own.items()}
            A, G = joined_factors(layer, factors, form.shapes)
            counts = [torch.as_tensor(m.terms, device=A.device) for m in own.values()]
            terms = reduce(torch.maximum, counts)
            found[layer] = Moments(A, 1, G, terms)
        else:
            found |= own
    return found
