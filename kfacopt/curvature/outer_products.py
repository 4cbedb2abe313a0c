"""Matrices Σ_n g_n g_nᵀ of gradients that are Jacobian-transposed products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from kfacopt.curvature.linearization import Linearization, quiet_vmap
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.curvature.risk import Columns, EmpiricalRiskLinearOperator, RiskTerm
from kfacopt.data import is_empty, tensors_put_back

# A matrix of gradients is kept in place of a graph if it is at most this many times as large.
# Where weights are shared over positions it is of the graph's size, and its products save the
# positions. Where they are not, it is larger by the width, and bound by the memory's bandwidth.
_MAX_GRADIENTS_PER_GRAPH = 16

# Gradients by single data against those by the batch: relative to the largest entry and to √N,
# as round-off adds up. What fails takes the way through the outputs.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}


def multiply_outer_products(u: Tensor, T: Tensor) -> Tensor:
    """Multiply Σ_m u_mn u_mnᵀ onto tangents, for every n.

    Args:
        u: Vectors, `[M, N, C]`.
        T: Tangents, `[K, N, C]`.

    Returns:
        The products, `[K, N, C]`.
    """
    coefficients = torch.einsum("mnc,knc->kmn", u, T)
    return torch.einsum("kmn,mnc->knc", coefficients, u)


def gradients_of_data(
    model: ParametrizedModel, X: Tensor, u: Tensor, linearization: Linearization
) -> Tensor | None:
    """Return all J_nᵀ u_mn as rows, or `None` if f_n does not depend on x_n alone.

    Args:
        model: f and θ.
        X: Inputs, `[N, ...]`.
        u: Vectors at the outputs, `[M, N, C]`.
        linearization: The derivative for the whole batch, against which the result is checked.

    Returns:
        `[N M, D]`.
    """
    primals = tuple(p.detach() for p in model.leaves)

    def of_datum(x: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
        z, pull = vjp(lambda *p: model.at(p, x.unsqueeze(0)), *primals)[:2]
        pulled: tuple[Tensor, ...] = vmap(lambda v: pull(v.reshape(z.shape)))(vectors)
        return pulled

    # Tensors that are assigned inside a transformation cannot be used outside of it.
    with torch.no_grad(), quiet_vmap(), tensors_put_back(model.function):
        try:
            pieces = vmap(of_datum)(X, u.movedim(1, 0))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, NotImplementedError):
            return None  # batch norm on single data, an operation that cannot be vectorised, …
    G = torch.cat([p.flatten(2) for p in pieces], dim=2)  # [N, M, D]
    # Any weights but equal ones would do: a sum over n of right gradients, term by term.
    weights = torch.linspace(0.5, 1.5, len(G), dtype=u.dtype, device=u.device)
    vector = torch.einsum("n,mnc->nc", weights, u).reshape(1, *linearization.output.shape)
    expected = torch.cat([p.flatten() for p in linearization.vjp(vector)])
    error = (torch.einsum("n,nmd->d", weights.to(G), G) - expected).abs().max()
    # Gradients that cancel in the sum leave the round-off of the summands.
    scale = G.abs().max()
    return G.flatten(0, 1) if bool(error <= _AGREEMENT[G.dtype] * len(G) ** 0.5 * scale) else None


class OuterProductLinearOperator(EmpiricalRiskLinearOperator):
    """c Σ_n Σ_m (J_nᵀ u_mn) (J_nᵀ u_mn)ᵀ for vectors u_mn at the outputs f_n.

    A product is J, a sum of outer products at the outputs, and Jᵀ: one forward-mode and one
    reverse-mode product per column, whatever the number of data and vectors. For data in memory
    the matrix of all J_nᵀ u_mn is kept in place of graphs where it is about as small as they are.
    """

    @abstractmethod
    def _output_vectors(self, output: Tensor, X: Any, y: Any) -> Tensor:
        """Return u `[M, N, C]`, where N C is the number of entries of z, in its order."""

    def _batch_product(
        self, linearization: Linearization, X: Any, y: Any
    ) -> Callable[[Columns], Columns]:
        u = self._output_vectors(linearization.output.detach(), X, y)
        return _through_outputs(linearization, u)

    def _make_kept_term(self, X: Any, y: Any, size: int) -> tuple[RiskTerm, int]:
        if is_empty(X):
            return self._empty_term(), 0
        linearization = Linearization(self._model, X)
        u = self._output_vectors(linearization.output.detach(), X, y)
        # Gradients have the dtype of the parameters, which need not be that of the predictions.
        gradients = u.shape[0] * u.shape[1] * self.shape[0] * self.torch_dtype.itemsize
        G = None
        if (
            gradients <= _MAX_GRADIENTS_PER_GRAPH * size
            and self.torch_dtype in _AGREEMENT
            and linearization.can_substitute
            and isinstance(X, Tensor)
            and len(X) == u.shape[1]
        ):
            G = gradients_of_data(self._model, X, u, linearization)
        product = _through_outputs(linearization, u) if G is None else _through_gradients(G)
        term = self._weigh(product, linearization.output, X, y)
        return term, size if G is None else gradients


def _through_outputs(linearization: Linearization, u: Tensor) -> Callable[[Columns], Columns]:
    def product(V: Columns) -> Columns:
        tangents = linearization.jvp(V)
        products = multiply_outer_products(u, tangents.reshape(-1, *u.shape[1:]))
        return linearization.vjp(products.reshape(-1, *linearization.output.shape))

    return product


def _through_gradients(G: Tensor) -> Callable[[Columns], Columns]:
    def product(V: Columns) -> Columns:
        columns = torch.cat([v.reshape(v.shape[0], -1) for v in V], dim=1)  # [K, D]
        pieces = ((columns @ G.mT) @ G).split([v[0].numel() for v in V], dim=1)
        return [p.reshape(v.shape) for p, v in zip(pieces, V, strict=True)]

    return product
