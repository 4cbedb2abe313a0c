"""Backward passes for many vectors at once; which vectors, and through what, others say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

T = TypeVar("T")


def if_possible(compute: Callable[[], T], failure: type[Exception] = RuntimeError) -> T | None:
    """Return a result, or `None` where torch cannot compute it; want of memory is an error.

    Args:
        compute: Returns the result.
        failure: What it raises if it is not possible.
    """
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except failure:
        return None


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
    grads: Sequence[Tensor | None] | None = None
    shapes = [x for x in inputs if isinstance(x, Tensor)] if like is None else like
    backward = partial(torch.autograd.grad, outputs, inputs, retain_graph=True, allow_unused=True)
    if columns > 1:
        with quiet_vmap():
            grads = if_possible(partial(backward, vectors, is_grads_batched=True))
    if grads is None:
        each = [backward([v[k] for v in vectors]) for k in range(columns)]
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
        warnings.filterwarnings("ignore", ".*torch.jit.script")
        yield


class GradientGraph:
    """The gradient of a scalar ⟨u, z⟩ as a function of what it depends on: of θ, and of u.

    Args:
        output: z, or a scalar, with its graph.
        leaves: θ.
        u: `[*z.shape]`; `None` for a scalar.
    """

    def __init__(self, output: Tensor, leaves: Sequence[Tensor], u: Tensor | None = None) -> None:
        grads = torch.autograd.grad(output, leaves, u, create_graph=True, allow_unused=True)
        # the others are zero, or constant
        self._parts = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]

    def multiply(self, V: Sequence[Tensor], by: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivatives of ⟨gradient, v⟩ by some tensors, `[K, *x.shape]` each.

        Args:
            V: Vectors `[K, *p.shape]` for each of θ.
            by: The tensors.
        """
        if not self._parts:
            return [x.new_zeros(V[0].shape[0], *x.shape) for x in by]
        return batched_grad([g for _, g in self._parts], by, [V[i] for i, _ in self._parts])
