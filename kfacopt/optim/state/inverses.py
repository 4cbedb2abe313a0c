"""A block's damped inverse, kept in the optimizer's state; gradients meet it in `steps`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kfacopt.kfac.eigenvalues import Bases
from kfacopt.kfac.factors import FactorForm, along, factor_dtype
from kfacopt.kfac.layers import Block, Layer
from kfacopt.linalg.eigenbasis import rayleigh_quotients, refreshed_basis, rotated_eigenvalues
from kfacopt.linalg.kronecker import (
    DecompositionError,
    KroneckerEigendecomposition,
    KroneckerMatrix,
    KroneckerProduct,
    factored_damping,
    inverses_by_size,
    is_diagonal,
    trace,
)
from kfacopt.optim.settings import InverseForm
from kfacopt.optim.state.running_averages import (
    FACTORS,
    RECORDS,
    State,
    States,
    factor_shapes,
    has_weight,
    is_free_to_read,
)

MAX_FAILURES = 3

NO_INVERSE = -1  # an "inverse_step" that says that the inverse is only there to be loaded into

# An eigenbasis is left alone while the off-diagonal part of QᵀAQ is below that share of its norm.
BASIS_TOLERANCE = 0.01

INVERSES = ("grad_output_inverse", "input_inverse")
BASES = ("grad_output_basis", "input_basis")
CORRECTION = ("second_moments", "second_moment_weight")

# The state's keys for an inverse, by what they initialise.
_KEYS = {KroneckerProduct: INVERSES, KroneckerEigendecomposition: (*BASES, "inverse_eigenvalues")}
INVERSE_SIDES = (*INVERSES, *BASES, "inverse_eigenvalues")

# All that a block's state may have of its inverse.
INVERSE_KEYS = (*INVERSE_SIDES, *CORRECTION)


def discard_unfitting(states: States, layer: Layer, form: FactorForm) -> None:
    """Forget a layer's factors and inverses if a parameter was frozen or added since."""
    state = states.get(layer.anchor, {})
    shapes = factor_shapes(layer, form)
    if any(tuple(state[name].shape) != shape for name, shape in shapes.items() if name in state):
        discard(states, layer)


def discard(states: States, layer: Layer) -> None:
    """Forget a layer's factors and inverses."""
    entries = (*FACTORS, *RECORDS, "inverse_step", "inverse_failures", *INVERSE_KEYS)
    for p in (layer.weight, layer.bias):
        if p is not None:
            _forget(states.get(p, {}), entries)


def _forget(state: State, keys: Iterable[str]) -> None:
    for key in keys:
        state.pop(key, None)


def bases_of(state: State) -> Bases | None:
    """Return a block's eigenbases Q_G and Q_A if its second moments are kept, else `None`."""
    if "second_moments" not in state or not has_inverse(state):
        return None
    return _kept_bases(state)


def _kept_bases(state: State) -> Bases:
    basis_g, basis_a = map(state.get, BASES)
    return basis_g, basis_a


def _factors(layer_state: State, block: Block) -> KroneckerProduct:
    dtype = factor_dtype(layer_state["input_factor"].dtype)
    A, G = (layer_state[name].to(dtype) for name in FACTORS)
    if block.layer.family.routed:
        A, G = (_filled(x, layer_state["factor_weight"]) for x in (A, G))
    return KroneckerProduct(G, block.input_factor(A))


def _filled(factor: Tensor, weights: Tensor) -> Tensor:
    """Give groups that never had any data the mean of the others' factors."""
    known = along(weights > 0, factor)
    mean = torch.where(known, factor, 0.0).sum(0) / (weights > 0).sum().clamp(min=1)
    return torch.where(known, factor, mean)


def inverses_at_once(
    entries: Sequence[tuple[State, Block, float]], form: InverseForm
) -> dict[Block, KroneckerProduct]:
    """Return the damped inverses of many blocks on GPUs, in one call for each size.

    There a call for each matrix and a look at its success take longer than the arithmetic; on the
    CPU LAPACK takes one matrix after the other, and blocks are left to `refresh_inverse`.

    Args:
        entries: For each block the state of its layer's anchor parameter, the block, and δ.
        form: How inverses are formed.

    Returns:
        The inverses, of blocks whose factors are there and dense, and whose inverse is finite.
    """
    if form.corrected or form.method != "factored":
        return {}
    sides: list[tuple[Tensor, Tensor]] = []
    dampings: list[Tensor] = []
    owners: list[tuple[Block, Tensor]] = []
    for layer_state, block, damping in entries:
        weight = layer_state.get("factor_weight")
        if weight is None or is_free_to_read(weight):
            continue
        product = _factors(layer_state, block)
        pair = (product.grad_output_factor, product.input_factor)
        if not any(map(is_diagonal, pair)):
            sides.append(pair)
            dampings += factored_damping(*pair, damping)
            owners.append((block, weight))
    if not owners:
        return {}
    inverses = inverses_by_size([side for pair in sides for side in pair], dampings)
    found = [KroneckerProduct(*pair) for pair in zip(inverses[::2], inverses[1::2], strict=True)]
    # The entries of an inverse are at most as large as those of its diagonal.
    flags = [
        (weight > 0).any()
        & torch.isfinite(trace(x.grad_output_factor) + trace(x.input_factor)).all()
        for (_, weight), x in zip(owners, found, strict=True)
    ]
    usable = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return {block: x for (block, _), x, good in zip(owners, found, usable, strict=True) if good}


