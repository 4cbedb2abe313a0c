"""Parameters that are used past the calls of their modules; recorded uses are in `capture`.

A module's hook sees the calls of the module alone. `F.linear(x, layer.weight)`, `layer.forward(x)`,
a weight that is added to another one, and a derivative of the network by its input, whose backward
pass multiplies by the weights again, are paths from a parameter to the output past all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter
from torch.utils.checkpoint import CheckpointFunction

from kfacopt.kfac.added_biases import Parents
from kfacopt.kfac.added_tables import added_tables
from kfacopt.kfac.capture import LayerUse, WouldBePass, group_by_layer, would_be_pass
from kfacopt.kfac.data_axes import DataAxes
from kfacopt.kfac.factors import of_all_groups
from kfacopt.kfac.layers import Layer
from kfacopt.kfac.layers.entries import Entries
from kfacopt.kfac.lookup_uses import TIED
from kfacopt.kfac.matrix_layouts import MatrixLayout, as_layer_use, becomes_tied, fits
from kfacopt.kfac.matrix_products import MatrixUse
from kfacopt.kfac.matrix_uses import graph_parents, matrix_uses, operand_uses
from kfacopt.kfac.unknown_uses import reasons_against

# Sums of g aᵀ against autograd's, in units of round-off relative to the sums of |g| |a|ᵀ and to √n.
_ROUND_OFFS = 16


def unseen_parameters(
    outputs: Iterable[GradientEdge], uses: Iterable[LayerUse], params: Iterable[Parameter]
) -> list[Parameter]:
    """Return those of some parameters that outputs depend on past the recorded uses of layers.

    A walk through the graph, without a backward pass: at the output of a recorded use it goes on
    at the input of that use. Compiled code is one node, of which nobody can see what leads where:
    a parameter that it uses is returned, and `is_undercounted` tells.

    Args:
        outputs: Gradient edges, for instance of z, or of a loss.
        uses: The uses of layers that were recorded in these graphs.
        params: The parameters to look for.

    Returns:
        The parameters that were found, in the order of `params`.
    """
    return _leaves(_nodes_past(outputs, uses), params)


def _leaves(nodes: Iterable[Any], params: Iterable[Parameter]) -> list[Parameter]:
    found = {id(n.variable) for n in nodes if hasattr(n, "variable")}
    return [p for p in params if id(p) in found]


@dataclass(frozen=True)
class PastModules:
    """What a graph computes with parameters past the calls of modules.

    Attributes:
        uses: Products that are uses of layers.
        found: Matrices in no layer that products alone use, and how; and those of layers whose
            uses make them tied ones.
        rest: The parameters of layers that are used in ways that products do not explain.
        hidden: Matrices in no layer that are not in the graph, but may be in activation
            checkpointing with reentry, whose parts are not.
        reasons: Why parameters are none of these, as far as that was asked.
        tables: Those in no layer that are added to activations, or the like; see `added_tables`.
    """

    uses: list[LayerUse]
    found: dict[Parameter, MatrixLayout]
    rest: list[Parameter]
    hidden: list[Parameter]
    reasons: dict[Parameter, str]
    tables: list[Parameter]


def past_modules(
    outputs: Sequence[GradientEdge],
    uses: Sequence[LayerUse],
    layer_of: Mapping[Parameter, Layer],
    free: Iterable[Parameter],
    entries: tuple[DataAxes, Sequence[Tensor]] | None = None,
    unexplained: Iterable[Parameter] = (),
) -> PastModules:
    """Return what a graph computes with parameters past the calls of modules.

    Args:
        outputs: Gradient edges.
        uses: The uses of layers that were recorded in these graphs.
        layer_of: The parameters of layers.
        free: Matrices in no layer; vectors, too, where uses entry by entry are looked for.
        entries: Tells of these, with a tensor of the shape and dtype of each output's.
        unexplained: Those of them of which it shall be said why they are no layers, if so.
    """
    nodes = _nodes_past(outputs, uses)
    unseen = _leaves(nodes, [*layer_of, *free])
    biases = {la.bias for la in layer_of.values()}
    operands = operand_uses(nodes, [p for p in unseen if p in biases])
    further, found, explained = [], {}, set()
    own_uses = matrix_uses(nodes, unseen)
    if entries is not None:
        axes, values = entries
        left = _not_multiplied(unseen, own_uses, layer_of)
        products = [use for found_uses in own_uses.values() for use in found_uses]
        own_uses |= axes.uses_of(outputs, values, nodes, left, uses, products, layer_of)
    for p, own in own_uses.items():
        layer = layer_of.get(p)
        if layer is None:
            found[p] = MatrixLayout.of(own)
        elif layer.weight is p and becomes_tied(layer, own):
            found[p] = MatrixLayout(TIED, None)
            explained.add(p)
        elif layer.weight is p and all(fits(use, layer) for use in own):
            further += [as_layer_use(use, layer) for use in own]
            explained.add(p)
            adding = {use.edge.node for use in own if use.bias is layer.bias}
            if layer.bias is not None and operands.get(layer.bias) == len(adding):
                explained.add(layer.bias)
    passed = {use.edge.node for use in uses if not _leaves_weight(use)}  # by the walk
    for p in unseen:
        layer = layer_of.get(p)
        if layer is not None and layer.weight is None:
            calls = sum(
                use.layer is layer and _leaves_weight(use) and use.edge.node not in passed
                for use in uses
            )
            explained |= {p} if 0 < calls == operands.get(p) else set()
    rest = [p for p in unseen if p in layer_of and p not in explained]
    seen = {id(p) for p in unseen}
    hidden = [p for p in free if id(p) not in seen]
    hidden = hidden if hidden and any(map(_is_reentrant, nodes)) else []
    known = [use.edge.node for use in uses]
    known += [use.edge.node for own in own_uses.values() for use in own]
    tables = added_tables(nodes, [p for p in free if p.ndim > 1 and p not in found], known)
    asked = [p for p in unexplained if p not in found]
    if any(id(p) not in seen for p in asked):  # within recorded uses
        nodes = graph_parents(outputs, {})
    return PastModules(further, found, rest, hidden, reasons_against(nodes, asked), tables)


def _not_multiplied(
    params: Iterable[Parameter],
    products: Mapping[Parameter, Sequence[MatrixUse]],
    layer_of: Mapping[Parameter, Layer],
) -> list[Parameter]:
    """Return those of some parameters that no product has, and no layer but by their entries."""
    biases = {MatrixLayout.of(uses).bias for uses in products.values()}
    others = [p for p in params if p not in products and p not in biases]
    return [p for p in others if p not in layer_of or isinstance(layer_of[p].family, Entries)]


def _is_reentrant(node: Any) -> bool:
    return getattr(node, "_forward_cls", None) is CheckpointFunction


def _nodes_past(outputs: Iterable[GradientEdge], uses: Iterable[LayerUse]) -> Parents:
    """Return the nodes of graphs; from the output of a use the walk goes on at its input."""
    behind: dict[Any, list[Any]] = {}  # from the node of a use's output to that of its input
    for use in uses:
        if not isinstance(use.edge.node, BackwardCFunction) and not _leaves_weight(use):
            following = [edge.node for edge in use.input_edges]
            behind.setdefault(use.edge.node, []).extend(following)
    return graph_parents(outputs, behind)


def _leaves_weight(use: LayerUse) -> bool:
    """Tell whether a recorded use is that of a bias alone, whose module's W has other uses."""
    if use.layer.weight is not None or use.module is None:
        return False
    weight = use.module._parameters.get(use.family.weight_name)
    return weight is not None and weight.requires_grad


