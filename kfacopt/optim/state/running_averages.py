"""A layer's running factors and second moments; a single step's sums are in `statistics`."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from kfacopt.kfac.factor_forms import FactorForm
from kfacopt.kfac.factors import along, factor_dtype, fold
from kfacopt.kfac.layers import Layer
from kfacopt.linalg.kronecker import diagonal_of
from kfacopt.linalg.low_rank import LowRankFactor, is_low_rank
from kfacopt.linalg.split_factors import Factor, Side, SplitFactor, packed_rest, unpacked
from kfacopt.linalg.triangles import kept_once, kept_shape, symmetric
from kfacopt.optim.statistics.moments import Moments

State = dict[str, Any]  # of one parameter
States = MutableMapping[Tensor, Any]

FACTORS = ("input_factor", "grad_output_factor")

# What else is kept of an A by channels and positions, beside the moment of the channels.
REST = "input_moments"

# What is known of a layer's factors: their total weight, how many updates were tried, how many of
# these were skipped as not finite, and the step of the last that was not.
RECORDS = ("factor_weight", "factor_updates", "skipped_updates", "factor_step")


def factor_shapes(layer: Layer, form: FactorForm) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's running factors by their key in the state."""
    shapes = {name: kept_shape(x) for name, x in zip(FACTORS, form.shapes(layer), strict=True)}
    if layer.positions:
        B, C, K = layer.groups, layer.channels, layer.positions
        shapes |= {FACTORS[0]: kept_shape((B, C, C)), REST: (B, packed_rest(C, K))}
    return shapes


def grad_output_factor(state: State, dtype: torch.dtype) -> Side:
    """Return a layer's G from its state, in a dtype."""
    return _one_side(state[FACTORS[1]].to(dtype))


def _one_side(kept: Tensor) -> Side:
    return LowRankFactor(kept) if is_low_rank(kept) else symmetric(kept)


def input_factor(state: State, layer: Layer, dtype: torch.dtype) -> Factor:
    """Return a layer's A from its state, in a dtype."""
    A = _one_side(state[FACTORS[0]].to(dtype))
    if not layer.positions:
        return A
    assert isinstance(A, Tensor)
    return SplitFactor.of(A, state[REST].to(dtype), layer.joint)


def initialise_factors(state: State, layer: Layer, form: FactorForm) -> None:
    """Give a layer's state empty running factors if it has none.

    Their shapes follow from the parameters, as `torch.distributed.checkpoint` needs it.
    """
    if "factor_weight" in state:
        return
    dtype, device = factor_dtype(layer.anchor.dtype), layer.anchor.device
    ranks = dict(zip(FACTORS, layer.ranks, strict=True))
    for name, shape in factor_shapes(layer, form).items():
        wide = name == REST or ranks[name] > 0
        stored = dtype if wide else form.stored_dtype or dtype
        state[name] = torch.zeros(shape, dtype=stored, device=device)
    state["factor_weight"] = torch.zeros(form.count_shape(layer), dtype=dtype, device=device)
    state["factor_updates"] = 0
    for name in ("skipped_updates", "factor_step"):
        state[name] = torch.zeros((), dtype=torch.int64, device=device)


def has_weight(state: State) -> bool:
    """Tell whether any statistics are in a layer's running factors."""
    weight = state.get("factor_weight")
    return weight is not None and bool((weight > 0).any())


def is_free_to_read(value: Tensor) -> bool:
    """Tell whether Python may look at a value without waiting for a device."""
    return value.device.type == "cpu"


def _fold_finite(
    state: State,
    weight_key: str,
    values: dict[str, Tensor],
    checked: Iterable[Tensor],
    terms: Tensor | float,
    ema_decay: float,
) -> Tensor:
    """Move running averages of one weight to include new values, if what is checked is finite.

    A GPU is not waited for: values that are not finite get the weight 0 there.

    Args:
        state: Has the averages and the weight.
        weight_key: The key of the weight.
        values: The new values by the keys of the averages.
        checked: What has to be finite.
        terms: The weight of the values, one for each group where the total has so many.
        ema_decay: The decay of the total.

    Returns:
        Whether they were included, on the device; for each group where these have own weights.
    """
    total = state[weight_key]
    weight = torch.as_tensor(terms).to(total)
    finite = weight.isfinite() & (weight > 0)
    for value in checked:
        finite = finite & value.isfinite().all()
    weight = torch.where(finite, weight, 0.0)
    total.copy_(torch.where(finite, ema_decay * total + weight, total))
    safe_total = torch.where(total > 0, total, 1.0)
    known = is_free_to_read(finite)
    if known and not bool(finite.any()):
        return finite
    for name, value in values.items():
        safe = value if known else torch.where(along(finite, value), value, state[name])
        fold(state[name], safe, weight, safe_total)
    return finite


def fold_factors(
    state: State, layer: Layer, moments: Moments, form: FactorForm, ema_decay: float, step: int
) -> None:
    """Move a layer's running factors to include new statistics, unless these are not finite.

    Args:
        state: The optimizer's state of the layer's anchor parameter.
        layer: The layer.
        moments: The statistics of this step.
        form: How factors are formed.
        ema_decay: The decay of earlier statistics; a step's weight is its number of terms, that of
            a group of its own its number of inputs, so that one without any stays as it is.
        step: The number of the step, to be remembered.
    """
    initialise_factors(state, layer, form)
    values = dict(zip(FACTORS, moments.take_factors(), strict=True))
    if layer.positions:
        channels, rest = unpacked(values[FACTORS[0]], layer.positions)
        values |= {FACTORS[0]: channels, REST: rest}
    # Sums of squares: |Σ x_i x_j|² ≤ Σ x_i² Σ x_j², so that the diagonals tell.
    checked = [x[..., -1] if is_low_rank(x) else diagonal_of(x) for x in values.values()]
    values |= {name: kept_once(values[name]) for name in FACTORS}
    weight = moments.rows if layer.family.routed else moments.terms
    folded = _fold_finite(state, "factor_weight", values, checked, weight, ema_decay).any()
    state["factor_updates"] += 1
    state["skipped_updates"] += ~folded
    state["factor_step"].copy_(torch.where(folded, step, state["factor_step"]))


def fold_second_moments(
    state: State, value: Tensor, weight: Tensor | float, ema_decay: float
) -> None:
    """Move a block's second moments in its eigenbasis to include new ones, if these are finite.

    Args:
        state: The optimizer's state of the block's anchor parameter.
        value: Λ `[B, d_out, d_in]`, in the basis that the state has.
        weight: The number of terms of the loss that it stems from, or of each group's inputs.
        ema_decay: The decay of earlier ones.
    """
    values = {"second_moments": value}
    _fold_finite(state, "second_moment_weight", values, [value], weight, ema_decay)
