"""GradScaler and autocast: the factors are those of the loss, not of its scaled copy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

X = torch.linspace(-2, 2, 60).reshape(6, 10).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
SCALE = 2.0**14
RELATIVE_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 0.05


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))


def objective(model):
    return F.cross_entropy(model(X), LABELS)


def stated(model):
    return ((model(X) - F.one_hot(LABELS)) ** 2).mean()


def factors_after_a_step(fisher_type, loss_func, scaled, unscale, schedule):
    model = network()
    loss = objective if loss_func is None else stated
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type, loss_func=loss_func)
    if schedule:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps step
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(loss(model)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
    else:
        loss(model).backward()
        optimizer.step()
    return optimizer.factors("0"), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("schedule", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("loss_func", [None, nn.MSELoss()], ids=["recognised", "stated"])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_grad_scaler(fisher_type, loss_func, unscale, schedule):
    expected, params = factors_after_a_step(fisher_type, loss_func, False, False, schedule)
    got, scaled_params = factors_after_a_step(fisher_type, loss_func, True, unscale, schedule)
    for g, e in zip(got, expected, strict=True):
        assert torch.allclose(g, e, rtol=RELATIVE_TOLERANCE, atol=1e-7)
    if not unscale:  # else the gradients were clipped
        for p, q in zip(params, scaled_params, strict=True):
            assert torch.allclose(p, q, rtol=RELATIVE_TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("reset", ["optimizer", "model", "in place"])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_a_skipped_step_leaves_no_trace(fisher_type, reset):
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    loss = objective(model) * 1e38  # overflows with the scale
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    (optimizer if reset == "optimizer" else model).zero_grad(set_to_none=reset != "in place")
    scaler.scale(objective(model)).backward()
    scaler.step(optimizer)
    expected, _ = factors_after_a_step(fisher_type, None, False, False, False)
    got = optimizer.factors("0")
    assert torch.allclose(got.input_factor, expected.input_factor)
    G = expected.grad_output_factor
    assert torch.allclose(got.grad_output_factor, G, rtol=RELATIVE_TOLERANCE)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_autocast_in_bfloat16(fisher_type):
    expected, _ = factors_after_a_step(fisher_type, None, False, False, False)
    model = network()
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model)
    loss.backward()
    optimizer.step()
    for g, e in zip(optimizer.factors("0"), expected, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < BFLOAT16_TOLERANCE * e.norm()
