"""Physics-informed networks whose derivatives by the input are propagated forward.

A network maps a point to (u, ∂₁u, ∂₂u, Lu) with L = Σ_i c_i ∂_i², by Taylor mode: a linear layer
maps each component by its weight, and h = tanh(z) gives, with σ' = 1 − h² and σ'' = −2 h σ',

    ∂_i h = σ' ∂_i z,    L h = σ' L z + σ'' Σ_i c_i (∂_i z)².

The components are a shared axis of ordinary `nn.Linear` layers and the residual is the model's
output, so that its curvature under MSE is what every K-FAC sees. The bias is the weight's last
column, whose input is 1 for u and 0 for the derivatives.

References:
    Dangel, Müller & Zeinhofer (2024), https://arxiv.org/abs/2405.15603.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, repeated

WIDTHS = (2, 48, 48, 48, 1)
INTERIOR, BOUNDARY, BOUNDARY_WEIGHT = 400, 80, 10.0
VALUE, FIRST, SECOND, OPERATOR = range(4)


class TaylorNetwork(nn.Module):
    """A tanh MLP of two inputs that also gives derivatives by its inputs.

    Args:
        widths: From 2 inputs to 1 output.
        coefficients: c₁ and c₂ of the second-order operator.
    """

    def __init__(self, widths: tuple[int, ...], coefficients: tuple[float, float]) -> None:
        super().__init__()
        sizes = pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a + 1, b, bias=False) for a, b in sizes)
        self.register_buffer("coefficients", torch.tensor(coefficients))

    def forward(self, X: Tensor, derivatives: bool = True) -> Tensor:
        """Map points `[N, 2]` to `[N, 4]`, or to u alone, `[N, 1]`."""
        components = 4 if derivatives else 1
        x = X.new_zeros(len(X), components, 2)
        x[:, VALUE] = X
        if derivatives:
            x[:, FIRST, 0] = x[:, SECOND, 1] = 1
        one = X.new_zeros(len(X), components, 1)
        one[:, VALUE] = 1
        z = self.layers[0](torch.cat([x, one], -1))
        for layer in list(self.layers)[1:]:
            z = layer(torch.cat([self._tanh(z), one], -1))
        components_of_u: Tensor = z.squeeze(-1)
        return components_of_u

    def _tanh(self, z: Tensor) -> Tensor:
        h = z[:, :1].tanh()
        if z.shape[1] == 1:
            return h
        slope = 1 - h**2
        first = z[:, FIRST:OPERATOR]
        squares = torch.einsum("i,nid->nd", self.coefficients, first**2).unsqueeze(1)
        return torch.cat([h, slope * first, slope * z[:, OPERATOR:] - 2 * h * slope * squares], 1)


def _border(count: int, generator: Generator, initial: bool) -> Tensor:
    """Return points `[count, 2]` on the square's sides, without the last one for a final time."""
    sides = torch.arange(count) % (3 if initial else 4)
    along = torch.rand(count, generator=generator, dtype=torch.float64)
    fixed = (sides == 1).to(along)  # sides 0 and 1: first coordinate 0 and 1; 2 and 3: the second
    fixed[sides == 3] = 1
    first = sides < 2
    return torch.stack([torch.where(first, fixed, along), torch.where(first, along, fixed)], 1)


def _task(
    solution: Callable[[Tensor], Tensor],
    source: Callable[[Tensor], Tensor],
    residual: Callable[[Tensor], Tensor],
    coefficients: tuple[float, float],
    evolution: bool,
) -> Task:
    generator = Generator().manual_seed(DATA_SEED)
    X = torch.rand(INTERIOR, 2, generator=generator, dtype=torch.float64)
    border = _border(BOUNDARY, generator, evolution)
    data = (X, source(X), border, solution(border))
    axis = torch.linspace(0, 1, 40, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    truth = solution(grid)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        X, f, border, g = batch
        inside = F.mse_loss(residual(model(X)), f)
        return inside + BOUNDARY_WEIGHT * F.mse_loss(model(border, derivatives=False)[:, 0], g)

    def evaluate(model: nn.Module) -> float:
        error = model(grid, derivatives=False)[:, 0] - truth
        return float(error.norm() / truth.norm())

    model = TaylorNetwork(WIDTHS, coefficients).double()
    return Task(model, loss, repeated(data), evaluate, data)


def _poisson() -> Task:
    """−Δu = f on the unit square, u = sin(πx) sin(2πy)."""

    def solution(X: Tensor) -> Tensor:
        return (math.pi * X[:, 0]).sin() * (2 * math.pi * X[:, 1]).sin()

    def source(X: Tensor) -> Tensor:
        return 5 * math.pi**2 * solution(X)

    return _task(solution, source, lambda u: -u[:, OPERATOR], (1.0, 1.0), evolution=False)


def _heat() -> Task:
    """∂_t u = ∂_xx u / 4 for t in [0, 1], u = exp(−π² t / 4) sin(πx)."""

    def solution(X: Tensor) -> Tensor:
        return torch.exp(-(math.pi**2) / 4 * X[:, 1]) * (math.pi * X[:, 0]).sin()

    def residual(u: Tensor) -> Tensor:
        return u[:, SECOND] - u[:, OPERATOR]

    return _task(solution, lambda X: 0 * X[:, 0], residual, (0.25, 0.0), evolution=True)


_SHAPE = "tanh MLP 2-48-48-48-1, float64; 400 interior and 80 boundary points, fixed; MSE"

PROBLEMS = (
    Problem(
        "pinn-poisson",
        f"−Δu = f on the unit square, u = sin(πx) sin(2πy); {_SHAPE}",
        "relative L2 error",
        _poisson,
        budget=10,
    ),
    Problem(
        "pinn-heat",
        f"u_t = u_xx / 4, u = exp(−π²t/4) sin(πx); {_SHAPE}",
        "relative L2 error",
        _heat,
        budget=10,
    ),
)
