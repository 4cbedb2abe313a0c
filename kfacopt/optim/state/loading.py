"""Load a state dict that is checked first; what is checked is in `checks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer

from kfacopt.optim.state.conversions import restore_dtypes


def load_checked(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    check: Callable[[Any], None],
) -> None:
    """Load what the hooks of `register_load_state_dict_pre_hook` make of a state, once checked.

    Args:
        optimizer: The optimizer.
        load: Its base class's `load_state_dict`.
        state_dict: The state.
        check: Raises for a state that cannot be loaded.
    """
    if not isinstance(state_dict, dict):
        check(state_dict)  # raises, before hooks meet it
    checked: list[dict[str, Any]] = []

    def check_hooked(_: Optimizer, hooked: dict[str, Any]) -> None:
        check(hooked)
        checked.append(hooked)

    def restore(_: Optimizer) -> None:
        restore_dtypes(optimizer.state, optimizer.param_groups, checked[0])

    # After all hooks that adapt the dictionary, and before those that look at the result.
    own = [
        optimizer.register_load_state_dict_pre_hook(check_hooked),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        load(state_dict)
    finally:
        for handle in own:
            handle.remove()
