"""A schedule means what it says: a step is as long as lr, whether or not the clip is active."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
CLIPS = {"no clip": None, "active": 1e-7, "not active": 1e7}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def make(model, **options):
    settings = {"lr": 0.1, "momentum": 0.0, "fisher_type": "type-2"}
    return KFACOptimizer(model.parameters(), **(settings | options))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step(model, optimizer):
    """Return how far a step moves the parameters."""
    before = flat(model)
    optimizer.zero_grad()
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    return flat(model) - before


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("factor", [0.5, 2.0, 1e-3])
def test_the_step_is_proportional_to_lr(clip, factor):
    whole = mlp()
    optimizer = make(whole, kl_clip=clip)
    step(whole, optimizer)
    other, twin = copy.deepcopy((whole, optimizer))
    twin.param_groups[0]["lr"] *= factor
    d, scaled = step(whole, optimizer), step(other, twin)
    assert torch.allclose(scaled, factor * d, rtol=TOLERANCE, atol=1e-16)
    assert (optimizer.statistics()["kl_clip_scale"] < 1) is (clip == CLIPS["active"])


SCHEDULES = {
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_act_from_the_first_step(name):
    """With an active clip every step is as long, in the metric of F, as lr says."""
    model = mlp()
    optimizer = make(model, kl_clip=CLIPS["active"], ema_decay=0.0, factor_update_interval=1)
    scheduler, lengths = SCHEDULES[name](optimizer), []
    for _ in range(6):
        lr, before = optimizer.param_groups[0]["lr"], flat(model)
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        moved = before - flat(model)
        # ⟨ν lr Δ, ∇⟩ with ν² lr₀² ⟨Δ, ∇⟩ = κ
        scale = optimizer.statistics()["kl_clip_scale"]
        lengths.append((moved @ grads).item() * scale / lr)
        scheduler.step(*([1.0] if name == "plateau" else []))
    expected = CLIPS["active"] / 0.1**2
    assert all(math.isclose(length, expected, rel_tol=1e-9) for length in lengths)


def test_resuming_keeps_the_initial_rate():
    whole = mlp()
    optimizer = make(whole, kl_clip=CLIPS["active"])
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        step(whole, optimizer)
        scheduler.step()
    resumed = mlp()
    resumed.load_state_dict(whole.state_dict())
    other = make(resumed, kl_clip=CLIPS["active"])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(step(whole, optimizer), step(resumed, other))
