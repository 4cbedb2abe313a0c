"""The Fisher by Monte-Carlo samples; what is drawn says `likelihoods`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Parameter

from kfacopt.argument_checks import as_integer, check_count
from kfacopt.curvature.network import CACHE_BYTES, CHUNK_SIZE
from kfacopt.curvature.outer_products import OuterProductLinearOperator
from kfacopt.data import Batch, batch_size
from kfacopt.likelihoods import has_likelihood, likelihood_of
from kfacopt.likelihoods.loss_parts import exact_part, no_curvature, uncompiled


class FisherMCLinearOperator(OuterProductLinearOperator):
    r"""The Fisher of an empirical risk, by labels that are sampled from the model.

    For L(θ) = c Σ_n ℓ(f_n, y_n) with f_n = f_θ(x_n), ℓ(f, y) = −log q(y | f), and c = 1/N for
    `reduction="mean"` and 1 for `"sum"`,

        F = c Σ_n J_nᵀ E[(∇_f ℓ(f_n, ỹ_n)) (∇_f ℓ(f_n, ỹ_n))ᵀ] J_n,    ỹ_n ~ q(· | f_n),

    whose expectation is replaced by the mean over M samples. In expectation over the seed it is F,
    which for the named losses is the GGN. `NLLLoss` at log-probabilities gives the Fisher of
    the cross entropy at the logits before.

    The operator is one fixed sample of the estimator: its generator is seeded anew for each
    product, and draws labels in the order of the data, in one call per batch and sample. Make
    operators with different seeds for different samples. A product costs one J v and one Jᵀ u per
    column, whatever M is.

    Args:
        model_func: f, a module or a function that maps inputs X to predictions `[N, ...]`.
        loss_func: `nn.MSELoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss` or `NLLLoss`; or any
            other, as for `KFACLinearOperator`: vectors v with E[v vᵀ] the positive part of the
            loss's Hessian at f are then drawn in the place of gradients. For several batches it
            needs an attribute `reduction`, as for `EmpiricalRiskLinearOperator`.
        params: θ, as for `EmpiricalRiskLinearOperator`.
        data: Batches `(X, y)`, in the same order whenever they are iterated.
        progressbar: Show a bar during products.
        check_deterministic: Check that data and model are deterministic.
        seed: Seeds the generator at the beginning of each product.
        mc_samples: M, the number of labels that are drawn for each datum.
        chunk_size: As for `EmpiricalRiskLinearOperator`.
        cache_bytes: As for `EmpiricalRiskLinearOperator`.
        batch_size_fn: As for `EmpiricalRiskLinearOperator`; never asked.

    Raises:
        UnsupportedLossError: (a `NotImplementedError`) If the loss has no exact curvature, or none
            at all, in a product.
        RuntimeError: If the check for deterministic behavior fails.
        ValueError: If an argument contradicts another.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 3)
        >>> data = [(torch.rand(8, 4), torch.randint(3, (8,)))]
        >>> args = model, nn.CrossEntropyLoss(), list(model.parameters()), data
        >>> F = FisherMCLinearOperator(*args, mc_samples=10)
        >>> v = torch.ones(15)
        >>> torch.equal(F @ v, F @ v)
        True

    References:
        Martens (2020), https://arxiv.org/abs/1412.1193, sections 5 and 9.
    """

    _curved = False  # whether a batch was found to have curvature

    def __init__(
        self,
        model_func: Callable[[Tensor], Tensor],
        loss_func: Callable[[Tensor, Any], Tensor],
        params: list[Parameter] | Mapping[str, Tensor],
        data: Iterable[Batch],
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        mc_samples: int = 1,
        *,
        chunk_size: int = CHUNK_SIZE,
        cache_bytes: int = CACHE_BYTES,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        check_count("mc_samples", mc_samples)
        seed = as_integer("seed", seed, -(2**63), 2**64 - 1)
        loss_func = uncompiled(loss_func)
        given = (model_func, loss_func, params, data, progressbar, check_deterministic)
        super().__init__(
            *given, chunk_size=chunk_size, cache_bytes=cache_bytes, batch_size_fn=batch_size_fn
        )
        self._seed, self._mc_samples = seed, mc_samples

    def _check_loss(self) -> None:
        super()._check_loss()
        known = has_likelihood(self._loss_func)
        if self._reduction not in ("mean", "sum") and (known or self._reduction == "none"):
            raise ValueError(
                f'loss_func: reduction must be "mean" or "sum", got {self._reduction!r}.'
            )
        if known:
            likelihood_of(self._loss_func)  # refuses options that are not supported, by name

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        self._generator = Generator(self.device).manual_seed(self._seed)
        product = super()._matmat_tensor(X)
        if not (self._curved or has_likelihood(self._loss_func)):
            raise no_curvature(self._loss_func)
        return product

    def _seen(self) -> list[Any]:
        return [*super()._seen(), self._seed, self._mc_samples]

    def _output_vectors(self, output: Tensor, X: Any, y: Any) -> Tensor:
        assert self._generator is not None
        if not has_likelihood(self._loss_func):
            return self._found_vectors(output, X, y)
        likelihood = likelihood_of(self._loss_func)
        weights = likelihood.term_weights(output, y) / self._mc_samples
        samples = [
            likelihood.sample_gradient(output, weights, self._generator)
            for _ in range(self._mc_samples)
        ]
        rows = output.shape[0] if likelihood.has_data_axis(output) else 1
        return torch.stack(samples).reshape(self._mc_samples, rows, -1)

    def _found_vectors(self, output: Tensor, X: Any, y: Any) -> Tensor:
        assert self._generator is not None
        assert self._loss_func is not None
        by_mean = self._reduction == "mean"
        count = batch_size(X, output, self._batch_size_fn) if by_mean else 1
        part = exact_part(self._loss_func, output, y, count)
        if part is None:
            return output.new_zeros(1, 1, output.numel())
        self._curved = True
        samples = [v for (v,) in part.vectors("mc", self._mc_samples, self._generator)]
        return torch.stack(samples).to(output.dtype).reshape(len(samples), part.num_rows, -1)
