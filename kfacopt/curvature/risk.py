"""What matrices of an empirical risk share: terms, sums, scale; not one batch's product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Parameter

from kfacopt.argument_checks import check_evaluation, check_loss, check_shape
from kfacopt.curvature.adjoint import Columns
from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.curvature.network import (
    CACHE_BYTES,
    CHUNK_SIZE,
    NetworkLinearOperator,
    add_rows,
    leading_columns,
)
from kfacopt.data import Batch, batch_size, check_terms, is_empty, sum_gradients
from kfacopt.likelihoods import has_likelihood, likelihood_of, with_sum

Product = Callable[[Columns], Columns]


@dataclass(frozen=True, eq=False)
class RiskTerm:
    """One batch's share of a curvature matrix, that of the *summed* loss.

    Attributes:
        product: Multiplies it onto lists of `[K, *p.shape]`.
        normalizer: What the batch adds to the Z that a mean divides by.
        num_data: How many data the loss counts in the batch.
        random_state: The generator's state after the term was made, if there is a generator.
    """

    product: Product
    normalizer: Tensor | float
    num_data: Tensor | float
    random_state: Tensor | None


def scalar_loss(loss_func: Any, output: Tensor, y: Any) -> Tensor:
    """Return a batch's loss, reduced as it says; raise if targets do not fit or it is no scalar."""
    if has_likelihood(loss_func):
        likelihood_of(loss_func).check_target(output, y)
    loss: Tensor = loss_func(output, y)
    if loss.numel() != 1:
        raise ValueError(
            f"loss_func must return a scalar, got the shape {tuple(loss.shape)}; set its "
            'reduction to "mean" or "sum".'
        )
    return loss.sum()


def summed_loss(
    loss_func: Any, output: Tensor, X: Any, y: Any, batch_size_fn: Callable[[Any], int] | None
) -> Tensor:
    """Return Z times a batch's mean loss, or its summed loss; a scalar.

    Args:
        loss_func: ℓ with its reduction.
        output: The predictions.
        X: The inputs, of which a mean counts the data.
        y: The targets.
        batch_size_fn: How it counts them, if X does not tell.

    Raises:
        ValueError: If the loss is no scalar, or a likelihood refuses the targets.
    """
    by_mean = getattr(loss_func, "reduction", None) == "mean"
    if by_mean and has_likelihood(loss_func):
        # Not the mean times Z: that is 0/0 for a batch whose targets are all ignored.
        loss_func, by_mean = with_sum(loss_func), False
    loss = scalar_loss(loss_func, output, y)
    return loss * batch_size(X, output, batch_size_fn) if by_mean else loss


