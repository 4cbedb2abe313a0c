"""Lookups past the calls of `nn.Embedding`, found in the graph; products have another file."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter

from kfacopt.kfac.layers.tied import Lookup

LOOKUP = "EmbeddingBackward0"

# The roles of a matrix that is looked up alone, and of one that is multiplied, too: a tied one.
EMBEDDING, TIED = "e", "w"


def lookup_call(p: Parameter, node: Any) -> Lookup | None:
    """Return how a node looks up rows of a whole parameter; `None` if by their frequency.

    Args:
        p: W.
        node: A node of the name `LOOKUP`.
    """
    if node._saved_scale_grad_by_freq:
        return None
    padding = int(node._saved_padding_idx)
    return Lookup(p, padding if padding < len(p) else None)  # -1 comes out without its sign
