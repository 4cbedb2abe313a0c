"""The modules that a function runs, and those that own parameters; not what they compute."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

# A search through what functions refer to ends there.
_MAX_ENTRIES = 10_000

# What functions of these packages refer to holds nobody's modules.
_FOREIGN = frozenset({"torch", "numpy", "builtins"})


def living_modules() -> list[nn.Module]:
    """Return all modules that are alive in the process."""
    # `type(o)` instead of `isinstance(o, ...)`: the latter asks `o.__class__`, which wakes lazy
    # proxies all over the process. A module whose constructor failed has no parameters yet.
    found = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    return [m for m in found if {"_parameters", "_modules"} <= vars(m).keys()]


def modules_of(function: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules that a function refers to; itself, if it is one.

    Followed are bound methods, partials, closures, defaults, the globals that a function's code
    names, attributes of plain objects, and containers.

    Args:
        function: A module, or any other callable.
    """
    found: dict[int, nn.Module] = {}
    seen: dict[int, Any] = {}  # keeps what is made on the way, whose id would come again
    stack: list[Any] = [function]
    while stack and len(seen) < _MAX_ENTRIES:
        x = stack.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        if isinstance(x, nn.Module):
            found[id(x)] = x
        else:
            stack.extend(_referred_by(x))
    return list(found.values())


def _referred_by(x: Any) -> Iterator[Any]:
    if isinstance(x, MethodType):
        yield from (x.__self__, x.__func__)
    elif isinstance(x, partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, FunctionType):
        if (x.__module__ or "").partition(".")[0] not in _FOREIGN:
            yield from _referred_by_function(x)
    elif isinstance(x, Mapping):
        yield from x.values()
    elif isinstance(x, list | tuple | set | frozenset):
        yield from x
    elif not isinstance(x, type | ModuleType | Tensor | str | bytes):
        yield from getattr(x, "__dict__", {}).values()
        yield from _slots(x)
        if callable(x) and isinstance(type(x).__call__, FunctionType):
            yield type(x).__call__


def _slots(x: Any) -> Iterator[Any]:
    for base in type(x).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(x, name):
                yield getattr(x, name)


def _referred_by_function(x: FunctionType) -> Iterator[Any]:
    yield from (x.__defaults__ or (), x.__kwdefaults__ or {}, vars(x))
    yield from chain.from_iterable(map(_contents, x.__closure__ or ()))
    names = set(_names_in(x.__code__))
    for name in names & x.__globals__.keys():
        value = x.__globals__[name]
        if isinstance(value, ModuleType):  # `package.net(x)`
            yield from (v for key, v in vars(value).items() if key in names)
        else:
            yield value


def _contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def owners_of(params: Sequence[Tensor], modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the outermost modules that contain the owners of parameters."""
    wanted = {id(p) for p in params}
    modules = list(modules)
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for part in module._modules.values():
            parents.setdefault(id(part), []).append(module)
    unseen = [m for m in modules if any(id(p) in wanted for p in m._parameters.values())]
    hosts = {id(m): m for m in unseen}
    while unseen:
        for parent in parents.get(id(unseen.pop()), []):
            if id(parent) not in hosts:
                hosts[id(parent)] = parent
                unseen.append(parent)
    return [m for m in hosts.values() if id(m) not in parents]
