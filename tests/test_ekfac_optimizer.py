"""KFACOptimizer(preconditioner="ekfac"): averages, changes of basis, accumulation."""

import pytest
import torch
from test_optimizer_step import LABELS, PLAIN, X, network
from torch import nn
from torch.nn import functional as F

from kfacopt import EKFACLinearOperator, KFACOptimizer, KFACWarning
from kfacopt.linalg.kronecker import DecompositionError

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
DECAY = 0.8


def make(model, **options):
    settings = PLAIN | {"preconditioner": "ekfac", "fisher_type": "type-2", "damping": 0.1}
    return KFACOptimizer(model.parameters(), **(settings | options))


def step(model, optimizer, X, y):
    optimizer.zero_grad()
    F.cross_entropy(model(X), y).backward()
    optimizer.step()


def matrix_of(optimizer, weight):
    """Q diag(Λ) Qᵀ `[B, d, d]` of a block, from the state."""
    state = optimizer.state[weight]
    sides = zip(state["grad_output_basis"], state["input_basis"], strict=True)
    return torch.stack(
        [
            torch.kron(g, a) @ torch.diag(values.flatten()) @ torch.kron(g, a).T
            for (g, a), values in zip(sides, state["second_moments"], strict=True)
        ]
    )


def test_second_moments_are_averaged_in_one_basis():
    """With a basis that stays: the bias-corrected average of the exact diagonals in it."""
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = make(model, lr=0.0, ema_decay=DECAY, inverse_update_interval=100)
    sizes, values = (6, 4, 1), []
    for size in sizes:
        step(model, optimizer, X[:size], LABELS[:size])
        z = model(X[:size]).detach()
        probabilities = z.softmax(1)
        state = optimizer.state[model[2].weight]
        Q_G, Q_A = state["grad_output_basis"][0], state["input_basis"][0]
        inputs = torch.cat([model[:2](X[:size]).detach(), torch.ones(size, 1)], 1)
        expected = torch.zeros(3, 5)
        for a, p in zip(inputs, probabilities, strict=True):
            H = (torch.diag(p) - torch.outer(p, p)) / size
            expected += torch.outer((Q_G.T @ H @ Q_G).diagonal(), (Q_A.T @ a).square())
        values.append(expected)
    weights = torch.tensor([s * DECAY ** (len(sizes) - 1 - i) for i, s in enumerate(sizes)])
    average = sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))
    assert torch.allclose(state["second_moments"][0], average, rtol=1e-6)


def test_a_step_that_changes_the_bases_takes_its_second_moments_in_the_new_ones():
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = make(model, lr=0.3)
    bases = []
    for i in range(4):
        x = (X * (1 + i) + 0.3 * i).sin()
        z = model(x).detach()
        inputs = torch.cat([model[:2](x).detach(), torch.ones(len(x), 1)], 1)
        step(model, optimizer, x, LABELS)
        state = optimizer.state[model[2].weight]
        Q_G, Q_A = state["grad_output_basis"][0], state["input_basis"][0]
        expected = torch.zeros(3, 5)
        for a, p in zip(inputs, z.softmax(1), strict=True):
            H = (torch.diag(p) - torch.outer(p, p)) / len(x)
            expected += torch.outer((Q_G.T @ H @ Q_G).diagonal(), (Q_A.T @ a).square())
        assert torch.allclose(state["second_moments"][0], expected, atol=TOLERANCE)
        bases.append(Q_A.clone())
    assert not torch.allclose(bases[-1], bases[0], atol=0.1)


def test_a_change_of_basis_keeps_what_the_second_moments_say():
    """With factors and weights set by hand, so that the third step changes the basis alone."""
    model = network()
    optimizer = make(model, lr=0.0, ema_decay=0.9, inverse_update_interval=2)
    for _ in range(2):
        step(model, optimizer, X, LABELS)
    old = {}
    for layer in (model[1], model[4], model[6]):
        state, old[layer] = optimizer.state[layer.weight], matrix_of(optimizer, layer.weight)
        A = state["input_factor"]
        A.copy_(torch.linalg.inv(A + 0.1 * torch.eye(A.shape[-1])) * (1 + torch.rand(A.shape[-1])))
        for key in ("factor_weight", "second_moment_weight"):
            state[key].fill_(1e30)
    step(model, optimizer, X, LABELS)
    for layer, before in old.items():
        state, after = optimizer.state[layer.weight], matrix_of(optimizer, layer.weight)
        sides = zip(state["grad_output_basis"], state["input_basis"], strict=True)
        Q = torch.stack([torch.kron(g.contiguous(), a.contiguous()) for g, a in sides])
        assert not torch.allclose(after, before, rtol=1e-3)
        diagonal = (Q.mT @ before @ Q).diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(diagonal, state["second_moments"].flatten(1), rtol=1e-8)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("later", [False, True], ids=["first-step", "later-step"])
