"""The empirical Fisher; the products of outer products are in `outer_products`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfacopt.curvature.outer_products import OuterProductLinearOperator
from kfacopt.data import batch_size
from kfacopt.likelihoods import has_likelihood, likelihood_of


class EFLinearOperator(OuterProductLinearOperator):
    r"""The uncentered covariance of the data's gradients ("empirical Fisher", EF), exact.

    For L(θ) = c Σ_n ℓ_n(θ) with ℓ_n = ℓ(f_θ(x_n), y_n), and c = 1/N for `reduction="mean"` and 1
    for `"sum"`,

        EF = c Σ_n (∇_θ ℓ_n) (∇_θ ℓ_n)ᵀ = c Σ_n J_nᵀ u_n u_nᵀ J_n,    u_n = ∇_f ℓ_n.

    All u_n come from one gradient at the predictions, so that a product costs one J v and one
    Jᵀ u per column, whatever N is; or two products with the matrix of all J_nᵀ u_n where that is
    kept.

    What counts as a datum is an entry of the first axis of X. For predictions of more than two
    dimensions, and for predictions whose positions were flattened into rows, as in
    `logits.view(-1, classes)`, ℓ_n is the datum's mean over its positions (its sum for `"sum"`).
    Targets that cross entropy ignores are not counted: with Z the sum that the mean divides by and
    s_n a datum's summed loss, N is the number of data times the share of targets that are not
    ignored, and ℓ_n = (N / Z) s_n: a factor of all class weights changes nothing, as in L. A target
    whose class has the weight 0 is a datum whose gradient is 0.

    `loss_func` may be any callable with an attribute `reduction` that is the mean or sum of the
    data's losses; that each ℓ_n depends on the n-th prediction only is taken for granted. See
    `EmpiricalRiskLinearOperator` for the arguments.

    Raises:
        ValueError: If `loss_func.reduction` is neither `"mean"` nor `"sum"`, or if predictions
            cannot be assigned to data.
        RuntimeError: If the check for deterministic behavior fails.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 1, bias=False)
        >>> X, y = torch.rand(8, 3), torch.rand(8, 1)
        >>> EF = EFLinearOperator(model, nn.MSELoss(), list(model.parameters()), [(X, y)])
        >>> G = 2 * (model(X) - y).detach() * X  # the data's gradients
        >>> torch.allclose(EF @ torch.eye(3), G.T @ G / 8)
        True

    References:
        Kunstner, Balles & Hennig (2019), https://arxiv.org/abs/1905.12558, Eq. 3, on how it
        differs from the Fisher.
    """

    def _check_loss(self) -> None:
        super()._check_loss()
        if self._reduction not in ("mean", "sum"):
            raise ValueError(
                "loss_func: the empirical Fisher needs to know how it reduces the data's losses; "
                f'its attribute `reduction` must be "mean" or "sum", got {self._reduction!r}.'
            )

    def _output_vectors(self, output: Tensor, X: Any, y: Any) -> Tensor:
        z = output.requires_grad_()
        (gradient,) = torch.autograd.grad(self._summed_loss(X, y)(z), z)
        data, rows = self._data_and_rows(output, X)
        if not data or rows % data:
            raise ValueError(
                f"model_func: its {rows} rows of predictions are not a multiple of the {data} data "
                "in the batch, so that there is no gradient of a datum. Return one row, or equally "
                "many, for each entry of the first axis of X."
            )
        return gradient.reshape(1, data, -1)

    def _num_data(self, output: Tensor, X: Any, y: Any) -> Tensor | float:
        if not has_likelihood(self._loss_func):
            return float(batch_size(X, output, self._batch_size_fn))
        likelihood = likelihood_of(self._loss_func)
        # For targets that are unknown every term counts, with weight 1.
        share = likelihood.num_terms(output, y) / likelihood.num_terms(output, None)
        return share * self._data_and_rows(output, X)[0]

    def _data_and_rows(self, output: Tensor, X: Any) -> tuple[int, int]:
        """Return the number of data and of rows of predictions: 1 without an axis of data."""
        known = has_likelihood(self._loss_func)
        if not output.ndim or (known and not likelihood_of(self._loss_func).has_data_axis(output)):
            return 1, 1
        return batch_size(X, output, self._batch_size_fn), output.shape[0]

    def _scale(self, normalizer: Tensor | float, num_data: Tensor | float) -> Tensor | float:
        """Return N / Z² for the mean: c = 1/N times (N / Z)² from the two gradients."""
        return num_data / normalizer**2 if self._reduction == "mean" else 1.0
