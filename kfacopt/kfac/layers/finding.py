"""Which modules of a model are layers, and of which parameters; not how a layer computes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from kfacopt.kfac.layers.blocks import Layer
from kfacopt.kfac.layers.registry import family_of, is_supported


def find_layers(
    named_modules: Iterable[tuple[str, nn.Module]],
    params: Iterable[nn.Parameter],
    separate_weight_and_bias: bool,
) -> list[tuple[Layer, list[nn.Module]]]:
    """Find the supported layers that own any of the parameters.

    Modules that share their weight (and bias) are one layer. A bias that a module does not share
    with the module of the same weight has no layer, nor has a parameter that a module of another
    kind owns too (an embedding tied to a linear layer), or one that requires no gradient, is
    complex, or has no entries.

    Args:
        named_modules: Candidate modules with their names.
        params: The parameters to look for.
        separate_weight_and_bias: Whether W and b get blocks of their own.

    Returns:
        Each layer with the modules that call it, in the order of the modules.
    """
    modules_by_name = list(named_modules)
    own = [p for p in params if p.requires_grad and p.is_floating_point() and p.numel()]
    wanted = {id(p) for p in own}
    for _, module in modules_by_name:
        # Tied to a supported layer, for instance an embedding; but a list of parameters uses none.
        if not (is_supported(module) or isinstance(module, nn.ParameterList | nn.ParameterDict)):
            wanted -= {id(p) for p in module._parameters.values()}
    layers: dict[int, tuple[Layer, list[nn.Module]]] = {}
    for name, module in modules_by_name:
        if not is_supported(module):
            continue
        weight, bias = (
            p if p is not None and id(p) in wanted else None
            for p in (module._parameters.get("weight"), module._parameters.get("bias"))
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
        family = family_of(module)
        layer = Layer(name, weight, bias, family.groups(module), joint, family)
        layers[id(anchor)] = (layer, [module])
    return list(layers.values())
