"""Arguments of torch's optimizers that K-FAC has none of: what to do instead, said in an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# In the constructor these names raise whatever they are, in a group unless they are off.
FOREIGN = {
    "betas": "momentum= is what AdamW's first one is, and ema_decay= how curvature is averaged",
    "eps": "damping= is what is added to the curvature, and it is larger",
    "amsgrad": "there is no such variant",
    "fused": "foreach=None, the default, takes fused kernels where torch has them",
    "dampening": "momentum is not dampened, and nesterov=True is the default",
    "decoupled_weight_decay": "weight_decay= is decoupled always",
}


def refuse_foreign(init: Callable[P, R]) -> Callable[P, R]:
    """Wrap a constructor so that arguments of other optimizers raise a `TypeError` with advice.

    Others that it does not have raise Python's own: nothing is swallowed.
    """

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        found = [name for name in FOREIGN if name in kwargs]
        if found:
            raise TypeError(f"KFACOptimizer: {advice(found)}.")
        return init(*args, **kwargs)

    return checked


def foreign_in(group: Mapping[str, Any]) -> list[str]:
    """Return which of these names a parameter group sets."""
    return [name for name in FOREIGN if group.get(name) not in (None, False)]


def advice(names: list[str]) -> str:
    """Return what to do about such names."""
    return "; ".join(f"K-FAC has no {name}: leave it out ({FOREIGN[name]})" for name in names)
