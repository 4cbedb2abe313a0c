"""Which modules of a model are layers, and of which parameters; not how a layer computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from kfacopt.kfac.layers.blocks import Layer
from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.registry import Kinds, all_kinds, families_of


def find_layers(
    named_modules: Iterable[tuple[str, nn.Module]],
    params: Iterable[nn.Parameter],
    separate_weight_and_bias: bool,
    kinds: Kinds | None = None,
) -> list[tuple[Layer, list[nn.Module]]]:
    """Find the supported layers that own any of the parameters.

    Modules that share their weight (and bias) are one layer. Where some of them lack its bias,
    blocks of W and b have no G in common: they are two layers. A bias that a module does not share
    with the module of the same weight has no layer, nor has a parameter that a module of another
    kind owns too (an embedding tied to a linear layer), or one that requires no gradient, is
    complex, or has no entries.

    Args:
        named_modules: Candidate modules with their names.
        params: The parameters to look for.
        separate_weight_and_bias: Whether W and b get blocks of their own.
        kinds: Which kinds of modules are layers; by default all that are known.

    Returns:
        Each layer with the modules that call it, in the order of the modules.
    """
    chosen = all_kinds() if kinds is None else kinds
    candidates = [
        (name, module, families_of(module) if isinstance(module, chosen) else [])
        for name, module in named_modules
    ]
    own = [p for p in params if p.requires_grad and p.is_floating_point() and p.numel()]
    wanted = {id(p) for p in own} - _used_in_several_ways(candidates)
    layers: dict[int, tuple[Layer, list[nn.Module]]] = {}
    for name, module, families in candidates:
        for family in families:
            weight, bias = (
                p if p is not None and id(p) in wanted else None for p in _matrix_of(module, family)
            )
            anchor = weight if weight is not None else bias
            if anchor is None:
                continue
            if id(anchor) in layers:
                modules = layers[id(anchor)][1]
                if all(module is not m for m in modules):
                    modules.append(module)
                continue
            joint = not separate_weight_and_bias and weight is not None and bias is not None
            own_name = name if len(families) == 1 else _parameter_name(name, module, anchor)
            layer = Layer(own_name, weight, bias, family.groups(module), joint, family)
            layers[id(anchor)] = (layer, [module])
    found = list(layers.values())
    return [own for layer, modules in found for own in _apart(layer, modules)]


def _apart(layer: Layer, modules: list[nn.Module]) -> list[tuple[Layer, list[nn.Module]]]:
    """Return a layer, or one each of W and of b where both have blocks and modules lack b."""
    family, bias = layer.family, layer.bias
    if layer.joint or layer.weight is None or bias is None:
        return [(layer, modules)]
    adding = [m for m in modules if _matrix_of(m, family)[1] is bias]
    if len(adding) == len(modules):
        return [(layer, modules)]
    prefix = f"{layer.name}." if layer.name else ""
    weight_name, bias_name = f"{prefix}{family.weight_name}", f"{prefix}{family.bias_name}"
    return [
        (replace(layer, name=weight_name, bias=None), modules),
        (replace(layer, name=bias_name, weight=None), adding),
    ]


def _matrix_of(module: nn.Module, family: LayerFamily) -> list[nn.Parameter | None]:
    """Return a module's W and b of a family."""
    names = (family.weight_name, family.bias_name)
    return [None if name is None else module._parameters.get(name) for name in names]


def _parameter_name(module_name: str, module: nn.Module, parameter: nn.Parameter) -> str:
    key = next(name for name, p in module._parameters.items() if p is parameter)
    return f"{module_name}.{key}" if module_name else key


def _used_in_several_ways(
    candidates: Iterable[tuple[str, nn.Module, list[LayerFamily]]],
) -> set[int]:
    """Return the `id`s of parameters of which modules make other matrices, or none that is known.

    For instance that of an embedding that is a linear layer's, too.
    """
    found: set[int] = set()
    ways: dict[int, tuple[LayerFamily, int, int | None]] = {}
    for _, module, families in candidates:
        if isinstance(module, nn.ParameterList | nn.ParameterDict):
            continue  # they use none
        known: set[int] = set()
        for family in families:
            weight, _ = own = _matrix_of(module, family)
            for p, partner in zip(own, (None, id(weight)), strict=True):
                if p is not None:  # a bias with two weights would have two factors
                    way = (family, family.groups(module), partner)
                    known.add(id(p))
                    if ways.setdefault(id(p), way) != way:
                        found.add(id(p))
        found |= {id(p) for p in module._parameters.values()} - known
    return found
