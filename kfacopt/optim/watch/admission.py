"""Which parameters an optimizer can be made for; of models that change later, see `sharding`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from kfacopt.optim.watch.sharding import refuse_sharded, refuse_shared_optimizer


def check_iterable(params: Any) -> None:
    """Raise unless `params` can hold parameters or groups."""
    listed = hasattr(params, "__iter__") and not isinstance(params, nn.Module | Tensor)
    if not (listed or isinstance(params, nn.ParameterList)):
        raise ValueError(
            "params must be an iterable of parameters or groups, as model.parameters(), got "
            f"{type(params).__name__}."
        )


def check_parameters(params: Sequence[Parameter]) -> None:
    """Raise if a parameter has no values of its own on this rank.

    Args:
        params: The parameters of a group.

    Raises:
        ValueError: It says what to do instead.
    """
    if any(is_lazy(p) for p in params):
        raise ValueError(
            "params: a parameter is not initialized yet (nn.Lazy...); run a forward pass of "
            "the model before making the optimizer."
        )
    refuse_sharded(params)
    refuse_shared_optimizer()
    if any(p.is_meta for p in params):
        raise ValueError(
            "params: a parameter is on the meta device, without values; give the model its "
            "values (to_empty, then load or initialize) before making the optimizer, which "
            "would go on with the old parameters."
        )
