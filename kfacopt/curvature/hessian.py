"""The Hessian; the derivative of the gradient along vectors is in `second_derivatives`."""

from __future__ import annotations

from typing import Any

from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.risk import EmpiricalRiskLinearOperator, Product
from kfacopt.curvature.second_derivatives import SecondDerivative


class HessianLinearOperator(EmpiricalRiskLinearOperator):
    r"""The Hessian of an empirical risk, exact.

    For L(θ) = c Σ_n ℓ(f_θ(x_n), y_n), with c = 1/N for `reduction="mean"` and 1 for `"sum"`,

        H = ∇²_θ L = c Σ_n ∇²_θ ℓ(f_θ(x_n), y_n).

    `loss_func` may be any callable that returns a scalar. A product is the derivative of ∇L along
    the vectors: by a second backward pass through the graph of the gradient, or, for many columns,
    in forward mode, which shares the gradient's evaluation among them. A column costs about two
    gradient evaluations. See `EmpiricalRiskLinearOperator` for the arguments and further errors.

    Raises:
        RuntimeError: In a product, if a custom function's second derivatives are wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> data = [(torch.rand(8, 4), torch.rand(8, 2))]
        >>> H = HessianLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
        >>> H.shape
        (23, 23)
        >>> dense = H @ torch.eye(23)
        >>> torch.allclose(dense, dense.T, atol=1e-6)
        True

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6(1),
        section 3.
    """

    def _linearize_to_keep(self, X: Any, size: int, room: int) -> tuple[Linearization, int]:
        return Linearization(self._model, X, graph_bytes=size), size

    def _batch_product(self, linearization: Linearization, X: Any, y: Any) -> Product:
        return SecondDerivative(linearization, self._summed_loss(X, y))
