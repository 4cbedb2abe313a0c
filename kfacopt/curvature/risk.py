"""What the curvature matrices of an empirical risk have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.data import Batch, batch_size, evaluation, iterate, run_determinism_check
from kfacopt.likelihoods import SUPPORTED_LOSSES, likelihood_of
from kfacopt.linalg.operator import LinearOperator, split_rows


class EmpiricalRiskLinearOperator(LinearOperator):
    """A curvature matrix of L(θ) = c Σ_n ℓ(f_θ(x_n), y_n), by its products.

    Args:
        model_func: f, a module or a function that maps inputs X to predictions.
        loss_func: ℓ with its reduction, maps predictions and targets to a scalar. For several
            batches it needs an attribute `reduction`, as the losses of `torch.nn` have.
        params: θ, the parameters of the matrix's rows and columns, in this order.
        data: Batches `(X, y)`; may be iterated any number of times. For `reduction="mean"` the
            risk is the mean over the data of all batches: over all terms that the loss counts for
            the losses of `kfacopt.likelihoods`, over all data for others.
        progressbar: Show a bar during products.
        check_deterministic: Check that data and model are deterministic, at the cost of two
            forward passes over the data.
        shape: The shape `(D, D)`; checked against the parameters.

    Raises:
        RuntimeError: If the check for deterministic behavior fails.
        ValueError: If an argument contradicts another.
    """

    def __init__(
        self,
        model_func: Callable[[Tensor], Tensor],
        loss_func: Callable[[Tensor, Tensor], Tensor] | None,
        params: list[Parameter],
        data: Iterable[Batch],
        progressbar: bool = False,
        check_deterministic: bool = True,
        shape: tuple[int, int] | None = None,
    ) -> None:
        self._params = list(params)
        if not self._params:
            raise ValueError("params: at least one parameter is needed.")
        for i, p in enumerate(self._params):
            if not p.requires_grad:
                raise ValueError(f"params[{i}] does not require gradients.")
        shapes = [tuple(p.shape) for p in self._params]
        size = sum(p.numel() for p in self._params)
        if shape is not None and tuple(shape) != (size, size):
            raise ValueError(f"shape must be {(size, size)} for these params, got {shape}.")
        first = self._params[0]
        super().__init__((size, size), first.dtype, first.device, shapes, shapes)
        self._model_func, self._loss_func, self._data = model_func, loss_func, data
        self._progressbar = progressbar
        self._check_loss()
        if check_deterministic:
            with evaluation(model_func):
                run_determinism_check(data, self.device, model_func)

    def _check_loss(self) -> None:
        if self._loss_func is None:
            raise ValueError(f"loss_func: {type(self).__name__} needs a loss function.")

    def _loss(self, output: Tensor, y: Tensor) -> Tensor:
        assert self._loss_func is not None
        loss = self._loss_func(output, y)
        if loss.numel() != 1:
            raise ValueError(
                f"loss_func must return a scalar, got the shape {tuple(loss.shape)}; set its "
                'reduction to "mean" or "sum".'
            )
        return loss.sum()

    def _batch_weight(self, output: Tensor, X: Any, y: Tensor) -> Tensor | float:
        """Return what a batch's loss counts in a mean over batches (unnormalised)."""
        if isinstance(self._loss_func, SUPPORTED_LOSSES):
            return likelihood_of(self._loss_func).normalizer(output.detach(), y)
        return float(batch_size(X))

    @abstractmethod
    def _batch_matmat(self, output: Tensor, y: Tensor, X: list[Tensor]) -> list[Tensor]:
        """Multiply one batch's matrix onto lists of `[K, *p.shape]`.

        Args:
            output: The predictions, with their graph.
            y: The targets.
            X: One tensor `[K, *p.shape]` for each parameter.

        Returns:
            The products, in the same form.
        """

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        assert self.in_shapes is not None
        pieces = [p.movedim(-1, 0) for p in split_rows(X, self.in_shapes)]
        total = [torch.zeros_like(p) for p in pieces]
        weights: list[Tensor | float] = []
        reduction = getattr(self._loss_func, "reduction", None)
        with evaluation(self._model_func):
            for inputs, y in iterate(
                self._data, self.device, self._progressbar, type(self).__name__
            ):
                output = self._model_func(inputs)
                product = self._batch_matmat(output, y, pieces)
                weight = 1.0 if reduction == "sum" else self._batch_weight(output, inputs, y)
                weights.append(weight)
                total = [t.add_(weight * p) for t, p in zip(total, product, strict=True)]
        if reduction != "sum":
            if reduction != "mean" and len(weights) > 1:
                raise ValueError(
                    "loss_func: for several batches it must have an attribute `reduction` that is "
                    f'"mean" or "sum", got {reduction!r}; set loss_func.reduction.'
                )
            normalizer = sum(weights)
            total = [t / normalizer for t in total]
        return torch.cat([t.flatten(1) for t in total], dim=1).mT

    def _jvp(self, output: Tensor, X: Sequence[Tensor]) -> Tensor:
        """Return J x `[K, *z.shape]` as the derivative of u ↦ Jᵀ u, which is linear in u."""
        u = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(
            output, self._params, u, create_graph=True, retain_graph=True, allow_unused=True
        )
        used = [(g, x) for g, x in zip(pulled, X, strict=True) if g is not None and g.requires_grad]
        if not used:
            return output.new_zeros(X[0].shape[0], *output.shape)
        grads, vectors = zip(*used, strict=True)
        (result,) = torch.autograd.grad(grads, u, vectors, is_grads_batched=True)
        return result

    @staticmethod
    def _vjp(output: Tensor, inputs: Sequence[Tensor], U: Tensor) -> list[Tensor]:
        """Return Jᵀ u for the K cotangents `U` `[K, *z.shape]`, by input."""
        grads = torch.autograd.grad(
            output, inputs, U, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        return [
            torch.zeros(U.shape[0], *x.shape, dtype=x.dtype, device=x.device) if g is None else g
            for g, x in zip(grads, inputs, strict=True)
        ]
