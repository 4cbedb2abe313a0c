"""The layers of the parameters that K-FAC's operators are given; factors are not formed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.nn import Parameter

from kfacopt import argument_checks
from kfacopt.data import Batch, evaluation
from kfacopt.kfac.capture import capture
from kfacopt.kfac.data_axes import DataAxes
from kfacopt.kfac.layers import Layer, all_kinds, described, find_layers
from kfacopt.kfac.layers.embedding import Embedding
from kfacopt.kfac.matrix_layouts import MatrixLayout
from kfacopt.kfac.unrolled import unrolled
from kfacopt.kfac.unseen_uses import edges_of, past_modules

LayersWithModules = list[tuple[Layer, list[nn.Module]]]


def parameters_of(layers: LayersWithModules) -> dict[Parameter, Layer]:
    """Return the layer of each parameter that is in one."""
    return {p: la for la, _ in layers for p in (la.weight, la.bias) if p is not None}


def layers_of(
    model: nn.Module,
    params: Sequence[Parameter],
    separate: bool,
    batches: Callable[[], Iterable[Batch]],
) -> LayersWithModules:
    """Return the layers of parameters.

    Where there are matrices that are in no module of a known kind, products with them are looked
    for in the model's graph, batch by batch until all are found.

    Args:
        model: The model.
        params: The parameters.
        separate: Whether W and b have blocks of their own.
        batches: Makes an iterator over the data.

    Raises:
        ValueError: If a parameter is none of the model's, or is not trained.
        NotImplementedError: If a parameter is in no layer.
    """
    layers = find_layers(model.named_modules(), params, separate)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    for i, p in enumerate(params):
        if not p.requires_grad:
            raise ValueError(f"params[{i}] ({names.get(id(p))}) does not require gradients.")
        if id(p) not in names:
            raise ValueError(f"params[{i}] is not a parameter of model_func.")
    free = [p for p in params if p not in parameters_of(layers)]
    others = [p for p in free if p.is_floating_point() and p.numel()]
    looks = others or any(type(layer.family) is Embedding for layer, _ in layers)
    found = _find_products(model, layers, others, batches) if looks else {}
    if any(p in parameters_of(layers) for p in found):  # embeddings that are heads, too
        untied = [p for p in params if p not in found or not found[p].is_tied]
        layers = find_layers(model.named_modules(), untied, separate)
        free = [p for p in params if p not in parameters_of(layers)]
    left = set(free)
    for p, layout in found.items():
        layer = layout.layer(names[id(p)], p, layout.bias in left, separate)
        left -= {p, layer.bias}
        layers.append((layer, []))
    for p in free:
        if p in left:
            raise NotImplementedError(
                f"params: {names[id(p)]!r} is in an unsupported layer; K-FAC knows "
                f"{described(all_kinds())}, and products with matrices. Leave it out of params."
            )
    return layers


def _find_products(
    model: nn.Module,
    layers: LayersWithModules,
    free: Sequence[Parameter],
    batches: Callable[[], Iterable[Batch]],
) -> dict[Parameter, MatrixLayout]:
    """Return the layouts of parameters that products, or sums and products by entry, alone use."""
    found: dict[Parameter, MatrixLayout] = {}
    axes = DataAxes()
    wanted = {p for p in free if p.ndim > 1}
    owners = [m for m in model.modules() if not wanted.isdisjoint(m._parameters.values())]
    with evaluation(model):
        for X, _ in batches():
            with capture(layers) as uses, unrolled(owners):
                output = argument_checks.checked_output(model(X))
            left = [p for p in free if p not in found]
            given = (parameters_of(layers), left, (axes, [output]))
            found |= past_modules(edges_of(output), uses, *given).found
            biases = {layout.bias for layout in found.values()}
            if all(p in found or p in biases for p in free):
                break
    return found


def refuse_tied(layers: LayersWithModules) -> None:
    """Raise for weights that are looked up and multiplied.

    Raises:
        NotImplementedError: It names them.
    """
    names = ", ".join(repr(layer.name) for layer, _ in layers if layer.parts)
    if names:
        raise NotImplementedError(
            f"params: {names} is an embedding tied to a head, which EKFAC does not cover; "
            "KFACLinearOperator does. Leave it out of params."
        )
