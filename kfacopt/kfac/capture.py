"""Hooks that record uses of layers, and passes to their outputs; not what is made of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter

from kfacopt.kfac.layers import Layer
from kfacopt.kfac.layers.interface import LayerFamily
from kfacopt.kfac.layers.sparse_rows import SparseRows
from kfacopt.likelihoods import FisherType, Likelihood
from kfacopt.taylor_mode import Jet


@dataclass(frozen=True, eq=False)
class LayerUse:
    """One call of a layer's module, or one product with its matrix past that.

    Attributes:
        layer: The layer.
        module: The module that was called; `None` for a product.
        call: What the layer's family keeps of the module in this call; the module itself for most.
        input: What it was called with, or what the family made of it, without a graph.
        edge: The gradient edge of its output. Unlike the tensor, it survives an in-place
            activation behind the layer and keeps no memory alive.
        version: The input's version counter at the call.
        input_edges: The gradient edges of what it was called with.
        constants: The input of a bias at each position, `[S]`, where it is not 1 at all of them:
            0 at positions of derivatives, see `kfacopt.taylor_mode`.
        bias: What a product adds, if it is a parameter.
        live: Which rows `[N, S]` A has, if not all.
        own_family: What a product computes, where that is not what the layer's module does.
    """

    layer: Layer
    module: nn.Module | None
    call: Any
    input: Tensor
    edge: GradientEdge
    version: int
    input_edges: tuple[GradientEdge, ...]
    constants: Tensor | None = None
    bias: Parameter | None = None
    live: Tensor | None = None
    own_family: LayerFamily | None = None

    @property
    def family(self) -> LayerFamily:
        """What was computed: what the layer's module does, for most."""
        return self.layer.family if self.own_family is None else self.own_family

    def inputs(self, dtype: torch.dtype, reduce: bool = False) -> tuple[Tensor, int]:
        """Return a `[B, N, S, d_in]` in a dtype, and S before positions are averaged."""
        return self.family.inputs(self.call, self.checked_input().to(dtype), reduce)

    def sparse_inputs(self) -> SparseRows | None:
        """Return a by its entries that are not 0, or `None` unless these are few."""
        return self.family.sparse_inputs(self.call, self.checked_input())

    def counted(self, reduce: bool) -> Tensor | None:
        """Return which rows `[N, S]` W acts on, or which data where these are averaged."""
        own = self.family.counted(self.call, self.checked_input())
        return own.any(1, keepdim=True).expand_as(own) if reduce and own is not None else own

    def grad_rows(self, g: Tensor) -> Tensor:
        """Return the gradient by the module's output as `[B, N, S, d_out]`."""
        return self.family.grad_outputs(self.call, g)

    @property
    def groups(self) -> slice | None:
        """Which of the layer's groups it has; `None` for all."""
        return self.family.groups_used(self.call)

    def adds(self, bias: Parameter | None) -> float:
        """Return the input of a bias: 1, or 0 if the module, which may share W alone, lacks it."""
        own = self.family.bias_name
        if self.module is None:
            return float(bias is not None and self.bias is bias)
        return float(own is not None and self.module._parameters.get(own) is bias)

    def bias_inputs(self, bias: Parameter | None, rows: Tensor) -> Tensor:
        """Return the input of a bias `[B, N, S, 1]` beside rows `[B, N, S, d]`.

        Args:
            bias: The bias.
            rows: The inputs of W, or gradients; where S is 1 they may stand for all positions, and
                the bias's input is the mean over these.
        """
        column = rows.new_full((*rows.shape[:-1], 1), self.adds(bias))
        if self.constants is None:
            return column
        constants = self.constants.to(rows)
        return column * (constants.mean() if rows.shape[2] == 1 else constants.unsqueeze(-1))

    def checked_input(self) -> Tensor:
        """Return the input, or raise if it was changed in place after the call."""
        if self.input._version != self.version:
            raise RuntimeError(
                f"layer {self.layer.name!r}: its input was changed in place after the layer used "
                "it, so that its factor would be wrong. Write x = x + ... instead of x += ..."
            )
        return self.input


