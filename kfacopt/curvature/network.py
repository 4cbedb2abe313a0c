"""Passes over the data of all matrices of a network, with or without a loss; no derivatives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from kfacopt.argument_checks import as_integer
from kfacopt.curvature.graph_cache import GraphCache, measure_saved_bytes
from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.data import Batch, run_determinism_check, show_progress, some, to_device
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.tensor_lists import Shapes, split_rows

CHUNK_SIZE = 16
CACHE_BYTES = 2**30

# Where weights are shared over positions, gradients of single data are of the graph's size, and
# their products save the positions. Where there are many for each datum, or a dense block for a
# large weight that is not shared, they are larger, and bound by the memory's bandwidth.
_MAX_ROWS_PER_GRAPH = 32

T = TypeVar("T")


class NetworkLinearOperator(LinearOperator, Generic[T]):
    """A matrix that is made of one term for each batch of a data set.

    Args:
        model: f and θ.
        loss_func: The loss, if there is one.
        data: Batches `(X, y)`; may be iterated any number of times.
        progressbar: Show a bar during products.
        chunk_size: How many columns are multiplied at once.
        cache_bytes: How much memory the terms of a data set may take that are kept between
            products.
    """

    def __init__(
        self,
        model: ParametrizedModel,
        loss_func: Callable[[Tensor, Tensor], Tensor] | None,
        data: Iterable[Batch],
        progressbar: bool,
        chunk_size: int,
        cache_bytes: int,
    ) -> None:
        chunk_size = as_integer("chunk_size", chunk_size, 1)
        cache_bytes = as_integer("cache_bytes", cache_bytes, 0)
        self._model, self._loss_func, self._data = model, loss_func, data
        self._progressbar, self._chunk_size = progressbar, chunk_size
        seen: list[Any] = [model.function] if loss_func is None else [model.function, loss_func]
        modules = [m for m in seen if isinstance(m, nn.Module)]
        # Of a plain function nobody knows what else it depends on, and of a loader what comes next.
        in_memory = isinstance(data, list | tuple) and len(modules) == len(seen)
        self._cache = GraphCache[T](cache_bytes) if in_memory and cache_bytes else None
        self._modules = modules

    def _set_shape(
        self, rows: Shapes, columns: Shapes, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Finish the construction, once the shape is known."""
        sizes = [sum(torch.Size(s).numel() for s in shapes) for shapes in (rows, columns)]
        super().__init__((sizes[0], sizes[1]), dtype, device, columns, rows)

    def _check_deterministic(self) -> list[tuple[int, ...]]:
        """Check model and data; return the shapes of the predictions, batch by batch."""
        with self._model.evaluation():
            return run_determinism_check(self._data, self._model.device, self._model.predict)

    @abstractmethod
    def _make_term(self, X: Any, y: Any) -> T:
        """Prepare the products with one batch's term of the matrix."""

    def _visit_terms(self, action: Callable[[T], None]) -> None:
        """Call `action`, which takes products, with each term in data order."""
        self._model.refresh()
        kept = nullcontext() if self._cache is None else self._cache.use(self._seen())
        with kept, self._model.evaluation(self._loss_func):
            for index, batch in enumerate(self._batches()):
                if self._cache is None:
                    action(self._make_term(*self._to_device(*batch)))
                else:
                    self._visit_kept_term(self._cache, index, batch, action)

    def sources(self) -> list[Any]:
        """Return θ, model and loss."""
        self._model.refresh()
        return self._seen()

    def _seen(self) -> list[Any]:
        """Return what terms depend on, but for the data."""
        return [*self._model.leaves, self._model.function, self._loss_func]

    def _visit_kept_term(
        self, cache: GraphCache[T], index: int, batch: Batch, action: Callable[[T], None]
    ) -> None:
        term = cache.get(index, batch)
        if term is not None:
            self._resume(term)
            action(term)
        elif (graph := cache.size_of(index)) is not None:
            term, size = self._make_kept_term(*self._to_device(*batch), graph, cache.room())
            action(term)
            cache.offer(index, batch, term, size)
        else:
            known = [*self._model.leaves, *_tensors_in(self._modules, *batch)]
            term = None
            with measure_saved_bytes(known) as sizes:
                try:
                    term = self._make_term(*self._to_device(*batch))
                except RuntimeError as error:
                    if "saved tensor hooks" not in str(error):
                        raise
                else:
                    action(term)
            cache.note_size(sum(sizes))
            if term is None:  # torch.func within the model allows no measurement
                self._cache = None
                action(self._make_term(*self._to_device(*batch)))

    def _make_kept_term(self, X: Any, y: Any, size: int, room: int) -> tuple[T, int]:
        """Prepare a term that will be kept if it fits; return it and its size.

        Args:
            X: The inputs.
            y: The targets.
            size: How many bytes the graphs of the batch's term save.
            room: How many bytes may still be kept.
        """
        return self._make_term(X, y), size

    def _linearize_to_keep(self, X: Any, size: int, room: int) -> tuple[Linearization, int]:
        """Return the derivative of a batch that may keep J in place of graphs, and its size."""
        linearization = Linearization(self._model, X, watch=True)
        rows = linearization.keep_rows(largest_rows(size, room), self._chunk_size)
        return linearization, max(size, rows)

    def _resume(self, term: T) -> None:
        """Go on after a kept term as after one that was just made."""

    def _batches(self) -> Iterator[Batch]:
        return some(show_progress(self._data, self._progressbar, type(self).__name__))

    def _to_device(self, X: Any, y: Any) -> Batch:
        return to_device(X, self._model.device), to_device(y, self._model.device)

    def _chunks(self, num_columns: int) -> list[slice]:
        starts = range(0, num_columns, self._chunk_size)
        return [slice(start, start + self._chunk_size) for start in starts]


def leading_columns(X: Tensor, shapes: Shapes) -> list[Tensor]:
    """Return the columns of `X` `[D, K]` as one `[K, *shape]` for each shape."""
    # Contiguous once here, not for every operation that a piece takes part in.
    return [p.movedim(-1, 0).contiguous() for p in split_rows(X, shapes)]


def largest_rows(graph: int, room: int) -> int:
    """Return how many bytes gradients of single data may take in the place of a graph's bytes."""
    return min(_MAX_ROWS_PER_GRAPH * graph, room)


def add_rows(total: Tensor, chunk: slice, product: Sequence[Tensor], first: bool) -> None:
    """Add a product to the rows of a chunk of columns.

    Args:
        total: `[K, D]`, changed in place.
        chunk: Which of the K.
        product: One `[k, *shape]` for each parameter.
        first: Whether it takes the place of what is there.
    """
    stop = 0
    for piece in product:
        start, stop = stop, stop + piece[0].numel()
        rows, target = piece.reshape(piece.shape[0], -1), total[chunk, start:stop]
        target.copy_(rows) if first else target.add_(rows)


def _tensors_in(modules: Sequence[nn.Module], *others: Any) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
    yield from (x for x in others if isinstance(x, Tensor))