class EmpiricalRiskLinearOperator(NetworkLinearOperator[RiskTerm]):
    """A curvature matrix of L(θ) = c Σ_n ℓ(f_θ(x_n), y_n), by its products.

    Args:
        model_func: f, a module or a function that maps inputs X to predictions.
        loss_func: ℓ with its reduction, maps predictions and targets to a scalar. For several
            batches it needs an attribute `reduction`, as the losses of `torch.nn` have.
        params: θ, the parameters of the matrix's rows and columns, in this order: a list of those
            that `model_func` uses; or, for a module, a dict of tensors that stand in for its own
            of the same names.
        data: Batches `(X, y)`; may be iterated any number of times. For `reduction="mean"` the
            risk is the mean over the data of all batches: over all terms that the loss counts for
            the losses of `kfacopt.likelihoods`, over all data for others.
        progressbar: Show a bar during products.
        check_deterministic: Check that data and model are deterministic, at the cost of two
            forward passes over the data.
        shape: The shape `(D, D)`; checked against the parameters.
        chunk_size: How many columns are multiplied at once. The memory of a product grows with
            it: a batch's activations, and the parameters, exist this many times over.
        cache_bytes: How many bytes of activations, or of Jacobians of single data where these are
            small, are kept from one product to the next, so that only what depends on the vector
            is computed. For data in a list and for modules as model and loss, and as long as no
            parameter, buffer, batch, hook or setting changes: what is found among the attributes
            of modules, in containers, NumPy arrays and plain objects. Attributes of classes, what
            functions and hooks close over or read from their module, and writes through `.data`
            to tensors outside of modules are not seen: switch it off with 0 where those change.
            The first product keeps nothing; the graph of a backward pass that a later product
            needs in addition is not counted.
        batch_size_fn: A function from X to the number of data in a batch, for inputs that do not
            tell it themselves (graphs, mappings whose tensors have first axes of several lengths).
            Only the empirical Fisher, and means of losses that `kfacopt.likelihoods` does not know,
            ask for it.

    Raises:
        RuntimeError: If the check for deterministic behavior fails.
        ValueError: If an argument contradicts another.
    """

    self_adjoint = True

    def __init__(
        self,
        model_func: Callable[[Tensor], Tensor],
        loss_func: Callable[[Tensor, Tensor], Tensor] | None,
        params: list[Parameter] | Mapping[str, Tensor],
        data: Iterable[Batch],
        progressbar: bool = False,
        check_deterministic: bool = True,
        shape: tuple[int, int] | None = None,
        *,
        chunk_size: int = CHUNK_SIZE,
        cache_bytes: int = CACHE_BYTES,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        check_evaluation(data, progressbar, check_deterministic, batch_size_fn)
        self._batch_size_fn = batch_size_fn
        model = ParametrizedModel(model_func, params)
        super().__init__(model, loss_func, data, progressbar, chunk_size, cache_bytes)
        shapes = [tuple(p.shape) for p in model.leaves]
        self._set_shape(shapes, shapes, model.leaves[0].dtype, model.device)
        check_shape(shape, self.shape)
        self._generator: Generator | None = None
        self._check_loss()
        if check_deterministic:
            self._check_deterministic()

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """Return the gradient of the risk L over all data, and L.

        Returns:
            One tensor `[*p.shape]` for each parameter, and a scalar.

        Raises:
            ValueError: If there are several batches and the loss does not say how it reduces them.
        """

        def terms() -> Iterator[tuple[Tensor, Tensor | float]]:
            count = 0
            for batch in self._batches():
                count += 1
                X, y = self._to_device(*batch)
                if not is_empty(X):
                    output = self._model(X)
                    yield self._summed_loss(X, y)(output), self._normalizer(output, X, y)
            self._check_reduction(count)

        self._model.refresh()
        with self._model.evaluation():
            return sum_gradients(self._model.leaves, terms(), self._reduction == "mean")

    @property
    def _reduction(self) -> str | None:
        """The loss's reduction, as it is now."""
        reduction: str | None = getattr(self._loss_func, "reduction", None)
        return reduction

    def _check_loss(self) -> None:
        if self._loss_func is None:
            raise ValueError(f"loss_func: {type(self).__name__} needs a loss function, got None.")
        check_loss(self._loss_func)

    def _summed_loss(self, X: Any, y: Any) -> Callable[[Tensor], Tensor]:
        """Return `summed_loss` as a function of the predictions, without a reference to self.

        What is kept must not refer to the operator, which keeps it.
        """
        return partial(summed_loss, self._loss_func, X=X, y=y, batch_size_fn=self._batch_size_fn)

    def _normalizer(self, output: Tensor, X: Any, y: Any) -> Tensor | float:
        """Return what a batch adds to Z, where L is the summed loss over Z."""
        if self._reduction != "mean":
            return 1.0
        if has_likelihood(self._loss_func):
            return likelihood_of(self._loss_func).normalizer(output.detach(), y)
        return float(batch_size(X, output, self._batch_size_fn))

    def _num_data(self, output: Tensor, X: Any, y: Any) -> Tensor | float:
        """Return how many data are in a batch; not needed unless `_scale` asks for it."""
        return 0.0

    def _scale(self, normalizer: Tensor | float, num_data: Tensor | float) -> Tensor | float:
        """Return what the sum over the data is multiplied by."""
        return 1.0 / normalizer if self._reduction == "mean" else 1.0

    @abstractmethod
    def _batch_product(self, linearization: Linearization, X: Any, y: Any) -> Product:
        """Return the product with the matrix of one batch's summed loss."""

    def _make_term(self, X: Any, y: Any) -> RiskTerm:
        if is_empty(X):
            return self._empty_term()
        linearization = Linearization(self._model, X)
        return self._weigh(self._batch_product(linearization, X, y), linearization.output, X, y)

    def _make_kept_term(self, X: Any, y: Any, size: int, room: int) -> tuple[RiskTerm, int]:
        if is_empty(X):
            return self._empty_term(), 0
        linearization, size = self._linearize_to_keep(X, size, room)
        product = self._batch_product(linearization, X, y)
        return self._weigh(product, linearization.output, X, y), size

    def _empty_term(self) -> RiskTerm:
        """Return the term of a batch without data, with which models and losses may not cope."""

        def product(V: Columns) -> Columns:
            return [torch.zeros_like(v) for v in V]

        state = None if self._generator is None else self._generator.get_state()
        return RiskTerm(product, 0.0, 0.0, state)

    def _weigh(self, product: Product, output: Tensor, X: Any, y: Any) -> RiskTerm:
        state = None if self._generator is None else self._generator.get_state()
        weights = self._normalizer(output, X, y), self._num_data(output.detach(), X, y)
        return RiskTerm(product, *weights, state)

    def _resume(self, term: RiskTerm) -> None:
        if self._generator is not None and term.random_state is not None:
            self._generator.set_state(term.random_state)

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        assert self.in_shapes is not None
        columns, weights = leading_columns(X, self.in_shapes), list[tuple[Any, Any]]()
        total = X.new_empty(X.shape[1], X.shape[0])  # [K, D]

        def add(term: RiskTerm) -> None:
            for chunk in self._chunks(X.shape[1]):
                product = term.product([c[chunk] for c in columns])
                add_rows(total, chunk, product, first=not weights)
            # not the product, which would keep the graph of every batch alive
            weights.append((term.normalizer, term.num_data))

        self._visit_terms(add)
        self._check_reduction(len(weights))
        normalizer, num_data = map(sum, zip(*weights, strict=True))
        if self._reduction == "mean":
            check_terms(normalizer)
        return total.mul_(self._scale(normalizer, num_data)).mT

    def _check_reduction(self, num_batches: int) -> None:
        if self._reduction not in ("mean", "sum") and num_batches > 1:
            raise ValueError(
                "loss_func: for several batches it must have an attribute `reduction` that is "
                f'"mean" or "sum", got {self._reduction!r}; set loss_func.reduction.'
            )
