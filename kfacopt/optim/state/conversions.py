"""What `torch.optim.Optimizer` loses of dtypes, devices and generators; no value is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor

from kfacopt.kfac.factors import factor_dtype
from kfacopt.kfac.layers import Layer
from kfacopt.linalg.low_rank import is_low_rank, was_in_float64
from kfacopt.linalg.triangles import kept_anew
from kfacopt.optim.settings import Groups, Settings
from kfacopt.optim.state.inverses import (
    INVERSE_KEYS,
    INVERSE_SIDES,
    INVERSES,
    columns_beside,
)
from kfacopt.optim.state.running_averages import FACTORS, RECORDS, REST, States

logger = logging.getLogger("kfacopt")

_GENERATOR = "generator_state"

# Kept in a dtype of their own, whatever that of the parameter.
_OWN_DTYPE = frozenset((*FACTORS, REST, *RECORDS, *INVERSE_KEYS))


def was_not_saved(value: Any) -> bool:
    """Tell the empty dict that `torch.distributed.checkpoint` makes of an entry that is missing."""
    return isinstance(value, dict) and not value


def restore_dtypes(states: States, param_groups: Groups, state_dict: dict[str, Any]) -> None:
    """Undo the cast of floating state to the parameter's dtype in `Optimizer.load_state_dict`."""
    saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
    params = chain.from_iterable(g["params"] for g in param_groups)
    for number, (key, p) in enumerate(zip(saved, params, strict=True)):
        if was_not_saved(state_dict["state"].get(key, {}).get("exp_avg")):
            logger.warning(
                "parameter %d had curvature and no moments of AdamW in the state that was loaded; "
                "here it was in no layer yet, so that its state starts anew. Make one step, of any "
                "data, before torch.distributed.checkpoint loads into the optimizer",
                number,
            )
        entries = state_dict["state"].get(key, {})
        usable = True
        for name, value in entries.items():
            if was_not_saved(value):
                states[p].pop(name, None)
            elif name in _OWN_DTYPE and isinstance(value, Tensor):
                own = value.detach().to(p.device, copy=True)
                if name in (*FACTORS, *INVERSES):  # another version may keep other parts
                    columns = columns_beside(entries, name) if name in INVERSES else None
                    own = own if is_low_rank(own) else kept_anew(own, columns)
                if name in INVERSES and is_low_rank(own):
                    usable = usable and not was_in_float64(own)
                states[p][name] = own
            elif name == _GENERATOR:
                states[p][name] = value.detach().to("cpu", copy=True)
        if not usable:  # as by `torch.distributed.checkpoint`; the next step makes a new inverse
            for name in INVERSE_KEYS:
                states[p].pop(name, None)


def store_generator(states: States, layers: Sequence[Layer], generator: Generator) -> None:
    """Put a generator's state into the first layer's: no other place is carried everywhere."""
    for state in states.values():
        state.pop(_GENERATOR, None)
    if layers:
        states[layers[0].anchor][_GENERATOR] = generator.get_state().clone()


def restore_generator(states: States, generator: Generator) -> None:
    """Set a generator to what `store_generator` put into the state, if it is there."""
    for state in states.values():
        if _GENERATOR in state:
            try:
                generator.set_state(state[_GENERATOR].to("cpu", torch.uint8))
            except RuntimeError:  # of another kind of device
                logger.warning(
                    "the state of the generator of labels was saved on another kind of device; "
                    "labels are drawn from the seed instead"
                )


def follow_parameters(states: States, settings: Settings) -> None:
    """Move the state to where its parameters are, after `model.to(...)`."""
    stored = settings.curvature.form.stored_dtype
    for p, state in states.items():
        own, device = factor_dtype(p.dtype), p.device
        for name, value in state.items():
            if name in (_GENERATOR, "step") or not isinstance(value, Tensor):
                continue
            dtype = value.dtype
            if name in (*FACTORS, *INVERSES) and is_low_rank(value):
                kept_wide = name in INVERSES and value.dtype == torch.float64
                dtype = value.dtype if kept_wide else own
            elif name in (*FACTORS, "second_moments"):
                dtype = stored or own
            elif name in INVERSE_SIDES:
                dtype = settings.inverse.stored_dtype or stored or own
            elif value.is_floating_point():
                dtype = own if name in _OWN_DTYPE else p.dtype
            state[name] = value.to(device, dtype)