def is_undercounted(
    outputs: Sequence[GradientEdge],
    values: Sequence[Tensor],
    uses: Sequence[LayerUse],
    param: Parameter,
) -> bool:
    """Tell whether recorded uses explain less, or more, than the whole derivative by a parameter.

    The vector-Jacobian product of a random vector is compared with the sum of g aᵀ over the
    recorded uses, at the cost of two backward passes. Meant for what `unseen_parameters` returns: a
    path may have been seen by compiled code's hooks, or count nothing (`z + 0 * weight.sum()`).

    Args:
        outputs: The gradient edges of tensors z, whose graph stays alive.
        values: A tensor of the shape and dtype of each z.
        uses: The uses of layers that were recorded in this graph.
        param: A weight or bias of these layers, or any other.
    """
    draws = Generator().manual_seed(0)
    vectors = [torch.randn(z.shape, generator=draws, dtype=torch.float64).to(z) for z in values]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    with would_be_pass():
        (whole,) = torch.autograd.grad(outputs, [param], vectors, **options)
    arrived: dict[LayerUse, Tensor] = {}
    WouldBePass(outputs, uses).run(vectors, arrived.__setitem__)
    wide = torch.promote_types(param.dtype, torch.float32)
    explained, bound, rows = torch.zeros_like(whole, dtype=wide), whole.abs().to(wide), 1
    for layer, own in group_by_layer(arrived).items():
        if param is not layer.weight and param is not layer.bias:
            continue
        for use in own:
            g = use.grad_rows(arrived[use].to(wide))
            rows += g.shape[1] * g.shape[2]
            for total, product in zip((explained, bound), _products(use, g, param), strict=True):
                whole_product = of_all_groups(layer, [use], [product])
                total += layer.family.from_matrix(whole_product, param.shape)
    dtypes = {*(z.dtype for z in values), param.dtype, *(g.dtype for g in arrived.values())}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)  # autocast's, too
    return not bool(((whole - explained).abs() <= _ROUND_OFFS * eps * rows**0.5 * bound).all())


