"""The generalized Gauss-Newton matrix; products with J and Jᵀ are in `linearization`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kfacopt.curvature.batched_autograd import batched_grad
from kfacopt.curvature.confirmation import check_has_graph, check_twice_differentiable
from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.risk import Columns, EmpiricalRiskLinearOperator, Product


class GGNLinearOperator(EmpiricalRiskLinearOperator):
    r"""The generalized Gauss-Newton matrix (GGN) of an empirical risk, exact.

    For L(θ) = c Σ_n ℓ(f_θ(x_n), y_n), with c = 1/N for `reduction="mean"` and 1 for `"sum"`,

        GGN = c Σ_n (J_θ f_n)ᵀ (∇²_f ℓ(f_n, y_n)) (J_θ f_n).

    `loss_func` may be any callable that returns a scalar; the GGN is positive semi-definite if it
    is convex in f. A product costs, per column, about one forward pass (J v), the loss's Hessian
    at the output, and one backward pass (Jᵀ u); half of it or less where Jacobians of single data
    are small enough to be kept (see `kfacopt.curvature.data_gradients`). The arguments and further
    errors are those of `EmpiricalRiskLinearOperator`.

    Raises:
        ValueError: For `nn.NLLLoss`: it is linear in its input, so that its GGN at
            log-probabilities is 0; move the log-softmax into the loss with `nn.CrossEntropyLoss`.
        RuntimeError: In a product, if second derivatives of a custom loss function are wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 1, bias=False)
        >>> X = torch.rand(8, 4)
        >>> ggn = GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()),
        ...                         [(X, torch.rand(8, 1))])
        >>> torch.allclose(ggn @ torch.eye(4), 2 * X.T @ X / 8)
        True

    References:
        Schraudolph (2002), Neural Computation 14(7), section 3; Martens (2020),
        https://arxiv.org/abs/1412.1193, section 8.
    """

    def _check_loss(self) -> None:
        super()._check_loss()
        if isinstance(self._loss_func, nn.NLLLoss):
            raise ValueError(
                "loss_func: nn.NLLLoss is linear in its input, its GGN at log-probabilities is 0. "
                "Return logits from model_func and use nn.CrossEntropyLoss."
            )

    def _batch_product(self, linearization: Linearization, X: Any, y: Any) -> Product:
        z = linearization.output.detach().requires_grad_()
        summed = self._summed_loss(X, y)
        loss = summed(z)
        check_has_graph(loss)
        check_twice_differentiable("loss_func", loss, summed, z)
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)

        def product(V: Columns) -> Columns:
            if not gradient.requires_grad:  # the loss is linear in z
                return [torch.zeros_like(v) for v in V]
            (curved,) = batched_grad([gradient], [z], [linearization.jvp(V)])
            return linearization.vjp(curved)

        return product