def test_accumulated_micro_batches_are_one_batch(fisher_type, later):
    results = []
    for sizes in ([6], [2, 3, 1]):
        torch.manual_seed(0)
        model = network()
        optimizer = make(model, fisher_type=fisher_type, lr=0.1, ema_decay=DECAY)
        if later:
            step(model, optimizer, X, LABELS)
        optimizer.zero_grad()
        for part, labels in zip(X.split(sizes), LABELS.split(sizes), strict=True):
            loss = F.cross_entropy(model(part), labels)
            (loss * len(part) / len(X)).backward()
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=TOLERANCE)


def test_the_step_after_many_is_that_of_the_state():
    """Every step is Q (Qᵀ ∇ Q / (Λ + δ)) Qᵀ with what the state holds after it."""
    model = network()
    optimizer = make(model, lr=0.05, ema_decay=DECAY, inverse_update_interval=3)
    for i in range(5):
        before = model[6].weight.detach().clone(), model[6].bias.detach().clone()
        step(model, optimizer, X + 0.1 * i, LABELS)
        gradient = torch.cat([model[6].weight.grad, model[6].bias.grad[:, None]], 1)
        damped = matrix_of(optimizer, model[6].weight)[0] + 0.1 * torch.eye(gradient.numel())
        expected = -0.05 * torch.linalg.solve(damped, gradient.flatten()).reshape(gradient.shape)
        got = torch.cat(
            [model[6].weight - before[0], (model[6].bias - before[1])[:, None]], 1
        ).detach()
        assert torch.allclose(got, expected, atol=TOLERANCE)


def test_wide_sides_are_diagonal():
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = make(model, max_factor_dim=3, lr=0.0)
    step(model, optimizer, X, LABELS)
    state = optimizer.state[model[0].weight]
    assert "input_basis" not in state
    assert state["second_moments"].shape == (1, 4, 11)
    operator = EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(X, LABELS)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    # In whatever basis, the sum is the trace.
    total = sum(optimizer.state[layer.weight]["second_moments"].sum() for layer in model[::2])
    assert torch.allclose(total, operator.trace())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite_leave_no_trace(bad):
    model = network()
    optimizer = make(model, lr=0.0, ema_decay=DECAY)
    step(model, optimizer, X, LABELS)
    kept = {
        key: value.clone()
        for key, value in optimizer.state[model[6].weight].items()
        if isinstance(value, torch.Tensor)
    }
    poisoned = X.clone()
    poisoned[0, 0] = bad
    with pytest.warns(KFACWarning, match="the step is skipped"):
        step(model, optimizer, poisoned, LABELS)
    for key in ("input_factor", "second_moments", "input_basis", "second_moment_weight"):
        assert torch.equal(optimizer.state[model[6].weight][key], kept[key])


def test_a_failing_refresh_is_kept_counted_and_raised():
    model = network()
    optimizer = make(model, lr=0.0, ema_decay=DECAY)
    step(model, optimizer, X, LABELS)
    state = optimizer.state[model[6].weight]
    basis = state["input_basis"].clone()
    for failures in range(1, 4):
        state["input_factor"].fill_(torch.inf)
        step(model, optimizer, X, LABELS)
        assert torch.equal(state["input_basis"], basis)
        assert state["inverse_failures"] == failures
    with pytest.raises(DecompositionError, match=r"layer '6': .*4 failures in a row"):
        step(model, optimizer, X, LABELS)


def test_kfac_and_ekfac_states_load_into_each_other():
    for first, second in (("kfac", "ekfac"), ("ekfac", "kfac")):
        model = network()
        optimizer = make(model, preconditioner=first, lr=0.1)
        for _ in range(2):
            step(model, optimizer, X, LABELS)
        other = make(model, preconditioner=second, lr=0.1)
        other.load_state_dict(optimizer.state_dict())
        for _ in range(2):
            step(model, other, X, LABELS)
        keys = set(other.state[model[6].weight])
        assert ("second_moments" in keys) == (second == "ekfac")
        assert ("input_inverse" in keys) == (second == "kfac")
