"""A weight `[V, d]` that is looked up and multiplied: an embedding tied to the head behind it.

Its uses are of two kinds, with blocks that add up. Rows of W belong to outputs of the head, and to
tokens of the embedding:

    F = G_h ⊗ A_h + diag(p) ⊗ G_e

with the head's inputs' A_h `[d, d]` and output gradients' G_h `[V, V]`, the tokens' frequencies p,
and the gradients' G_e `[d, d]` by what is looked up. What is left out is what both gradients of one
datum have in common, as for other uses of one weight.

F is approximated by the one Kronecker product that has its trace and both its partial traces,

    F ≈ R ⊗ C / t,   R = tr(A_h) G_h + tr(G_e) diag(p),   C = tr(G_h) A_h + tr(p) G_e,   t = tr F.

It is exact where one kind of use is there alone, and where the parts have a side in common, as they
nearly have here: frequent tokens are often looked up and often predicted. Symmetric, positive parts
give symmetric, positive sides. For positive matrices of trace 1 it is the product that is nearest
in relative entropy.

References:
    - Ren & Goldfarb (2021), https://arxiv.org/abs/2106.02925 (section 3: a covariance by its
      contractions along each axis, of one trace).
    - Modi et al. (2010), https://arxiv.org/abs/0911.5417 (the nearest product is that of the
      partial traces).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.layers.blocks import Layer
from kfacopt.kfac.layers.embedding import Embedding
from kfacopt.kfac.layers.matrix import Matrix

HEAD = "oi"  # how `Matrix` has its axes


@dataclass(frozen=True, eq=False)
class Lookup:
    """One call of `F.embedding`: what `Embedding` asks of a module.

    Attributes:
        weight: W `[V, d]`.
        padding_idx: The token by which W has no derivative; `None` for none.
    """

    weight: Parameter
    padding_idx: int | None


class FunctionalEmbedding(Embedding):
    """A matrix that is looked up without a module's call."""


class TiedEmbedding(Matrix):
    """The layout `[V, d]` of a tied weight; its parts say what its uses are."""

    def __init__(self) -> None:
        super().__init__(HEAD)


def functional_embedding(name: str, weight: Parameter) -> Layer:
    """Return the layer of a matrix that is looked up alone."""
    return Layer(name, weight, None, 1, False, FunctionalEmbedding())


def tied_embedding(name: str, weight: Parameter) -> Layer:
    """Return the layer of a matrix that is looked up and multiplied."""
    parts = (
        Layer(name, weight, None, 1, False, Matrix(HEAD)),
        functional_embedding(name, weight),
    )
    return Layer(name, weight, None, 1, False, TiedEmbedding(), parts)


def joined_factors(
    layer: Layer,
    factors: Mapping[Layer, tuple[Tensor, Tensor]],
    shapes: Callable[[Layer], tuple[tuple[int, ...], tuple[int, ...]]],
) -> tuple[Tensor, Tensor]:
    """Return A and G of a tied weight, of those of its parts, as far as these were used.

    Args:
        layer: The layer.
        factors: A and G of its parts, not all of them missing.
        shapes: Tells the shapes of a part's A and G.
    """
    some = next(iter(factors.values()))[0]
    pairs = []
    for part in layer.parts:
        A, G = (some.new_zeros(shape) for shape in shapes(part))
        pairs.append(factors.get(part, (A, G)))
    return one_product(*pairs)


def one_product(
    head: tuple[Tensor, Tensor], embedding: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return A `[1, d, d]` and G `[1, V, V]` of a tied weight; any of them may be its diagonal.

    A has the head's trace, or d without a head, and G the rest, so that a factor on the
    objective is G's alone.

    Args:
        head: A_h and G_h of the use as a head.
        embedding: diag(p) `[1, V]` and G_e of the use as an embedding.
    """
    (A, G), (p, own) = head, embedding
    traces = [_trace(x) for x in (A, G, p, own)]
    of_head, of_embedding = traces[0] * traces[1], traces[2] * traces[3]
    total = of_head + of_embedding
    columns = traces[1] * A + traces[2] * own
    rows = traces[0] * G
    if G.ndim == 3:
        rows.diagonal(dim1=-2, dim2=-1).add_(traces[3] * p)
    else:
        rows = rows + traces[3] * p
    size = torch.where(traces[0] > 0, traces[0], torch.full_like(total, A.shape[-1]))
    safe = torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(total > 0, columns * (size / safe), A), rows / size


def _trace(x: Tensor) -> Tensor:
    """Return the trace of `[1, d, d]`, or of the diagonal `[1, d]`."""
    return x.sum() if x.ndim == 2 else x[0].trace()
