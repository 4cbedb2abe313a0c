"""A layer's running factors and a block's damped inverse, kept in the optimizer's state."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kfacopt.kfac.factors import FactorForm, factor_dtype, fold
from kfacopt.kfac.layers import Block, Layer
from kfacopt.linalg.kronecker import (
    DampingMethod,
    DecompositionError,
    KroneckerEigendecomposition,
    KroneckerProduct,
)
from kfacopt.optim.statistics import Moments

State = dict[str, Any]

MAX_FAILURES = 3

NO_INVERSE = -1  # an "inverse_step" that tells that the inverse is only there to be loaded into

# What a layer's state knows of its factors: their total weight, how many updates were tried, how many
# of them were skipped as not finite, and the step of the last that was not.
FACTOR_RECORDS = ("factor_weight", "factor_updates", "skipped_updates", "factor_step")

# The state's keys for the sides of an inverse, by what they initialise.
_INVERSES = {
    KroneckerProduct: ("grad_output_inverse", "input_inverse"),
    KroneckerEigendecomposition: ("grad_output_basis", "input_basis", "inverse_eigenvalues"),
}


def factor_shapes(layer: Layer, form: FactorForm) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's running factors by their key in the state."""
    return {
        name: (layer.groups, side) if form.diagonal(side) else (layer.groups, side, side)
        for name, side in (("input_factor", layer.d_in), ("grad_output_factor", layer.d_out))
    }


def discard_unfitting(states: MutableMapping[Tensor, Any], layer: Layer, form: FactorForm) -> None:
    """Forget a layer's factors and inverses if a parameter was frozen or added since.

    Args:
        states: The optimizer's state.
        layer: The layer as it is now.
        form: How factors are formed.
    """
    state = states.get(layer.anchor, {})
    shapes = factor_shapes(layer, form)
    if all(tuple(state[name].shape) == shape for name, shape in shapes.items() if name in state):
        return
    for p in (layer.weight, layer.bias):
        for key in (*shapes, *FACTOR_RECORDS, "inverse_step", *chain.from_iterable(_INVERSES.values())):
            if p is not None:
                states.get(p, {}).pop(key, None)


def initialise_factors(state: State, layer: Layer, form: FactorForm) -> None:
    """Give a layer's state empty running factors if it has none.

    Their shapes follow from the parameters, as `torch.distributed.checkpoint` needs it.

    Args:
        state: The optimizer's state of the layer's anchor parameter.
        layer: The layer.
        form: How factors are formed.
    """
    dtype, device = factor_dtype(layer.anchor.dtype), layer.anchor.device
    shapes = factor_shapes(layer, form)
    if "factor_weight" in state:
        return
    for name, shape in shapes.items():
        state[name] = torch.zeros(shape, dtype=dtype, device=device)
    state["factor_weight"] = torch.zeros((), dtype=dtype, device=device)
    state["factor_updates"] = 0
    state["skipped_updates"] = torch.zeros((), dtype=torch.int64, device=device)
    state["factor_step"] = torch.zeros((), dtype=torch.int64, device=device)


def fold_factors(
    state: State, layer: Layer, moments: Moments, form: FactorForm, ema_decay: float, step: int
) -> None:
    """Move a layer's running factors to include new statistics, unless these are not finite.

    Nothing is synchronised with the device: a non-finite statistic gets the weight 0.

    Args:
        state: The optimizer's state of the layer's anchor parameter.
        layer: The layer.
        moments: The statistics of this step.
        form: How factors are formed.
        ema_decay: The decay of earlier statistics; a step's weight is its number of terms.
        step: The number of the step, to be remembered.
    """
    initialise_factors(state, layer, form)
    A, G, terms = moments.factors()
    total = state["factor_weight"]
    terms = terms.to(total)
    finite = A.isfinite().all() & G.isfinite().all() & terms.isfinite() & (terms > 0)
    weight = torch.where(finite, terms, 0.0)
    total.copy_(torch.where(finite, ema_decay * total + weight, total))
    safe_total = torch.where(total > 0, total, 1.0)
    for name, value in (("input_factor", A), ("grad_output_factor", G)):
        fold(state[name], torch.where(finite, value, state[name]), weight, safe_total)
    state["factor_updates"] += 1
    state["skipped_updates"] += ~finite
    state["factor_step"].copy_(torch.where(finite, step, state["factor_step"]))


def refresh_inverse(
    state: State, layer_state: State, block: Block, damping: float, method: DampingMethod
) -> bool:
    """Recompute a block's damped inverse from its layer's running factors.

    Args:
        state: The optimizer's state of the block's anchor parameter.
        layer_state: That of the layer's anchor parameter.
        block: The block.
        damping: δ.
        method: `"factored"` or `"exact"`.

    Returns:
        Whether there is a new inverse.

    Raises:
        DecompositionError: If there is no earlier inverse to go on with, or after more than
            `MAX_FAILURES` failures in a row; names the layer.
    """
    if "factor_weight" not in layer_state or not bool(layer_state["factor_weight"] > 0):
        return False
    A = block.input_factor(layer_state["input_factor"])
    product = KroneckerProduct(layer_state["grad_output_factor"], A)
    try:
        inverse = product.inverse(damping, method)
    except DecompositionError as error:
        state["inverse_failures"] = state.get("inverse_failures", 0) + 1
        if inverse_of(state) is None or state["inverse_failures"] > MAX_FAILURES:
            raise DecompositionError(
                f"layer {block.layer.name!r}: {error} ({state['inverse_failures']} failures in a "
                f"row, damping {damping}). Raise damping, or use float64 parameters."
            ) from error
        return False
    state["inverse_failures"] = 0
    for keys in _INVERSES.values():
        for key in keys:
            state.pop(key, None)
    for key, value in zip(_INVERSES[type(inverse)], vars(inverse).values(), strict=True):
        if value is not None:
            state[key] = value
    return True


def inverse_of(state: State) -> KroneckerProduct | KroneckerEigendecomposition | None:
    """Return a block's damped inverse from its state, or `None` if there is none yet."""
    if state.get("inverse_step", 0) == NO_INVERSE:
        return None
    if "input_inverse" in state:
        return KroneckerProduct(state["grad_output_inverse"], state["input_inverse"])
    if "inverse_eigenvalues" in state:
        bases = (state.get("grad_output_basis"), state.get("input_basis"))
        return KroneckerEigendecomposition(*bases, state["inverse_eigenvalues"])
    return None


def precondition(
    inverse: KroneckerProduct | KroneckerEigendecomposition,
    block: Block,
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return the damped inverse times the gradients of a block's parameters.

    Args:
        inverse: The block's damped inverse.
        block: The block.
        grads: One for each parameter of the block; `None` counts as 0.

    Returns:
        Tensors of the shapes and dtypes of the block's parameters.
    """
    dtype = factor_dtype(block.anchor.dtype)
    filled = [
        torch.zeros_like(p, dtype=dtype) if g is None else g.to(dtype)
        for p, g in zip(block.parameters, grads, strict=True)
    ]
    pieces = block.from_matrix(inverse.apply(block.to_matrix(filled)))
    return [piece.to(p.dtype) for piece, p in zip(pieces, block.parameters, strict=True)]
