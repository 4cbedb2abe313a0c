"""Calls of modules with other tensors in the place of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    module: nn.Module, values: Mapping[int, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a module with other tensors in the place of parameters and buffers.

    `torch.func.functional_call` is given every module once, under one name: of a module that has
    two, it would leave the other tensors in the module at the end (torch 2.13).

    Args:
        module: The module.
        values: For the `id` of one of its tensors what takes its place, wherever it is used.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    own = {
        f"{path}.{name}" if path else name: values[id(x)]
        for path, part in module.named_modules()
        for place in (part._parameters, part._buffers)
        for name, x in place.items()
        if x is not None and id(x) in values
    }
    return functional_call(module, own, tuple(args), dict(kwargs), tie_weights=False)
