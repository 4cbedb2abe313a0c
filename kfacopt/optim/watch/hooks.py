"""Hooks that keep nothing alive and that copies do not carry; what they call is in `watch`."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter


class _Hook:
    """A weakly bound method."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        method = self._method()
        return None if method is None else method(*args)


# A module's hooks, and which of them have a property.
_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


class _Others:
    """The entries of a module's dictionary of hooks that are not ours.

    Copies, pickles and TorchScript shall get these alone: copies of a module are nobody's, a saved
    one must load where kfacopt is not installed, and a script cannot be made of our hooks.
    """

    def __init__(self, entries: OrderedDict[int, Any], hooks: OrderedDict[int, Any]) -> None:
        self._entries, self._hooks = weakref.ref(entries), weakref.ref(hooks)

    def items(self) -> list[tuple[int, Any]]:
        entries, hooks = self._entries(), self._hooks()
        if entries is None or hooks is None:
            return []
        own = {key for key, hook in hooks.items() if isinstance(hook, _Hook)}
        return [(key, value) for key, value in entries.items() if key not in own]

    def values(self) -> list[Any]:  # which TorchScript asks for, calls of the module for `items`
        return [value for _, value in self.items()]

    def __call__(self, protocol: Any) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())


class _ModuleHooks:
    """Our hooks on a module, hidden from all but its calls; a handle."""

    def __init__(
        self, module: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any] | None
    ) -> None:
        before = _Hook(enter)
        self._handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        if leave is not None:
            options: dict[str, Any] = {"prepend": True, "with_kwargs": True, "always_call": True}
            self._handles.append(module.register_forward_hook(_Hook(leave), **options))
        self._module = weakref.ref(module)
        _hide_hooks(module)

    def remove(self) -> None:
        remove_hooks(self._handles)
        module = self._module()
        if module is not None:
            _hide_hooks(module)


def _hide_hooks(module: nn.Module) -> None:
    """Hide our hooks on a module, if there are any."""
    for name, properties in _HOOKS.items():
        hooks = getattr(module, name)
        hidden = any(isinstance(hook, _Hook) for _, hook in hooks.items())
        for entries in (hooks, *(getattr(module, key) for key in properties)):
            # As attributes of the dictionary, which go before the methods of its class.
            others = _Others(entries, hooks)
            for key, method in (("__reduce_ex__", others), ("values", others.values)):
                if hidden:
                    vars(entries)[key] = method
                else:
                    vars(entries).pop(key, None)


def come_first(module: nn.Module) -> None:
    """Let our hooks behind a module's forward pass come before those of others.

    One that was registered later with `prepend=True` may have put another tensor in the place of
    the output: the layer's would not be seen.
    """
    hooks: Any = module._forward_hooks
    own = [key for key, hook in hooks.items() if isinstance(hook, _Hook)]
    if own and own[0] != next(iter(hooks)):
        for key in reversed(own):
            hooks.move_to_end(key, last=False)


def module_hooks(
    modules: Iterable[nn.Module],
    enter: Callable[..., Any],
    leave: Callable[..., Any] | None = None,
) -> list[Any]:
    """Call `enter` before and `leave`, if there is one, after the forward pass of modules.

    Args:
        modules: The modules; scripted ones take no hooks, and are left out.
        enter: A method of module, args, kwargs, which may return others of the last two.
        leave: A method of module, args, kwargs and output (`None` after an exception). It comes
            before hooks of the user's own, which may change the output.

    Returns:
        The handles.
    """
    plain = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    return [_ModuleHooks(module, enter, leave) for module in plain]


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