def _products(use: LayerUse, g: Tensor, param: Parameter) -> tuple[Tensor, Tensor]:
    """Return Σ g aᵀ and Σ |g| |a|ᵀ `[B, d_out, columns]` of one use, for W or b.

    Args:
        use: The use.
        g: The gradient by its output, `[B, N, S, d_out]`.
        param: W or b.
    """
    is_weight = param is use.layer.weight
    sparse = use.sparse_inputs() if is_weight else None
    if sparse is not None:
        return sparse.products(g), replace(sparse, value=sparse.value.abs()).products(g.abs())
    a = use.inputs(g.dtype)[0] if is_weight else use.bias_inputs(param, g)
    first, second = (
        torch.einsum("bnso,bnsi->boi", left, right) for left, right in ((g, a), (g.abs(), a.abs()))
    )
    return first, second


def refuse_unseen_uses(
    model: nn.Module, unseen: Iterable[Parameter], output: Tensor, uses: Sequence[LayerUse]
) -> None:
    """Raise if a parameter's block would lack uses that nobody saw.

    Args:
        model: The model, which has the parameters' names.
        unseen: The parameters of which there seem to be any.
        output: z with its graph.
        uses: The uses of layers that are known.

    Raises:
        NotImplementedError: It names the parameters, and the ways out.
    """
    edges = edges_of(output)
    missing = {id(p) for p in unseen if is_undercounted(edges, [output], uses, p)}
    if missing:
        named = model.named_parameters()
        names = ", ".join(repr(name) for name, p in named if id(p) in missing)
        raise NotImplementedError(
            f"params: model_func uses {names} other than by calling the module or multiplying by "
            "it, so that K-FAC's block would lack that part: a weight in a sum or penalty, times a "
            "number, transposed, in torch.func, or a derivative by the input in the forward pass. "
            "Call the module, or leave the parameters out of params; the other operators "
            "(GGNLinearOperator, EFLinearOperator, ...) are exact for any use."
        )


def edges_of(output: Tensor) -> list[GradientEdge]:
    """Return the gradient edges of an output, if it depends on anything.

    Raises:
        NotImplementedError: For activation checkpointing with reentry, whose parts are not in the
            graph.
    """
    edges = [get_gradient_edge(output)] if output.requires_grad else []
    if any(map(_is_reentrant, _nodes_past(edges, []))):
        raise NotImplementedError(
            "model_func: activation checkpointing with use_reentrant=True hides layers from "
            "derivatives; checkpoint with use_reentrant=False."
        )
    return edges
