"""Backward passes for many vectors at once; which vectors, and through what, others say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def batched_grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    vectors: Sequence[Tensor],
    *,
    like: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return vᵀ ∂outputs/∂inputs for K vectors; the graph stays alive.

    All K are backpropagated at once by `vmap`. Where an operation of the graph cannot be
    vectorised, they are backpropagated one after the other, with the same result.

    Args:
        outputs: Tensors with a graph.
        inputs: What is differentiated by.
        vectors: One `[K, *output.shape]` for each output.
        like: Tensors of the inputs' shapes, where these are gradient edges.

    Returns:
        One `[K, *input.shape]` for each input; zeros where no output depends on it.
    """
    columns = vectors[0].shape[0]
    shapes = [x for x in inputs if isinstance(x, Tensor)] if like is None else like
    grads = _vectorised_grad(outputs, inputs, vectors) if columns > 1 else None
    if grads is None:
        each = [
            torch.autograd.grad(
                outputs, inputs, [v[k] for v in vectors], retain_graph=True, allow_unused=True
            )
            for k in range(columns)
        ]
        grads = tuple(
            None if g[0] is None else torch.stack([x.to_dense() if x.is_sparse else x for x in g])
            for g in zip(*each, strict=True)
        )
    return [
        torch.zeros(columns, *x.shape, dtype=x.dtype, device=x.device) if g is None else g
        for g, x in zip(grads, shapes, strict=True)
    ]


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Silence what torch says of itself when it vectorises."""
    with warnings.catch_warnings():
        # vmap itself loops over an operation that has no batching rule, and says so.
        warnings.filterwarnings("ignore", "There is a performance drop")
        # Its forward-mode formulas are scripted when they are first needed.
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        yield


def _vectorised_grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    vectors: Sequence[Tensor],
) -> tuple[Tensor | None, ...] | None:
    with quiet_vmap():
        try:
            return torch.autograd.grad(
                outputs,
                inputs,
                vectors,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None
