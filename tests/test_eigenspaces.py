"""EKFAC's steps where eigenvalues are equal, and rounding alone decides on a basis."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer
from kfacopt.linalg.eigenspaces import averaged, levels_of

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
DRIFT = 1e-6  # of 20 steps; without averages 4e-2 to 0.4
STEPS = 20
OFTEN = {"factor_update_interval": 1, "inverse_update_interval": 5}


def orthonormal(side):
    return torch.linalg.qr(torch.randn(side, side))[0]


def mlp():
    return nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def convolutions():
    """With a convolution of two groups, and sides that are wider than a batch has positions."""
    return nn.Sequential(
        nn.Unflatten(1, (5, 2, 2)),
        nn.Conv2d(5, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def equal_outputs():
    """All probabilities are equal at first, and G has one eigenvalue nine times."""
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


CASES = {
    "defaults": (mlp, {}),
    "often": (mlp, OFTEN),
    "each step": (mlp, {"factor_update_interval": 1, "inverse_update_interval": 1}),
    "apart": (mlp, OFTEN | {"separate_weight_and_bias": True}),
    "one diagonal side": (mlp, OFTEN | {"max_factor_dim": 20}),
    "groups": (convolutions, OFTEN),
    "channels": (convolutions, OFTEN | {"conv_factor": "channels"}),
    "equal outputs": (equal_outputs, OFTEN),
}


def trained(make, options, scale=1.0, disturb=None, steps=STEPS):
    """The parameters after some steps on one batch of 16; `disturb` is called after the first."""
    torch.manual_seed(0)
    model, X, y = make(), torch.randn(16, 20) * scale, torch.randint(10, (16,))
    optimizer = KFACOptimizer(model.parameters(), preconditioner="ekfac", **options)
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
        if disturb is not None and i == 0:
            disturb(optimizer)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(a, b, make):
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in make().parameters()])
    return float((a - b).norm() / (a - start).norm())


@pytest.mark.parametrize("case", CASES)
def test_round_off_in_a_batch_stays_round_off(case):
    make, options = CASES[case]
    ways = [trained(make, options, scale) for scale in (1.0, 1 + 1e-15)]
    assert distance(*ways, make) < DRIFT


def turn_null_spaces(optimizer, turned):
    """Give every null space of a state another basis."""
    for state in optimizer.state.values():
        for side in ("grad_output", "input"):
            if f"{side}_levels" not in state:
                continue
            for Q, levels in zip(state[f"{side}_basis"], state[f"{side}_levels"], strict=True):
                null = levels < 1e-3
                if Q.shape[-1] == len(levels) and int(null.sum()) > 1:
                    Q[:, null] = Q[:, null] @ orthonormal(int(null.sum()))
                    turned.append(int(null.sum()))


@pytest.mark.parametrize("case", ["often", "each step", "groups"])
def test_another_basis_of_a_null_space_changes_nothing(case):
    make, options = CASES[case]
    turned = []
    ways = [
        trained(make, options, disturb=disturb)
        for disturb in (None, lambda optimizer: turn_null_spaces(optimizer, turned))
    ]
    assert max(turned) > 15
    assert distance(*ways, make) < DRIFT


def test_a_split_side_has_levels_of_both_parts():
    """So that the case above is one."""
    torch.manual_seed(0)
    model = convolutions()
    optimizer = KFACOptimizer(model.parameters(), preconditioner="ekfac", conv_factor="channels")
    F.cross_entropy(model(torch.randn(16, 20)), torch.randint(10, (16,))).backward()
    optimizer.step()
    shapes = [
        tuple(tuple(state[f"{x}_levels"].shape) for x in ("grad_output", "input", "position"))
        for state in optimizer.state.values()
        if "position_levels" in state
    ]
    assert shapes == [((1, 12), (1, 5), (1, 9)), ((2, 6), (2, 6), (2, 9))]


def test_levels_may_be_missing_in_a_state_of_an_earlier_version():
    """Then the basis is made anew at the next refresh."""

    def forget(optimizer):
        for state in optimizer.state.values():
            for key in [key for key in state if key.endswith("_levels")]:
                del state[key]
        optimizer.load_state_dict(optimizer.state_dict())

    assert trained(mlp, OFTEN, disturb=forget).isfinite().all()


# Averages -----------------------------------------------------------------------------------------


def test_a_null_space_has_its_mean_and_all_else_stays():
    values = torch.rand(2, 3, 5)
    spectrum = torch.tensor([[1.0, 0.0, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4, 0.5]])
    found = averaged(values, ((), (levels_of(spectrum, torch.float64),)))
    expected = values.clone()
    expected[0][:, [1, 3, 4]] = values[0][:, [1, 3, 4]].mean(1, keepdim=True)
    assert torch.allclose(found, expected, atol=TOLERANCE)
    apart = levels_of(spectrum[1:], torch.float64)
    assert torch.equal(averaged(values[1:], ((apart[:, :3],), (apart,))), values[1:])


def test_rows_and_columns_of_a_split_side():
    """Positions' eigenspace times each channel's vector; the bias's column stays."""
    values = torch.rand(1, 3, 2 * 3 + 1)
    channels, positions = torch.tensor([[0.0, 9.0]]), torch.tensor([[4.0, 4.0, 8.0]])
    found = averaged(values, ((torch.zeros(1, 3),), (channels, positions)))
    rows = values.mean(1, keepdim=True).expand_as(values).clone()
    for channel in range(2):
        own = slice(3 * channel, 3 * channel + 2)
        rows[..., own] = rows[..., own].mean(-1, keepdim=True)
    assert torch.allclose(found, rows, atol=TOLERANCE)


def test_the_weight_of_a_neighbour_falls_with_its_distance():
    levels = torch.tensor([[0.0, 0.25, 7.0]])
    found = averaged(torch.eye(3)[None], ((), (levels,)))
    expected = torch.tensor([[1.0, 0.75, 0.0], [0.75, 1.0, 0.0], [0.0, 0.0, 1.75]]) / 1.75
    assert torch.allclose(found[0].T, expected, atol=TOLERANCE)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_close_is_so_in_the_dtype_that_factors_are_kept_in(stored):
    """A null space, rounded: the eigenvalues that rounding makes of 0 are close."""
    root = torch.randn(64, 8) + 1.0
    A = (root @ root.mT).to(stored).to(torch.float32)
    values = torch.linalg.eigvalsh((A + A.mT) / 2).clamp(min=0)
    levels = levels_of(values[None], stored)[0]
    assert levels[:56].max() < 1
    assert levels[56] > 1