def refresh_inverse(
    state: State,
    layer_state: State,
    block: Block,
    damping: float,
    form: InverseForm,
    inverse: KroneckerProduct | None = None,
) -> bool:
    """Recompute a block's damped inverse, or its eigenbases, from its layer's running factors.

    Args:
        state: The optimizer's state of the block's anchor parameter.
        layer_state: That of the layer's anchor parameter.
        block: The block.
        damping: δ.
        form: How inverses are formed.
        inverse: The inverse, if it was computed already.

    Returns:
        Whether there is a new one.

    Raises:
        DecompositionError: If there is no earlier inverse to go on with, or after more than
            `MAX_FAILURES` failures in a row; names the layer.
    """
    if inverse is None and not has_weight(layer_state):
        return False
    try:
        if inverse is not None:
            _store_inverse(state, inverse, form)
        elif form.corrected:
            _refresh_bases(state, layer_state, _factors(layer_state, block), form)
        else:
            product = _factors(layer_state, block)
            _store_inverse(state, product.inverse(damping, form.method), form)
    except DecompositionError as error:
        state["inverse_failures"] = state.get("inverse_failures", 0) + 1
        if not has_inverse(state) or state["inverse_failures"] > MAX_FAILURES:
            raise DecompositionError(
                f"layer {block.layer.name!r}: {error} ({state['inverse_failures']} failures in a "
                f"row, damping {damping}). Raise damping, or use float64 parameters."
            ) from error
        return False
    state["inverse_failures"] = 0
    return True


def _store_inverse(state: State, inverse: KroneckerMatrix, form: InverseForm) -> None:
    _forget(state, INVERSE_KEYS)
    for key, value in zip(_KEYS[type(inverse)], vars(inverse).values(), strict=True):
        if value is not None:
            state[key] = value.to(form.stored_dtype or value.dtype)


def _refresh_bases(
    state: State, layer_state: State, product: KroneckerProduct, form: InverseForm
) -> None:
    """Follow the factors with the eigenbases, and the bases with the second moments.

    Before there are second moments, K-FAC's eigenvalues stand for them, with the weight 0.
    """
    sides = (product.grad_output_factor, product.input_factor)
    old = bases_of(state)
    known = (None, None) if old is None else old
    found = [refreshed_basis(f, q, BASIS_TOLERANCE) for f, q in zip(sides, known, strict=True)]
    if form.stored_dtype is not None:
        found = [q if q is None else q.to(form.stored_dtype) for q in found]
    new = (found[0], found[1])
    stored = layer_state["input_factor"].dtype
    if old is not None:
        moments = state["second_moments"].to(product.dtype)
        state["second_moments"] = rotated_eigenvalues(moments, old, new).to(stored)
    else:
        quotients = [rayleigh_quotients(f, q) for f, q in zip(sides, new, strict=True)]
        eigenvalues = quotients[0].unsqueeze(-1) * quotients[1].unsqueeze(-2)
        state["second_moments"] = eigenvalues.to(stored)
        state["second_moment_weight"] = torch.zeros_like(layer_state["factor_weight"])
    _forget(state, INVERSE_SIDES)
    state.update({key: q for key, q in zip(BASES, new, strict=True) if q is not None})


def has_inverse(state: State) -> bool:
    """Tell whether a block's state has what a damped inverse is made of."""
    if state.get("inverse_step") == NO_INVERSE:
        return False
    return any(key in state for key in ("input_inverse", "inverse_eigenvalues", "second_moments"))


def inverse_of(state: State, damping: float) -> KroneckerMatrix | None:
    """Return a block's damped inverse from its state, or `None` if there is none yet.

    Args:
        state: The optimizer's state of the block's anchor parameter.
        damping: δ, which EKFAC adds to its second moments here; K-FAC's inverse has it inside.
    """
    if not has_inverse(state):
        return None
    if "input_inverse" in state:
        return KroneckerProduct(state["grad_output_inverse"], state["input_inverse"])
    if "second_moments" in state:
        moments = state["second_moments"]
        eigenvalues = (moments.to(factor_dtype(moments.dtype)) + damping).reciprocal()
    else:
        eigenvalues = state["inverse_eigenvalues"]
    return KroneckerEigendecomposition(*_kept_bases(state), eigenvalues)
