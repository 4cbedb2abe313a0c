"""The generalized Gauss-Newton matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfacopt.curvature.risk import EmpiricalRiskLinearOperator


class GGNLinearOperator(EmpiricalRiskLinearOperator):
    r"""The generalized Gauss-Newton matrix (GGN) of an empirical risk, exact.

    For L(θ) = c Σ_n ℓ(f_θ(x_n), y_n), with c = 1/N for `reduction="mean"` and 1 for `"sum"`,

        GGN = c Σ_n (J_θ f_n)ᵀ (∇²_f ℓ(f_n, y_n)) (J_θ f_n).

    A product costs, per column, about one forward pass (J v), the loss's Hessian at the output,
    and one backward pass (Jᵀ u); see `EmpiricalRiskLinearOperator` for the arguments.

    Raises:
        ValueError: For `nn.NLLLoss`: it is linear in its input, so that its GGN at
            log-probabilities is 0; move the log-softmax into the loss with `nn.CrossEntropyLoss`.

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

    self_adjoint = True

    def _check_loss(self) -> None:
        super()._check_loss()
        if isinstance(self._loss_func, nn.NLLLoss):
            raise ValueError(
                "loss_func: nn.NLLLoss is linear in its input, its GGN at log-probabilities is 0. "
                "Return logits from model_func and use nn.CrossEntropyLoss."
            )

    def _batch_matmat(self, output: Tensor, y: Tensor, X: list[Tensor]) -> list[Tensor]:
        """Multiply one batch's GGN onto K vectors."""
        tangents = self._jvp(output, X)
        z = output.detach().requires_grad_()
        loss = self._loss(z, y)
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        if gradient.grad_fn is None:  # a loss that is linear in z
            return [torch.zeros_like(x) for x in X]
        (curved,) = self._vjp(gradient, [z], tangents)
        return self._vjp(output, self._params, curved)
