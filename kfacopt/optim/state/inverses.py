"""A block's damped inverse, kept in the optimizer's state; gradients meet it in `steps`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfacopt.kfac.eigenvalues import Bases
from kfacopt.kfac.factor_forms import FactorForm
from kfacopt.kfac.factors import along, factor_dtype
from kfacopt.kfac.layers import Block, Layer
from kfacopt.linalg.eigenbasis import rayleigh_quotients, refreshed_basis, rotated_eigenvalues
from kfacopt.linalg.eigenspaces import Levels, averaged
from kfacopt.linalg.kept_products import KeptProduct, inverse_side
from kfacopt.linalg.kronecker import (
    DecompositionError,
    KroneckerEigendecomposition,
    KroneckerMatrix,
    KroneckerProduct,
    factored_damping,
    inverses_by_size,
    trace,
)
from kfacopt.linalg.low_rank import LowRankInverse, is_low_rank, sketch_of
from kfacopt.linalg.split_factors import Factor, SplitBasis, SplitInverse
from kfacopt.linalg.triangles import Workspace, kept_once, symmetric, whole_shape
from kfacopt.optim.settings import InverseForm
from kfacopt.optim.state.running_averages import (
    FACTORS,
    RECORDS,
    REST,
    State,
    States,
    factor_shapes,
    grad_output_factor,
    has_weight,
    input_factor,
    is_free_to_read,
)

MAX_FAILURES = 3

NO_INVERSE = -1  # an "inverse_step" that says that the inverse is only there to be loaded into

# An eigenbasis is left alone while the off-diagonal part of QᵀAQ is below that share of its norm.
BASIS_TOLERANCE = 0.01

INVERSES = ("grad_output_inverse", "input_inverse")
BASES = ("grad_output_basis", "input_basis")
CORRECTION = ("second_moments", "second_moment_weight")

# What a split A has besides: w of its inverse, and the second part of its basis.
INPUT_UPDATE, POSITION_BASIS = "input_update", "position_basis"

# Of EKFAC's bases: which vectors of G's, A's and a split A's second part rounding does not tell
# apart; see `eigenspaces`.
LEVELS = ("grad_output_levels", "input_levels", "position_levels")

INVERSE_SIDES = (*INVERSES, *BASES, POSITION_BASIS, "inverse_eigenvalues")

# All that a block's state may have of its inverse.
INVERSE_KEYS = (*INVERSE_SIDES, INPUT_UPDATE, *LEVELS, *CORRECTION)


def discard_unfitting(states: States, layer: Layer, form: FactorForm) -> None:
    """Forget a layer's factors and inverses if a parameter was frozen or added since.

    A whole factor, which an earlier version kept, becomes a sketch where that is what is kept.
    """
    state = states.get(layer.anchor, {})
    for name, rank in zip(FACTORS, layer.ranks, strict=True):
        if rank and name in state and not is_low_rank(state[name]):
            whole = symmetric(state[name].to(factor_dtype(layer.anchor.dtype)))
            state[name] = sketch_of(whole, rank)
    shapes = factor_shapes(layer, form)
    fits = all(tuple(state[name].shape) == shape for name, shape in shapes.items() if name in state)
    # A split A is kept alike with and without a bias, but its inverse is not.
    columns = {INPUT_UPDATE: layer.d_in + 1}
    columns |= dict.fromkeys(("inverse_eigenvalues", "second_moments"), layer.d_in)
    if not (fits and all(state[x].shape[-1] == n for x, n in columns.items() if x in state)):
        discard(states, layer)


def discard(states: States, layer: Layer) -> None:
    """Forget a layer's factors and inverses."""
    entries = (*FACTORS, REST, *RECORDS, "inverse_step", "inverse_failures", *INVERSE_KEYS)
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
    if POSITION_BASIS not in state:
        return basis_g, basis_a
    assert basis_a is not None
    positions, columns = state[POSITION_BASIS], _eigenvalues(state).shape[-1]
    joint = columns > basis_a.shape[-1] * positions.shape[-1]
    return basis_g, SplitBasis(basis_a, positions, joint)


def _eigenvalues(state: State) -> Tensor:
    """Return the eigenvalues that a state has beside bases."""
    name = "second_moments" if "second_moments" in state else "inverse_eigenvalues"
    values: Tensor = state[name]
    return values


def _factors(layer_state: State, block: Block) -> KroneckerProduct:
    dtype = factor_dtype(layer_state["input_factor"].dtype)
    A, G = input_factor(layer_state, block.layer, dtype), grad_output_factor(layer_state, dtype)
    if block.layer.family.routed:
        assert isinstance(A, Tensor)
        assert isinstance(G, Tensor)
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
        G, A = product.grad_output_factor, product.input_factor
        if isinstance(A, Tensor) and isinstance(G, Tensor) and A.ndim == G.ndim == 3:
            pair = (G, A)
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
    stored = form.stored_dtype
    if isinstance(inverse, KroneckerProduct):
        A, G = inverse.input_factor, inverse.grad_output_factor
        entries = {INVERSES[0]: _kept_side(G, stored, A.shape[-1])}
        if isinstance(A, SplitInverse):
            A = A.rounded(stored or A.dtype)
            entries |= {INVERSES[1]: kept_once(A.blocks, G.shape[-1]), INPUT_UPDATE: A.update}
        else:
            entries[INVERSES[1]] = _kept_side(A, stored, G.shape[-1])
    else:
        bases = (inverse.grad_output_basis, inverse.input_basis)
        entries = _basis_entries(bases, stored)
        entries["inverse_eigenvalues"] = inverse.eigenvalues.to(stored or inverse.dtype)
    _forget(state, INVERSE_KEYS)
    state.update(entries)


