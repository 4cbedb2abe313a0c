"""From parameters to the modules that own them; which of them are layers is found in `kfac`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn import Parameter

from kfacopt.kfac.layers import is_supported
from kfacopt.module_search import living_modules


def find_modules(
    params: Sequence[Parameter], model: nn.Module | None
) -> list[tuple[str, nn.Module]]:
    """Find, with their names, the modules that own any of the parameters or contain such a module.

    Args:
        params: The parameters.
        model: Where to look. `None` looks at every module that is alive in the process, once.

    Returns:
        `(name, module)`, containers before their contents. Names are relative to the outermost
        module, the shortest one where there are several.

    Raises:
        ValueError: If no module owns any of the parameters, or layers outside the model own some.
    """
    found = living_modules() if model is None else model.modules()
    modules = [m for m in found if not _is_compiled(m)]
    wanted = {id(p) for p in params}
    hosts = {id(m): m for m in modules if any(id(p) in wanted for p in m._parameters.values())}
    if not hosts:
        where = "alive in this process" if model is None else "in model"
        raise ValueError(
            f"params: no nn.Module {where} owns any of the {len(params)} parameters. Give the "
            "parameters of a model, or say with model= where they are."
        )
    if model is not None:
        _refuse_strangers(params, hosts.values())
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for part in module._modules.values():
            # A wrapper has no hooks, but what contains it contains the module in it.
            child = part._orig_mod if part is not None and _is_compiled(part) else part
            parents.setdefault(id(child), []).append(module)
    unseen = list(hosts.values())
    while unseen:
        for parent in parents.get(id(unseen.pop()), []):
            if id(parent) not in hosts:
                hosts[id(parent)] = parent
                unseen.append(parent)
    roots = [m for m in hosts.values() if not parents.get(id(m))]
    return _named(roots, hosts)


def _refuse_strangers(params: Sequence[Parameter], hosts: Iterable[nn.Module]) -> None:
    """Raise if a layer outside the model owns parameters that the model does not have.

    They would be trained by AdamW, where the layer would have factors if its module were known.
    """
    owned = {id(p) for host in hosts for p in host._parameters.values()}
    missing = {id(p) for p in params if p.requires_grad} - owned
    if not missing:
        return
    owners = {
        f"{type(m).__name__}.{name} {tuple(p.shape)}"
        for m in living_modules()
        if is_supported(m)
        for name, p in m._parameters.items()
        if p is not None and id(p) in missing
    }
    if owners:
        raise ValueError(
            f"params: {', '.join(sorted(owners))} are in layers outside of the model that model= "
            "names. Give a module that contains all layers, or leave model= out."
        )


def _is_compiled(module: nn.Module) -> bool:
    """Tell a `torch.compile` wrapper, whose hooks would be traced with the inner module's."""
    return type(module).__name__ == "OptimizedModule"


def _named(roots: Iterable[nn.Module], hosts: dict[int, nn.Module]) -> list[tuple[str, nn.Module]]:
    names: dict[int, str] = {}
    for root in roots:
        for name, module in root.named_modules():
            if id(module) not in hosts:
                continue
            known = names.setdefault(id(module), name)
            if len(name) < len(known):
                names[id(module)] = name
    return [(name, hosts[key]) for key, name in names.items()]


def parameter_names(
    named_modules: Iterable[tuple[str, nn.Module]], params: Sequence[Parameter]
) -> dict[int, str]:
    """Return a name for each parameter, by its `id`; a number and shape where no module owns it."""
    names: dict[int, str] = {}
    for module_name, module in named_modules:
        for key, p in module._parameters.items():
            if p is not None:
                names.setdefault(id(p), f"{module_name}.{key}" if module_name else key)
    return {
        id(p): names.get(id(p), f"parameter {i} of shape {tuple(p.shape)} (in no module)")
        for i, p in enumerate(params)
    }
