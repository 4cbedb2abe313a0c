"""The problems of the comparison, checked for what they claim to be."""

import math

import pytest
import torch
from torch import Generator

from benchmarks import input_derivatives as pinns
from benchmarks.problems import PROBLEMS
from benchmarks.problems.pinns import FIRST, OPERATOR, SECOND, VALUE, TaylorNetwork, _border

DERIVATIVE_TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("name", PROBLEMS)
def test_task_is_seeded_and_can_be_trained(name):
    first, second, other = (PROBLEMS[name].task(seed) for seed in (0, 0, 1))
    batches = [next(first.batches(Generator().manual_seed(s))) for s in (3, 3)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    losses = [task.loss(task.model, batches[0]) for task in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert all(p.grad is not None for p in first.model.parameters())
    assert math.isfinite(first.metric())


@pytest.mark.parametrize("coefficients", [(1.0, 1.0), (0.25, 0.0)])
def test_taylor_network_against_autograd(coefficients):
    torch.manual_seed(0)
    model = TaylorNetwork((2, 7, 5, 1), coefficients).double()
    X = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    u = model(X, derivatives=False)
    gradient = torch.autograd.grad(u.sum(), X, create_graph=True)[0]
    second = [
        torch.autograd.grad(gradient[:, i].sum(), X, retain_graph=True)[0][:, i] for i in (0, 1)
    ]
    found = model(X.detach())
    torch.testing.assert_close(found[:, VALUE], u[:, 0], **DERIVATIVE_TOLERANCE)
    torch.testing.assert_close(found[:, [FIRST, SECOND]], gradient, **DERIVATIVE_TOLERANCE)
    operator = coefficients[0] * second[0] + coefficients[1] * second[1]
    torch.testing.assert_close(found[:, OPERATOR], operator, **DERIVATIVE_TOLERANCE)


@pytest.mark.parametrize("name", ["pinn-poisson", "pinn-heat"])
def test_source_fits_the_solution(name):
    """The residual of the stated solution is the source: by autograd, on the task's own points."""
    X, f, border, g = PROBLEMS[name].task(0).all_data
    points = X.clone().requires_grad_()
    x, y = points.unbind(1)
    if name == "pinn-poisson":
        u, c, sign = (math.pi * x).sin() * (2 * math.pi * y).sin(), (1.0, 1.0), -1
    else:
        u, c, sign = (-(math.pi**2) / 4 * y).exp() * (math.pi * x).sin(), (0.25, 0.0), -1
    gradient = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
    second = [
        torch.autograd.grad(gradient[:, i].sum(), points, retain_graph=True)[0] for i in (0, 1)
    ]
    residual = sign * sum(c[i] * second[i][:, i] for i in (0, 1))
    residual = residual + (gradient[:, 1] if name == "pinn-heat" else 0)
    torch.testing.assert_close(residual, f, **DERIVATIVE_TOLERANCE)
    assert g.shape == (len(border),)


@pytest.mark.parametrize("initial", [False, True])
def test_border_points_lie_on_the_sides(initial):
    points = _border(40, Generator().manual_seed(0), initial)
    on_side = [points[:, i] == value for i in (0, 1) for value in (0, 1)]
    assert bool(torch.stack(on_side).any(0).all())
    assert [bool(side.any()) for side in on_side] == [True, True, True, not initial]


@pytest.mark.parametrize("name", pinns.EQUATIONS)
def test_equations_have_their_solutions(name, monkeypatch):
    """The operator takes the solution to the source: by autograd, in the equation's own domain."""

    def by_autograd(solution, points, second="laplacian"):
        x = points.requires_grad_()
        u = solution(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        rows = [torch.autograd.grad(first[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1)]
        weights = torch.ones(2).to(x) if isinstance(second, str) else second.to(x)
        return (
            u[:, None],
            first[:, None],
            (weights[0] * rows[0][:, :1] + weights[1] * rows[1][:, 1:]),
        )

    monkeypatch.setattr(pinns, "input_derivatives", by_autograd)
    equation = pinns.EQUATIONS[name]
    points = equation.points(torch.rand(50, 2, dtype=torch.float64))
    found = equation.residual(equation.solution, points)
    # Burgers' solution is a quotient of quadratures, of round-off 1e-9 after two derivatives.
    torch.testing.assert_close(found, equation.source(points), rtol=0, atol=1e-7)
    if name == "Burgers":
        start = torch.tensor([[-1.0, 0.5], [0.3, 0.0], [1.0, 1.0]], dtype=torch.float64)
        wanted = -(math.pi * start[:, 0]).sin() * (start[:, 1] == 0)
        torch.testing.assert_close(equation.solution(start), wanted, rtol=0, atol=1e-9)


def test_the_comparison_on_input_derivatives_in_quick_form():
    contestant = pinns.contestants()['KFACOptimizer(lr="auto")']["defaults"]
    result = pinns.run(pinns.EQUATIONS["heat"], contestant, 0, 0.01)
    assert result["steps"] >= 1
    assert 0 < result["error"] < 10
    found = {"setting": "defaults", "tried": {"defaults": 1.0}, "runs": [result]}
    assert f"{result['error']:.1e}" in pinns.table({"heat": {"K-FAC": found}})
