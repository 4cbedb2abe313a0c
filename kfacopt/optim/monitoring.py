"""Numbers for logging; the device is asked here, never in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfacopt.kfac.layers import Block
from kfacopt.linalg.kept_products import KeptProduct
from kfacopt.linalg.kronecker import KroneckerMatrix, KroneckerProduct, eigendecomposition
from kfacopt.linalg.split_factors import SplitInverse
from kfacopt.linalg.split_spectrum import spectrum_ends
from kfacopt.optim.settings import Groups, as_number
from kfacopt.optim.state.curvature_state import CurvatureState
from kfacopt.optim.state.inverses import inverse_of

Scalars = dict[str, float]


def all_block_statistics(
    curvature: CurvatureState, groups: Groups, names: Mapping[int, str]
) -> Scalars:
    """Return the statistics of all blocks, by the layer's name, or the parameter's."""
    damping = {p: as_number(group["damping"]) for group in groups for p in group["params"]}
    result: Scalars = {}
    for block in curvature.blocks:
        alone = len(block.layer.blocks) == 1
        name = block.layer.name if alone else names[id(block.anchor)]
        own = (curvature.entries, block, damping[block.anchor], groups[0]["num_steps"])
        result |= {f"{name}/{key}": value for key, value in block_statistics(*own).items()}
    return result


def block_statistics(
    states: Mapping[Tensor, Any], block: Block, damping: float, num_steps: int
) -> Scalars:
    """Return what is known of a block's factors and inverse.

    Returns:
        `damping`, `factor_age` and `inverse_age` (steps since they were computed, 0 for the last
        step; NaN if never), `skipped_factor_updates` (statistics that were not finite or empty),
        `inverse_failures` (in a row) and `condition` (of the damped curvature; NaN without one).
    """
    state, layer_state = states.get(block.anchor, {}), states.get(block.layer.anchor, {})
    inverse = inverse_of(state, damping)
    updates, skipped = layer_state.get("factor_updates", 0), layer_state.get("skipped_updates", 0)
    folded = int(updates) > int(skipped)
    last = num_steps - 1
    return {
        "damping": float(damping),
        "condition": float("nan") if inverse is None else condition(inverse),
        "factor_age": float(last - int(layer_state["factor_step"])) if folded else float("nan"),
        "inverse_age": float("nan") if inverse is None else float(last - state["inverse_step"]),
        "skipped_factor_updates": float(skipped),
        "inverse_failures": float(state.get("inverse_failures", 0)),
    }


def condition(inverse: KroneckerMatrix | KeptProduct) -> float:
    """Return the largest over the smallest eigenvalue of a block's damped curvature.

    Args:
        inverse: The damped inverse, which has the same condition; of several independent blocks
            (groups of a convolution) the worst counts, of blocks of one number all together.
    """
    inverse = (inverse.dense() if isinstance(inverse, KeptProduct) else inverse).widened()
    if isinstance(inverse, KroneckerProduct):
        sides = (inverse.grad_output_factor, inverse.input_factor)
        spectra = [
            spectrum_ends(side) if isinstance(side, SplitInverse) else eigendecomposition(side)[0]
            for side in sides
        ]
    else:
        spectra = [inverse.eigenvalues.flatten(1)]
    if all(values.shape[1] == 1 for values in spectra):  # one block for each entry
        numbers = torch.stack(spectra).prod(0)
        return float(numbers.amax() / numbers.amin())
    ratios = [values.amax(1) / values.amin(1) for values in spectra]
    return float(torch.stack(ratios).prod(0).max())
