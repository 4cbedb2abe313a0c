"""The Jacobian of a network's predictions, and its transpose, as operators; no loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.argument_checks import check_evaluation, checked_output
from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.curvature.network import (
    CACHE_BYTES,
    CHUNK_SIZE,
    NetworkLinearOperator,
    add_rows,
    leading_columns,
)
from kfacopt.data import Batch
from kfacopt.linalg.tensor_lists import Shapes


class JacobianLinearOperator(NetworkLinearOperator[Linearization]):
    r"""The Jacobian of all predictions by the parameters, `[N C, D]`.

    For a model f(x, θ) with C outputs and the N data of all batches, in their order,

        [J]_{(n, c), d} = ∂[f(x_n, θ)]_c / ∂θ_d.

    Rows are the predictions as torch flattens them, batch after batch. Its products are in forward
    mode, those with its transpose in reverse mode. `J @ [tensors]`, one `[*p.shape]` for each
    parameter, gives a list of one tensor, with the shape `[N, ...]` of the predictions.

    Args:
        model_func: f, a module or a function that maps inputs X to predictions.
        params: θ, a list of the parameters that `model_func` uses; or, for a module, a dict of
            tensors that stand in for its own of the same names.
        data: Batches `(X, y)`, in the same order whenever they are iterated; y is not used.
        progressbar: Show a bar during products.
        check_deterministic: Check that data and model are deterministic, at the cost of two
            forward passes over the data. Without, one finds out how many predictions there are.
        chunk_size: How many columns are multiplied at once, which bounds the memory.
        cache_bytes: How many bytes of activations are kept between products; see
            `EmpiricalRiskLinearOperator`.

    Raises:
        RuntimeError: If the check for deterministic behavior fails.
        ValueError: If an argument contradicts another.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, X = nn.Linear(3, 1, bias=False), torch.rand(8, 3)
        >>> J = JacobianLinearOperator(model, list(model.parameters()), [(X, None)])
        >>> J.shape
        (8, 3)
        >>> torch.allclose(J @ torch.eye(3), X)
        True
    """

    def __init__(
        self,
        model_func: Callable[[Tensor], Tensor],
        params: list[Parameter] | Mapping[str, Tensor],
        data: Iterable[Batch],
        progressbar: bool = False,
        check_deterministic: bool = True,
        *,
        chunk_size: int = CHUNK_SIZE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        check_evaluation(data, progressbar, check_deterministic)
        model = ParametrizedModel(model_func, params)
        super().__init__(model, None, data, progressbar, chunk_size, cache_bytes)
        predictions = self._check_deterministic() if check_deterministic else self._predict()
        trailing = {shape[1:] for shape in predictions}
        if len(trailing) == 1 and all(predictions):
            self._rows: tuple[int, ...] = (sum(shape[0] for shape in predictions), *trailing.pop())
        else:
            self._rows = (sum(torch.Size(shape).numel() for shape in predictions),)
        self._params = [tuple(p.shape) for p in model.leaves]
        self._set_shape(*self._axes(), model.leaves[0].dtype, model.device)

    def _axes(self) -> tuple[Shapes, Shapes]:
        """Return the shapes of the tensors that make up rows and columns."""
        return [self._rows], self._params

    def _predict(self) -> list[tuple[int, ...]]:
        """Return the shapes of the predictions, by one pass over the data."""
        with self._model.evaluation():  # with graphs, for models that differentiate by their input
            return [
                tuple(checked_output(self._model.predict(self._to_device(X, y)[0])).shape)
                for X, y in self._batches()
            ]

    def _check_rows(self, count: int) -> None:
        """Raise if the data do not have as many predictions as when the operator was made."""
        if count != (expected := torch.Size(self._rows).numel()):
            raise ValueError(
                f"data: there were {expected} predictions when the operator was made, there are "
                f"{count} now; make a new operator."
            )

    def _make_term(self, X: Any, y: Any) -> Linearization:
        return Linearization(self._model, X)

    def _make_kept_term(self, X: Any, y: Any, size: int, room: int) -> tuple[Linearization, int]:
        return self._linearize_to_keep(X, size, room)

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        """Return J X `[N C, K]` for `X` `[D, K]`."""
        rows: list[Tensor] = []
        columns = leading_columns(X, self._params)

        def add(term: Linearization) -> None:
            chunks = [term.jvp([c[chunk] for c in columns]) for chunk in self._chunks(X.shape[1])]
            if not (width := term.output.numel()):
                rows.append(X.new_zeros(0, X.shape[1]))
                return
            empty = X.new_zeros(0, width)
            rows.append(torch.cat([empty, *(c.reshape(-1, width) for c in chunks)]).mT)

        self._visit_terms(add)
        self._check_rows(sum(len(r) for r in rows))
        return torch.cat(rows)

    def _rmatmat_tensor(self, X: Tensor) -> Tensor:
        """Return Jᵀ X `[D, K]` for `X` `[N C, K]`."""
        sizes = [torch.Size(shape).numel() for shape in self._params]
        total = X.new_zeros(X.shape[1], sum(sizes))  # [K, D]
        start = 0

        def add(term: Linearization) -> None:
            nonlocal start
            stop = start + term.output.numel()
            if stop > len(X):
                self._check_rows(stop)
            if stop == start:
                return
            for chunk in self._chunks(X.shape[1]):
                cotangents = X[start:stop, chunk].mT.contiguous().reshape(-1, *term.output.shape)
                add_rows(total, chunk, term.vjp(cotangents), first=start == 0)
            start = stop

        self._visit_terms(add)
        self._check_rows(start)
        return total.mT


class TransposedJacobianLinearOperator(JacobianLinearOperator):
    r"""The transpose of the Jacobian of all predictions by the parameters, `[D, N C]`.

    With the notation of `JacobianLinearOperator`, whose arguments it has,

        [Jᵀ]_{d, (n, c)} = ∂[f(x_n, θ)]_c / ∂θ_d.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, X = nn.Linear(3, 1, bias=False), torch.rand(8, 3)
        >>> JT = TransposedJacobianLinearOperator(model, list(model.parameters()), [(X, None)])
        >>> JT.shape
        (3, 8)
        >>> torch.allclose(JT @ torch.eye(8), X.T)
        True
    """

    def _axes(self) -> tuple[Shapes, Shapes]:
        return self._params, [self._rows]

    _matmat_tensor = JacobianLinearOperator._rmatmat_tensor
    _rmatmat_tensor = JacobianLinearOperator._matmat_tensor
