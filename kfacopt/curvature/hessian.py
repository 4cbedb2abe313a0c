"""The Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kfacopt.curvature.batched_autograd import batched_grad
from kfacopt.curvature.confirmation import Functions, check_twice_differentiable
from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.risk import (
    Columns,
    EmpiricalRiskLinearOperator,
    RiskTerm,
    summed_loss,
)
from kfacopt.data import is_empty


class HessianLinearOperator(EmpiricalRiskLinearOperator):
    r"""The Hessian of an empirical risk, exact.

    For L(θ) = c Σ_n ℓ(f_θ(x_n), y_n), with c = 1/N for `reduction="mean"` and 1 for `"sum"`,

        H = ∇²_θ L = c Σ_n ∇²_θ ℓ(f_θ(x_n), y_n).

    `loss_func` may be any callable that returns a scalar. A product is the derivative of ∇L along
    the vectors: by a second backward pass through the graph of the gradient, or, for many columns,
    in forward mode, which shares the gradient's evaluation among them. A column costs about two
    gradient evaluations. See `EmpiricalRiskLinearOperator` for the arguments and errors.

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

    def _make_kept_term(self, X: Any, y: Any, size: int, room: int) -> tuple[RiskTerm, int]:
        if is_empty(X):
            return self._empty_term(), 0
        linearization = Linearization(self._model, X, graph_bytes=size)
        product = self._batch_product(linearization, X, y)
        return self._weigh(product, linearization.output, X, y), size

    def _batch_product(
        self, linearization: Linearization, X: Any, y: Any
    ) -> Callable[[Columns], Columns]:
        # What is kept must not refer to the operator, which keeps it.
        params, loss_func = self._model.leaves, self._loss_func
        loss = summed_loss(loss_func, linearization.output, X, y)
        if not loss.requires_grad:
            return lambda V: [torch.zeros_like(v) for v in V]
        functions, z = Functions(loss), linearization.output
        linearization.check_second_derivatives()
        check_twice_differentiable(
            "loss_func", loss, lambda at: summed_loss(loss_func, at, X, y), z, self._model.confirmed
        )
        gradient: list[tuple[int, Tensor]] = []

        def double_backward(V: Columns) -> Columns:
            if not gradient:
                grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
                # the others are zero, or do not depend on the parameters
                gradient.extend(
                    (i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad
                )
            if not gradient:  # the risk is linear in the parameters
                return [torch.zeros_like(v) for v in V]
            return batched_grad([g for _, g in gradient], params, [V[i] for i, _ in gradient])

        def product(V: Columns) -> Columns:
            result = linearization.gradient_jvp(
                lambda z: summed_loss(loss_func, z, X, y), functions, V, double_backward
            )
            return double_backward(V) if result is None else result

        return product
