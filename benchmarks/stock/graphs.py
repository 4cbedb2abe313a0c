"""Graph networks of torch-geometric: classes of nodes and of graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.stock.architecture import CLASSES, Architecture, Training, batches

NODES, EDGES, WIDTH, RELATIONS = 60, 240, 16, 3


def _graph(generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return nodes, edges, kinds of edges and classes: most edges join nodes of one class."""
    labels = torch.randint(CLASSES, (NODES,), generator=generator)
    pairs = torch.randint(NODES, (2, 4 * EDGES), generator=generator)
    kept = (labels[pairs[0]] == labels[pairs[1]]) | (
        torch.rand(4 * EDGES, generator=generator) < 0.1
    )
    edges = pairs[:, kept]
    nodes = F.one_hot(labels, WIDTH) + torch.randn(NODES, WIDTH, generator=generator)
    kinds = torch.randint(RELATIONS, (edges.shape[1],), generator=generator)
    return nodes, edges, kinds, labels


class _Convolutions(nn.Module):
    """Two graph convolutions with a ReLU between.

    Args:
        make: Makes one of widths in and out.
        typed: Whether it gets the kinds of the edges.
    """

    def __init__(self, make: Callable[[int, int], nn.Module], typed: bool) -> None:
        super().__init__()
        self.first, self.second, self.typed = make(WIDTH, 32), make(32, CLASSES), typed

    def forward(self, nodes: Tensor, edges: Tensor, kinds: Tensor) -> Tensor:
        more = (kinds,) if self.typed else ()
        return self.second(F.relu(self.first(nodes, edges, *more)), edges, *more)


def _train(make: Callable[[], nn.Module]) -> Training:
    network = make()

    def loss(batch: Any) -> Tensor:
        nodes, edges, kinds, labels = batch
        return F.cross_entropy(network(nodes, edges, kinds), labels)

    return Training(network, batches(_graph), loss)


def _convolutions(kind: str, typed: bool, settings: dict[str, Any]) -> nn.Module:
    from torch_geometric import nn as layers

    return _Convolutions(lambda i, o: getattr(layers, kind)(i, o, **settings), typed)


def _isomorphism() -> nn.Module:
    from torch_geometric.nn import GINConv

    def layer(width: int, out: int) -> nn.Module:
        return GINConv(
            nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, out)), train_eps=True
        )

    return _Convolutions(layer, False)


def _row(
    name: str,
    kind: str,
    typed: bool = False,
    **settings: Any,
) -> Architecture:
    make = partial(_convolutions, kind, typed, settings)
    return Architecture(name, "torch_geometric", partial(_train, make))


ARCHITECTURES = [
    _row("GCN", "GCNConv"),
    _row("GraphSAGE", "SAGEConv"),
    _row("GAT", "GATConv", heads=2, concat=False),
    _row("GATv2", "GATv2Conv", heads=2, concat=False),
    _row("Graph transformer", "TransformerConv", heads=2, concat=False),
    _row("Chebyshev", "ChebConv", K=3),
    _row(
        "R-GCN",
        "RGCNConv",
        True,
        num_relations=RELATIONS,
    ),
    Architecture("GIN", "torch_geometric", partial(_train, _isomorphism)),
]