def _kept_side(inverse: Factor, stored: torch.dtype | None, columns: int) -> Tensor:
    """Return what is kept of a side's inverse; S − V Vᵀ is not positive if V is rounded."""
    if isinstance(inverse, LowRankInverse):
        return inverse.packed
    assert isinstance(inverse, Tensor)
    return kept_once(inverse.to(stored or inverse.dtype), columns)


def _basis_entries(bases: Bases, stored: torch.dtype | None) -> dict[str, Tensor]:
    """Return what a state keeps of bases."""
    entries: dict[str, Tensor | None] = dict.fromkeys(BASES)
    entries[BASES[0]], basis = bases
    if isinstance(basis, SplitBasis):
        entries |= {BASES[1]: basis.channels, POSITION_BASIS: basis.positions}
    else:
        entries[BASES[1]] = basis
    return {key: q.to(stored or q.dtype) for key, q in entries.items() if q is not None}


def _refresh_bases(
    state: State, layer_state: State, product: KroneckerProduct, form: InverseForm
) -> None:
    """Follow the factors with the eigenbases, and the bases with the second moments.

    Before there are second moments, K-FAC's eigenvalues stand for them, with the weight 0.
    """
    sides = (product.grad_output_factor, product.input_factor)
    old, stored = bases_of(state), layer_state["input_factor"].dtype
    known = (None, None) if old is None else old
    new: list[Any] = []
    levels: list[Levels] = []
    for side, basis, own in zip(sides, known, levels_in(state), strict=True):
        found, of_found = refreshed_basis(side, basis, own, BASIS_TOLERANCE, stored)
        if found is not None and found is not basis and form.stored_dtype is not None:
            found = found.to(form.stored_dtype)
        new.append(found)
        levels.append(of_found)
    bases: Bases = (new[0], new[1])
    if old is not None:
        moments = rotated_eigenvalues(state["second_moments"].to(product.dtype), old, bases)
        state["second_moments"] = averaged(moments, (levels[0], levels[1])).to(stored)
    else:
        quotients = [rayleigh_quotients(f, q) for f, q in zip(sides, bases, strict=True)]
        eigenvalues = quotients[0].unsqueeze(-1) * quotients[1].unsqueeze(-2)
        state["second_moments"] = eigenvalues.to(stored)
        state["second_moment_weight"] = torch.zeros_like(layer_state["factor_weight"])
    _forget(state, (*INVERSE_SIDES, *LEVELS))
    state.update(_basis_entries(bases, None))
    state.update(zip(LEVELS[:1], levels[0], strict=False))
    state.update(zip(LEVELS[1:], levels[1], strict=False))


def levels_in(state: State) -> tuple[Levels, Levels]:
    """Return the levels of a block's bases; nothing where an earlier version's state has none."""
    sides = (LEVELS[:1], LEVELS[1:])
    of_g, of_a = (tuple(state[key] for key in keys if key in state) for keys in sides)
    return of_g, of_a


def averaged_moments(state: State, value: Tensor) -> Tensor:
    """Return second moments in a block's bases, averaged where rounding alone chose these."""
    return averaged(value, levels_in(state), look=is_free_to_read(value))


def columns_beside(entries: Mapping[str, Any], name: str) -> int:
    """Return with how many columns one side's inverse is multiplied: the other side's width."""
    if name == INVERSES[0] and INPUT_UPDATE in entries:
        return int(entries[INPUT_UPDATE].shape[-1]) - 1
    other = entries[INVERSES[1 if name == INVERSES[0] else 0]]
    return whole_shape(tuple(other.shape))[-1]


def has_inverse(state: State) -> bool:
    """Tell whether a block's state has what a damped inverse is made of."""
    if state.get("inverse_step") == NO_INVERSE:
        return False
    return any(key in state for key in ("input_inverse", "inverse_eigenvalues", "second_moments"))


def inverse_of(
    state: State, damping: float, workspace: Workspace | None = None
) -> KroneckerMatrix | KeptProduct | None:
    """Return a block's damped inverse from its state, or `None` if there is none yet.

    Args:
        state: The optimizer's state of the block's anchor parameter.
        damping: δ, which EKFAC adds to its second moments here; K-FAC's inverse has it inside.
        workspace: Where what is kept once is written out, for a product at a time.
    """
    if not has_inverse(state):
        return None
    if "input_inverse" in state:
        G, A = (state[name] for name in INVERSES)
        if INPUT_UPDATE not in state:
            return KeptProduct(G, A, workspace)
        A = inverse_side(A)
        joint = state[INPUT_UPDATE].shape[-1] > A.shape[1] * A.shape[2] + 1
        assert isinstance(A, Tensor)
        return KroneckerProduct(inverse_side(G), SplitInverse(A, state[INPUT_UPDATE], joint))
    if "second_moments" in state:
        moments = state["second_moments"]
        eigenvalues = (moments.to(factor_dtype(moments.dtype)) + damping).reciprocal()
    else:
        eigenvalues = state["inverse_eigenvalues"]
    return KroneckerEigendecomposition(*_kept_bases(state), eigenvalues)
