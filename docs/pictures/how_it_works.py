"""Draw what K-FAC keeps of the curvature: `python docs/pictures/how_it_works.py`.

The GGN of a network of three layers, its diagonal blocks, and K-FAC's Kronecker products, entry by
entry, and what the steps by them have in common with the exact damped step.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from PIL import Image
from torch import nn
from torch.nn import functional as F

from kfacopt import GGNLinearOperator, KFACLinearOperator, KFACOptimizer

DAMPING, STEPS, DATA, COLOURS = 1e-3, 50, 256, 40
PICTURE = Path(__file__).with_suffix(".png")


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    X = torch.randn(DATA, 6)
    y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 0.5).long()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = KFACOptimizer(model.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()

    params, data, loss_func = list(model.parameters()), [(X, y)], nn.CrossEntropyLoss()
    gradient = torch.autograd.grad(loss_func(model(X), y), params)
    g = torch.cat([t.flatten() for t in gradient])
    exact = GGNLinearOperator(model, loss_func, params, data) @ torch.eye(len(g))
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    kfac = KFACLinearOperator(model, loss_func, params, data, **options) @ torch.eye(len(g))
    blocks = torch.zeros_like(exact)
    ends = torch.tensor([sum(p.numel() for p in layer.parameters()) for layer in model[::2]])
    edges = [0, *ends.cumsum(0).tolist()]
    for start, end in itertools.pairwise(edges):
        blocks[start:end, start:end] = exact[start:end, start:end]

    best = torch.linalg.solve(exact + DAMPING * torch.eye(len(g)), g)
    identity = exact.trace() / len(g) * torch.eye(len(g))
    shown = {
        "exact GGN": exact,
        "its diagonal blocks": blocks,
        "K-FAC: G ⊗ A of each layer": kfac,
        "gradient descent: a multiple of I": identity,
    }
    top = exact.abs().max().item()
    figure, axes = plt.subplots(1, len(shown), figsize=(11, 3.3))
    for axis, (title, matrix) in zip(axes, shown.items(), strict=True):
        step = torch.linalg.solve(matrix + DAMPING * torch.eye(len(g)), g)
        cosine = F.cosine_similarity(step, best, dim=0).item()
        scale = LogNorm(1e-4 * top, top)
        axis.imshow(matrix.abs().clamp_min(1e-4 * top), cmap="magma", norm=scale)
        for edge in edges[1:-1]:
            axis.axhline(edge - 0.5, color="white", linewidth=0.6)
            axis.axvline(edge - 0.5, color="white", linewidth=0.6)
        axis.set(title=title, xticks=[], yticks=[])
        axis.title.set_fontsize("medium")
        axis.set_xlabel(f"cosine of its step to the exact one: {cosine:.2f}", fontsize="small")
        print(f"{title:<36}{cosine:.3f}")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)
    Image.open(PICTURE).convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
