"""Hooks that keep their owner alive no longer than others do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter


class _Hook:
    """A weakly bound method. A copied or unpickled module carries a dead one."""

    def __init__(self, method: Callable[..., Any] | None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        method = None if self._method is None else self._method()
        return None if method is None else method(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


def module_hooks(
    modules: Iterable[nn.Module], enter: Callable[..., Any], leave: Callable[..., Any]
) -> list[Any]:
    """Call `enter` before and `leave` after the forward pass of modules.

    Args:
        modules: The modules.
        enter: A method of module, args, kwargs.
        leave: A method of module, args, kwargs and output (`None` after an exception). It comes
            before hooks of the user's own, which may change the output.

    Returns:
        The handles.
    """
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(_Hook(enter), with_kwargs=True))
        after = module.register_forward_hook(
            _Hook(leave), prepend=True, with_kwargs=True, always_call=True
        )
        handles.append(after)
    return handles


def gradient_hooks(keys: Mapping[Parameter, Any], accumulated: Callable[[Any], None]) -> list[Any]:
    """Call a method, with a parameter's key, when its gradient has been accumulated.

    Args:
        keys: A key for each parameter.
        accumulated: The method.

    Returns:
        The handles.
    """
    method = weakref.WeakMethod(accumulated)

    def make(key: Any) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            alive = method()
            if alive is not None:
                alive(key)

        return hook

    return [p.register_post_accumulate_grad_hook(make(key)) for p, key in keys.items()]


def remove_hooks(handles: list[Any]) -> None:
    """Remove hooks and empty the list of their handles."""
    for handle in handles:
        handle.remove()
    handles.clear()