def record_use(
    layer: Layer, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any
) -> LayerUse | None:
    """Return the record of a call of `module`, or `None` if no gradient can reach it.

    A call through `torch.func.functional_call` with other parameters is not one of the layer, and
    one in a transform of `torch.func` has tensors that are gone at its end. A `forward` that was
    put on the module itself may compute anything: the products in it are looked for in the graph.
    """
    if torch._C._are_functorch_transforms_active() or "forward" in vars(module):
        return None
    x: Any = args[0] if args else kwargs.get("input")
    constants = None
    if isinstance(x, Jet) and isinstance(output, Jet):
        args, output, constants = (x.rows,), output.rows, x.constants
    if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
        return None
    if all(p is not layer.anchor for p in module._parameters.values()):
        return None
    kept = layer.family.record(module, args, kwargs, output)
    if kept is None:
        return None
    call, x = kept
    detached, edge = x.detach(), get_gradient_edge(output)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    before = tuple(map(get_gradient_edge, tensors))
    return LayerUse(layer, module, call, detached, edge, detached._version, before, constants)


@contextmanager
def capture(layers: Iterable[tuple[Layer, list[nn.Module]]]) -> Iterator[list[LayerUse]]:
    """Record the uses of layers in the forward passes within the context.

    Compiled models run eagerly: compiled code ignores hooks that are added after its first call.

    Args:
        layers: The layers with their modules.

    Yields:
        A list that grows with every use.
    """
    uses: list[LayerUse] = []
    handles = []

    def make_hook(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            use = record_use(layer, module, args, kwargs, output)
            if use is not None:
                uses.append(use)

        return hook

    try:
        for layer, modules in layers:
            handles += [
                m.register_forward_hook(make_hook(layer), prepend=True, with_kwargs=True)
                for m in modules
            ]
        with _uncompiled():
            yield uses
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled() -> AbstractContextManager[None]:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def group_by_layer(uses: Iterable[LayerUse]) -> dict[Layer, list[LayerUse]]:
    """Group uses by their layer, in the order of the first use."""
    grouped: dict[Layer, list[LayerUse]] = {}
    for use in uses:
        grouped.setdefault(use.layer, []).append(use)
    return grouped


def loss_vectors(
    likelihood: Likelihood,
    output: Tensor,
    weights: Tensor,
    fisher_type: FisherType,
    mc_samples: int,
    generator: Generator,
) -> Iterator[Tensor]:
    """Yield the vectors v `[*z.shape]` at the loss's input whose Σ_v v vᵀ is the loss's curvature.

    Args:
        likelihood: What the loss means.
        output: z, `[N, ...]`, widened.
        weights: ω_t, from `Likelihood.curvature_weights`.
        fisher_type: `"mc"` or `"type-2"`.
        mc_samples: How many labels to draw for each datum, for `"mc"`.
        generator: Draws labels, or signs.
    """
    if fisher_type == "type-2":
        yield from likelihood.hessian_root(output, weights, generator)
        return
    for _ in range(mc_samples):
        yield likelihood.sample_gradient(output, weights / mc_samples, generator)


class WouldBePass:
    """Backward passes from vectors at z to the outputs of all layers; the graph stays alive.

    A gradient is handed over when the pass arrives there, and its memory is free again for what
    comes behind, unless it is kept: a pass of its own to all outputs would hold all of them.

    Args:
        outputs: z with its graph, or the gradient edges of several tensors z.
        uses: The uses of layers in that graph.
    """

    def __init__(self, outputs: Tensor | Sequence[GradientEdge], uses: Sequence[LayerUse]) -> None:
        self._by_node: dict[Any, list[LayerUse]] = {}
        for use in uses:
            self._by_node.setdefault(use.edge.node, []).append(use)
        self._passed = _above_others(self._by_node)
        self._ends = [use for use in uses if use.edge.node not in self._passed]
        self._roots: Sequence[Tensor | GradientEdge] = ()
        if isinstance(outputs, Tensor) and self._ends:  # else there is nothing to arrive at
            with torch.enable_grad():
                root = outputs.view_as(outputs)  # only these passes go through its node
            self._roots, self._starts = [root], [get_gradient_edge(root).node]
        elif self._ends:
            self._roots = list(outputs)
            self._starts = list(dict.fromkeys(edge.node for edge in outputs))

    def run(
        self,
        vector: Tensor | Sequence[Tensor | None],
        consume: Callable[[LayerUse, Tensor], object],
    ) -> None:
        """Backpropagate a vector.

        Args:
            vector: v, `[*z.shape]`; for several tensors z one each, `None` for 0.
            consume: Gets each use that z depends on, and the gradient by its output.
        """
        vectors = [vector] if isinstance(vector, Tensor) else vector
        pairs = [(r, v) for r, v in zip(self._roots, vectors, strict=False) if v is not None]
        if not pairs:
            return
        own = _OwnTask()
        handles = [node.register_prehook(own.start) for node in self._starts]
        handles += [
            node.register_prehook(_handing_over(own, self._by_node[node], consume))
            for node in self._passed
        ]
        try:
            with would_be_pass():
                edges = [use.edge for use in self._ends]
                options = {"retain_graph": True, "allow_unused": True}
                roots, given = zip(*pairs, strict=True)
                grads = torch.autograd.grad(roots, edges, given, **options)
        finally:
            for handle in handles:
                handle.remove()
        for use, grad in zip(self._ends, grads, strict=True):
            if grad is not None:
                consume(use, grad)


class _OwnTask:
    """Which backward pass is ours: users' hooks and functions may start others meanwhile."""

    def __init__(self) -> None:
        self._number = -1

    def start(self, _: Any) -> None:
        """Take note that the pass has begun, when it arrives first at where it starts."""
        if self._number == -1:
            self._number = torch._C._current_graph_task_id()

    def runs(self) -> bool:
        """Tell whether it is the one that calls."""
        return torch._C._current_graph_task_id() == self._number


def _handing_over(
    own: _OwnTask, uses: Sequence[LayerUse], consume: Callable[[LayerUse, Tensor], object]
) -> Callable[[Sequence[Tensor | None]], None]:
    """Return a hook before a node that gives the gradients of its outputs to their consumer."""

    def hook(grads: Sequence[Tensor | None]) -> None:
        if not own.runs():
            return
        for use in uses:
            grad = grads[use.edge.output_nr]
            if grad is not None:
                consume(use, grad)

    return hook


def _above_others(nodes: Iterable[Any]) -> set[Any]:
    """Return those of some nodes of a graph from which a backward pass goes on to others of them.

    Args:
        nodes: Nodes of autograd's graph.
    """
    own = set(nodes)
    leads: dict[Any, bool] = {}  # whether one of them is at a node, or behind it
    found, waiting = set(), list(own)
    while waiting:
        node = waiting[-1]
        behind = [following for following, _ in node.next_functions if following is not None]
        unknown = [] if node in leads else [n for n in behind if n not in leads]
        if unknown:
            waiting += unknown
            continue
        waiting.pop()
        goes_on = any(leads[n] for n in behind)
        leads[node] = goes_on or node in own
        if goes_on and node in own:
            found.add(node)
    return found


# Not a context variable: with CUDA, hooks may run in threads of the autograd engine.
_would_be_depth = 0


@contextmanager
def would_be_pass() -> Iterator[None]:
    """Let hooks know that backward passes within are ours."""
    global _would_be_depth
    _would_be_depth += 1
    try:
        yield
    finally:
        _would_be_depth -= 1


def in_would_be_pass() -> bool:
    """Tell whether the backward pass that runs is one of ours, nested in the user's."""
    return _would_be_depth > 0
