"""Matrices Σ_n g_n g_nᵀ of gradients that are Jacobian-transposed products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.risk import Columns, EmpiricalRiskLinearOperator


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


class OuterProductLinearOperator(EmpiricalRiskLinearOperator):
    """c Σ_n Σ_m (J_nᵀ u_mn) (J_nᵀ u_mn)ᵀ for vectors u_mn at the outputs f_n.

    A product is J, a sum of outer products at the outputs, and Jᵀ: one forward-mode and one
    reverse-mode product per column, whatever the number of data and vectors.
    """

    @abstractmethod
    def _output_vectors(self, output: Tensor, X: Any, y: Any) -> Tensor:
        """Return u `[M, N, C]`, where N C is the number of entries of z, in its order."""

    def _batch_product(
        self, linearization: Linearization, X: Any, y: Any
    ) -> Callable[[Columns], Columns]:
        shape = linearization.output.shape
        u = self._output_vectors(linearization.output.detach(), X, y)

        def product(V: Columns) -> Columns:
            tangents = linearization.jvp(V)
            products = multiply_outer_products(u, tangents.reshape(-1, *u.shape[1:]))
            return linearization.vjp(products.reshape(-1, *shape))

        return product
