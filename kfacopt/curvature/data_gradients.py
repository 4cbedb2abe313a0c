"""The matrix of all J_nᵀ u_nr, kept where a datum's predictions depend on it alone; not J itself.

A linear layer that a datum passes once, s_n = W a_n + b, has in J_nᵀ u_nr the rank-one block
g_nr a_nᵀ, with g_nr = (∂f_n/∂s_n)ᵀ u_nr. Products need a and g only:

    (J_nᵀ u_nr)ᵀ v = Σ_layers g_nrᵀ (V a_n),    Σ_nr c_nr J_nᵀ u_nr = Σ_n (Σ_r c_nr g_nr) a_nᵀ,

one product of the layer's size each, where J v and Jᵀ u through the network take two. All other
parameters have a dense block, whose products save what a weight is shared over (positions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vjp, vmap

from kfacopt.curvature.adjoint import Columns
from kfacopt.curvature.batched_autograd import batched_grad, if_possible, quiet_vmap
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.data import attributes_put_back

# Gradients by single data against those by the batch, in units of round-off relative to the largest
# entry and to √(N R), as it adds up: up to 2.2 are measured. What fails goes through the network.
_ROUND_OFFS = 16
_DTYPES = (torch.float64, torch.float32)


class LayerCall(NamedTuple):
    """One call of a linear layer.

    Attributes:
        weight: The index of W in θ, if it is there.
        bias: The index of b in θ, if it is there.
        inputs: a `[N, d_in]`; `None` if it has other axes.
        output: W a + b, without its graph.
        edge: Its place in the graph.
    """

    weight: int | None
    bias: int | None
    inputs: Tensor | None
    output: Tensor
    edge: GradientEdge


@contextmanager
def watch_linear_layers(
    module: nn.Module | None, leaves: Sequence[Tensor]
) -> Iterator[list[LayerCall]]:
    """Record the calls of linear layers whose weight or bias is in θ.

    Args:
        module: f; nothing is recorded of `None`.
        leaves: θ.

    Yields:
        The calls within the context.
    """
    calls: list[LayerCall] = []
    index = {id(p): i for i, p in enumerate(leaves)}

    def record(module: nn.Linear, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):  # features with derivatives, see `kfacopt.taylor_mode`
            return
        # Inside of `functional_call` the tensors that stand in for them.
        weight, bias = index.get(id(module.weight)), index.get(id(module.bias))
        if (weight is None and bias is None) or not output.requires_grad:
            return
        dense = args and args[0].ndim == 2 and args[0].layout == torch.strided
        inputs = args[0].detach() if dense else None
        calls.append(LayerCall(weight, bias, inputs, output.detach(), get_gradient_edge(output)))

    with ExitStack() as stack:
        for part in () if module is None else module.modules():
            if type(part) is nn.Linear:
                stack.callback(part.register_forward_hook(record).remove)
        yield calls


@dataclass(frozen=True, eq=False)
class _Factors:
    """The blocks of a linear layer's call.

    Attributes:
        weight: The index of W in θ, if it is there.
        bias: The index of b in θ, if it is there.
        inputs: a `[N, d_in]`.
        grads: g `[N, R, d_out]`.
    """

    weight: int | None
    bias: int | None
    inputs: Tensor
    grads: Tensor


class DataGradients:
    """J_nᵀ u_nr for N data and R vectors each, as factors of layers and dense blocks.

    Args:
        layers: The calls that are kept as factors.
        rest: The indices of the other parameters of θ.
        dense: Their part of J_nᵀ u_nr, `[N, R, D_rest]`.
    """

    def __init__(self, layers: list[_Factors], rest: list[int], dense: Tensor) -> None:
        self._layers, self._rest, self._dense = layers, rest, dense

    def project(self, V: Columns) -> Tensor:
        """Return (J_nᵀ u_nr)ᵀ v_k `[K, N, R]` for one `[K, *p.shape]` for each parameter."""
        N, R, _ = self._dense.shape
        K = V[0].shape[0]
        total = self._dense.new_zeros(N, K, R)
        for layer in self._layers:
            # onto V a and v, [N, K, d_out]
            if layer.weight is not None:
                moved = (layer.inputs @ V[layer.weight].mT).movedim(0, 1)
                total += moved @ layer.grads.mT
            if layer.bias is not None:
                total += V[layer.bias].expand(N, K, -1) @ layer.grads.mT
        if self._rest:
            columns = torch.cat([V[i].reshape(K, -1) for i in self._rest], dim=1)
            total += (columns @ self._dense.flatten(0, 1).mT).view(K, N, R).movedim(0, 1)
        return total.movedim(0, 1)

    def largest_entry(self) -> Tensor:
        """Return max |J_nᵀ u_nr|, or somewhat more, as a scalar."""
        sizes = [self._dense.abs().amax()] if self._dense.numel() else []
        for layer in self._layers:
            g = layer.grads.abs().amax((1, 2))
            a = layer.inputs.abs().amax(1).clamp(min=1) if layer.weight is not None else 1.0
            sizes.append((g * a).amax())
        return torch.stack(sizes).amax()

    def combine(self, coefficients: Tensor, like: Columns) -> Columns:
        """Return Σ_nr c_knr J_nᵀ u_nr, one `[K, *p.shape]` for each parameter.

        Args:
            coefficients: c, `[K, N, R]`.
            like: Tensors of the parameters' shapes.
        """
        K = coefficients.shape[0]
        sums: list[Tensor | None] = [None] * len(like)

        def add(index: int | None, value: Tensor) -> None:
            if index is not None:
                before = sums[index]
                sums[index] = value if before is None else before + value

        for layer in self._layers:
            h = coefficients.movedim(0, 1) @ layer.grads  # [N, K, d_out]
            if layer.weight is not None:
                product = h.flatten(1).mT @ layer.inputs
                add(layer.weight, product.view(K, -1, layer.inputs.shape[1]))
            if layer.bias is not None:
                add(layer.bias, h.sum(0))
        if self._rest:
            pieces = (coefficients.flatten(1) @ self._dense.flatten(0, 1)).split(
                [like[i].numel() for i in self._rest], dim=1
            )
            for i, piece in zip(self._rest, pieces, strict=True):
                add(i, piece.reshape(K, *like[i].shape))
        return [
            p.new_zeros(K, *p.shape) if s is None else s for s, p in zip(sums, like, strict=True)
        ]


class GradientPlan:
    """Which blocks of J_nᵀ u_nr are kept as factors, and how many bytes that takes.

    Args:
        model: f and θ.
        X: Inputs, `[N, ...]`.
        output: z with its graph.
        calls: The calls of linear layers that made it.
    """

    def __init__(
        self, model: ParametrizedModel, X: Tensor, output: Tensor, calls: Sequence[LayerCall]
    ) -> None:
        self._model, self._X, self._output = model, X, output
        # A weight that is also used at shared positions has a dense block.
        shared = {i for c in calls if not self._is_single(c) for i in (c.weight, c.bias)}
        self._calls = [
            c for c in calls if self._is_single(c) and not {c.weight, c.bias} & (shared - {None})
        ]
        factored = {i for c in self._calls for i in (c.weight, c.bias)}
        self._rest = [i for i in range(len(model.leaves)) if i not in factored]

    def _is_single(self, call: LayerCall) -> bool:
        return call.inputs is not None and len(call.inputs) == len(self._X)

    def num_bytes(self, vectors: int) -> int:
        """Return what is kept for a number R of vectors for each datum."""
        numbers = vectors * sum(self._model.leaves[i].numel() for i in self._rest)
        for call in self._calls:
            assert call.inputs is not None
            numbers += call.inputs.shape[1] + vectors * call.output.shape[1]
        return numbers * len(self._X) * self._model.leaves[0].element_size()

    def gradients(self, u: Tensor, chunk_size: int) -> DataGradients | None:
        """Return all J_nᵀ u_nr, or `None` if f_n does not depend on x_n alone.

        Args:
            u: Vectors at the outputs, `[R, N, C]`.
            chunk_size: How many of the R are backpropagated at once, which bounds the memory.
        """
        dtype = self._model.leaves[0].dtype
        if dtype not in _DTYPES:
            return None
        edges, outputs = [c.edge for c in self._calls], [c.output for c in self._calls]
        blocks: list[Tensor] = []
        pieces: list[list[Tensor]] = []
        for chunk in u.split(chunk_size):
            block = self._dense_blocks(chunk)
            if block is None:
                return None
            blocks.append(block)
            vectors = chunk.reshape(-1, *self._output.shape)
            pieces.append(
                batched_grad([self._output], edges, [vectors], like=outputs) if edges else []
            )
        dense = torch.cat(blocks, dim=1)
        grads = [torch.cat(piece) for piece in zip(*pieces, strict=True)]
        layers = [
            _Factors(c.weight, c.bias, c.inputs.to(dtype), g.to(dtype).movedim(0, 1).contiguous())
            for c, g in zip(self._calls, grads, strict=True)
            if c.inputs is not None
        ]
        result = DataGradients(layers, self._rest, dense)
        return result if self._agrees(result, u) else None

    def _dense_blocks(self, u: Tensor) -> Tensor | None:
        """Return the parts of J_nᵀ u_nr for parameters without factors, `[N, R, D_rest]`."""
        model, (R, N, _) = self._model, u.shape
        if not self._rest:
            return model.leaves[0].new_zeros(N, R, 0)
        primals = [p.detach() for p in model.leaves]

        def f(x: Tensor, *values: Tensor) -> Tensor:
            at = list(primals)
            for i, value in zip(self._rest, values, strict=True):
                at[i] = value
            output: Tensor = model.at(at, x.unsqueeze(0))
            return output

        def of_datum(x: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
            z, pull = vjp(lambda *p: f(x, *p), *(primals[i] for i in self._rest))[:2]
            pulled: tuple[Tensor, ...] = vmap(lambda v: pull(v.reshape(z.shape)))(vectors)
            return pulled

        # Tensors that are assigned inside a transformation cannot be used outside of it.
        with torch.no_grad(), quiet_vmap(), attributes_put_back(*model.modules()):
            pieces = if_possible(lambda: vmap(of_datum)(self._X, u.movedim(1, 0)), Exception)
        if pieces is None:  # whatever a model raises that is given a single datum
            return None  # batch norm, `squeeze` of the axis of data, what is not vectorised, …
        shapes = [primals[i].shape for i in self._rest]
        if any(p.shape != (N, R, *shape) for p, shape in zip(pieces, shapes, strict=True)):
            return None  # torch's rule for nn.PReLU does not sum over what the weight is shared by
        return torch.cat([p.reshape(N, R, -1) for p in pieces], dim=2)

    def _agrees(self, gradients: DataGradients, u: Tensor) -> bool:
        """Tell whether a weighted sum of all rows is what the whole batch gives."""
        R, N, _ = u.shape
        leaves = self._model.leaves
        # If rows of predictions are mixed, or a parameter is used where it was not seen, the sums
        # differ; with weights of both signs as much where a mean over the data is mixed in.
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(N, R, generator=generator, dtype=torch.float64).to(u)
        vector = torch.einsum("nr,rnc->nc", weights, u).reshape(1, *self._output.shape)
        expected = batched_grad([self._output], leaves, [vector])
        found = gradients.combine(weights.to(leaves[0].dtype).unsqueeze(0), leaves)
        pairs = list(zip(found, expected, strict=True))
        errors = torch.stack([(a - b).abs().max() for a, b in pairs if a.numel()])
        bound = _ROUND_OFFS * torch.finfo(leaves[0].dtype).eps * (N * R) ** 0.5
        return bool(errors.max() <= bound * gradients.largest_entry())
