"""Matrices Σ_n g_n g_nᵀ with g_n = J_nᵀ u_n; what u_n is say the two Fishers."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfacopt.curvature.data_gradients import DataGradients
from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.network import largest_rows
from kfacopt.curvature.risk import Columns, EmpiricalRiskLinearOperator, Product, RiskTerm
from kfacopt.data import is_empty


def multiply_outer_products(u: Tensor, T: Tensor) -> Tensor:
    """Multiply Σ_m u_mn u_mnᵀ, of u `[M, N, C]`, onto tangents `[K, N, C]`, for every n."""
    coefficients = torch.einsum("mnc,knc->kmn", u, T)
    return torch.einsum("kmn,mnc->knc", coefficients, u)


class OuterProductLinearOperator(EmpiricalRiskLinearOperator):
    """c Σ_n Σ_m (J_nᵀ u_mn) (J_nᵀ u_mn)ᵀ for vectors u_mn at the outputs f_n.

    A product is J, a sum of outer products at the outputs, and Jᵀ: one forward-mode and one
    reverse-mode product per column, whatever the number of data and vectors. For data in memory
    the matrix of all J_nᵀ u_mn is kept in place of graphs where it is about as small as they are;
    a column then costs two products with it.
    """

    @abstractmethod
    def _output_vectors(self, output: Tensor, X: Any, y: Any) -> Tensor:
        """Return u `[M, N, C]`, where N C is the number of entries of z, in its order."""

    def _batch_product(self, linearization: Linearization, X: Any, y: Any) -> Product:
        u = self._output_vectors(linearization.output.detach(), X, y)
        return partial(_through_outputs, linearization, u)

    def _make_kept_term(self, X: Any, y: Any, size: int, room: int) -> tuple[RiskTerm, int]:
        if is_empty(X):
            return self._empty_term(), 0
        linearization = Linearization(self._model, X, watch=True)
        u = self._output_vectors(linearization.output.detach(), X, y)
        plan, product = linearization.plan(), partial(_through_outputs, linearization, u)
        if plan is not None and len(X) == u.shape[1]:
            needed = plan.num_bytes(len(u))
            if needed <= largest_rows(size, room):
                size, gradients = needed, plan.gradients(u, self._chunk_size)
                if gradients is not None:
                    product = partial(_through_gradients, gradients)
        return self._weigh(product, linearization.output, X, y), size


def _through_outputs(linearization: Linearization, u: Tensor, V: Columns) -> Columns:
    tangents = linearization.jvp(V)
    products = multiply_outer_products(u, tangents.reshape(-1, *u.shape[1:]))
    return linearization.vjp(products.reshape(-1, *linearization.output.shape))


def _through_gradients(gradients: DataGradients, V: Columns) -> Columns:
    return gradients.combine(gradients.project(V), [v[0] for v in V])
