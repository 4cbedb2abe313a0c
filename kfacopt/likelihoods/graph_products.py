"""Products with ∂²L/∂z² through the graph from z to L, which stays alive; z may be any edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class GraphPiece:
    """The piece of graph between L and tensors z: L as a function of z, all else held fixed.

    A derivative by one of them leaves out what goes through another one: a backward pass ends at
    each of them.

    Args:
        loss: L, a tensor with its graph.
        edges: Where the graph meets z.
        upstream: The derivative of the objective by L; 1 where it is `None`.
        others: Further nodes at which backward passes end.
        twice: Whether products with the second derivative will be asked for.

    Attributes:
        gradients: ∂L/∂z, `None` for what L does not depend on.
    """

    def __init__(
        self,
        loss: Tensor | GradientEdge,
        edges: Sequence[GradientEdge | Tensor],
        upstream: Tensor | None = None,
        others: Sequence[Any] = (),
        twice: bool = True,
    ) -> None:
        self._edges = [get_gradient_edge(e) if isinstance(e, Tensor) else e for e in edges]
        self._cut = [*dict.fromkeys([e.node for e in self._edges]), *others]
        options = {"create_graph": twice, "retain_graph": True, "allow_unused": True}
        with self._ended(), torch.enable_grad():
            found = torch.autograd.grad(loss, self._edges, upstream, **options)
        self.gradients: list[Tensor | None] = [None if g is None else g.detach() for g in found]
        self._sources = [(i, g) for i, g in enumerate(found) if g is not None and g.requires_grad]

    def is_flat(self) -> bool:
        """Tell whether H is 0: a product with a vector without zeros is."""
        draws = torch.Generator().manual_seed(0)
        vectors = [
            None if g is None else (torch.rand(g.shape, generator=draws) + 0.5).to(g)
            for g in self.gradients
        ]
        return not any(bool(h.any()) for h in self.product(vectors))

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """Let backward passes end at z."""
        handles = [
            node.register_prehook(_end)
            for node in self._cut
            if type(node).__name__ != "AccumulateGrad"
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def product(self, vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return H v, 0 where z has no gradient.

        Args:
            vectors: v for each z, or `[V, *z.shape]` V of them; `None` where z has no gradient.

        Raises:
            RuntimeError: If an operation has no second derivative.
        """
        zeros = [torch.zeros(()) if v is None else torch.zeros_like(v) for v in vectors]
        outputs = [g for _, g in self._sources]
        if not outputs:
            return zeros
        given = [v for v in (vectors[i] for i, _ in self._sources) if v is not None]
        with self._ended():
            alone = given[0].ndim == outputs[0].ndim
            found = self._grad(outputs, given) if alone else self._batched(outputs, given)
        pairs = zip(found, zeros, strict=True)
        return [zero if h is None else h.detach() for h, zero in pairs]

    def _grad(
        self, outputs: Sequence[Tensor], vectors: Sequence[Tensor], **options: Any
    ) -> Sequence[Tensor | None]:
        options |= {"retain_graph": True, "allow_unused": True}
        return torch.autograd.grad(outputs, self._edges, vectors, **options)

    def _batched(
        self, outputs: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """All at once where torch can; some operations cannot, and are named by its error."""
        try:
            return self._grad(outputs, vectors, is_grads_batched=True)
        except (RuntimeError, NotImplementedError):
            rows = [self._grad(outputs, own) for own in zip(*vectors, strict=True)]
            columns = zip(*rows, strict=True)
            return [
                None if c[0] is None else torch.stack([x for x in c if x is not None])
                for c in columns
            ]


def _end(grads: Any) -> tuple[None, ...]:
    return (None,) * len(grads)
