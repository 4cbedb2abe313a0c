"""What parameter groups may be set to, by whom and when; the table is in `settings`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kfacopt.argument_checks import check_flag, check_range
from kfacopt.optim.settings import GROUP_SETTINGS, WHOLE_SETTINGS, as_number

# Flags of torch.optim that a group may have, but not set.
_UNSUPPORTED_FLAGS = ("capturable", "differentiable", "fused")
_NUMBERS = ("lr", "momentum", "weight_decay", "damping", "fallback_lr")


@contextmanager
def numbers_alone(groups: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Let settings be plain numbers for a while, also those that are tensors."""
    replaced = []
    for group in groups:
        for name in _NUMBERS:
            value = group[name]
            if type(value) is not float:
                number = group[name] = as_number(value)
                replaced.append((group, name, value, number))
    try:
        yield
    finally:
        for group, name, value, number in replaced:
            if group[name] is number:  # else the step has adapted it
                group[name] = value


def settings_of(groups: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what groups may set, to see whether it has changed."""
    values = ([group.get(name) for name in GROUP_SETTINGS] for group in groups)
    # Tensors that are no numbers cannot be compared.
    return [tuple(str(x) if isinstance(x, Tensor) else x for x in own) for own in values]


def check_group(group: Mapping[str, Any], where: str = "", tuned: bool = False) -> None:
    """Raise unless a parameter group has all settings, each in its range.

    Args:
        group: The group; keys of others (`name`, what schedulers keep) are let be.
        where: What errors put before a setting's name.
        tuned: Whether steps tune themselves.

    Raises:
        ValueError: Names the setting.
    """
    missing = [name for name in (*GROUP_SETTINGS, "base_lr", "num_steps") if name not in group]
    if missing:
        raise ValueError(
            f"{where}lacks {missing}; it is not that of a KFACOptimizer of this version."
        )
    whole = [name for name in WHOLE_SETTINGS if name not in _UNSUPPORTED_FLAGS]
    strange = [name for name in whole if name in group]
    strange += [name for name in _UNSUPPORTED_FLAGS if group.get(name)]
    if strange:
        raise ValueError(
            f"{where}{', '.join(strange)} cannot be set for a group; groups may set "
            f"{tuple(GROUP_SETTINGS)}."
        )
    for name, check in (*GROUP_SETTINGS.items(), ("base_lr", GROUP_SETTINGS["lr"])):
        check(f"{where}{name}", group[name])
    check_range(f"{where}trust_region", group.get("trust_region", 1.0), 0, lower_open=True)
    check_flag(f"{where}searched", group.get("searched", False))
    steps = group["num_steps"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"{where}num_steps must be an integer of at least 0, got {steps!r}.")
    if tuned and group["maximize"]:
        raise ValueError('maximize must be False for lr="auto", which models the loss it sees.')
