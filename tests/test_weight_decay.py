"""Weight decay: all parameters decay alike, by 0.015 lr λ in a step, as AdamW's at 3e-3 does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])


def network():
    """Return a linear layer with curvature, and a norm that AdamW trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def step(model, optimizer, scale=1.0):
    optimizer.zero_grad()
    (scale * F.cross_entropy(model(X), LABELS)).backward()
    optimizer.step()


def assert_taken(share, decay, rate=None, **options):
    """Compare a step with and without decay, which takes a share of each parameter."""
    models = network(), network()
    for model, own in zip(models, (0.0, decay), strict=True):
        optimizer = KFACOptimizer(model.parameters(), weight_decay=own, **options)
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        step(model, optimizer)
    for p, q, x in zip(*(m.parameters() for m in (*models, network())), strict=True):
        assert torch.allclose(p - q, share * x, rtol=1e-9, atol=TOLERANCE)


@settings(max_examples=20, deadline=None)
@given(
    lr=st.floats(1e-3, 1.0),
    decay=st.floats(0.0, 10.0),
    fallback_lr=st.sampled_from([None, 1e-12, 3e-3, 0.5]),
    foreach=st.sampled_from([None, True, False]),
)
def test_all_parameters_decay_alike(lr, decay, fallback_lr, foreach):
    options = {"lr": lr, "fallback_lr": fallback_lr, "foreach": foreach}
    assert_taken(0.015 * lr * decay, decay, **options)


def test_with_the_default_lr_it_is_that_of_adamw_at_a_rate_of_3e3():
    model, reference = network(), network()
    optimizer = KFACOptimizer(model.parameters(), weight_decay=0.1, fallback_lr=1e-15)
    adamw = torch.optim.AdamW(reference.parameters(), lr=3e-3, weight_decay=0.1)
    for p in reference.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(20):
        step(model, optimizer, scale=1e-30)
        adamw.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9)


def test_a_schedule_scales_it_as_it_scales_steps():
    for rate in (0.4, 0.05, 0.0):
        assert_taken(0.015 * rate * 2.0, 2.0, rate)


def test_what_a_rate_of_zero_trains_does_not_decay():
    model = network()
    norm = [p.detach().clone() for p in model[1].parameters()]
    optimizer = KFACOptimizer(model.parameters(), weight_decay=1.0, fallback_lr=0.0)
    step(model, optimizer)
    for p, q in zip(model[1].parameters(), norm, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rate", [1.0, 0.25])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_steps_that_tune_themselves_decay_by_their_size(rate, damping):
    """Where they arrive, as a step is undone or not before; AdamW's part where it starts."""
    models = network(), network()
    start = network()
    for model, decay in zip(models, (0.0, 0.5), strict=True):
        options = {"lr": "auto", "fisher_type": "type-2", "damping": damping}
        optimizer = KFACOptimizer(model.parameters(), weight_decay=decay, **options)
        optimizer.param_groups[0]["lr"] = rate
        step(model, optimizer)
    share = 0.015 * rate * min(abs(optimizer.statistics()["step_size"]) / rate, 1.0) * 0.5
    assert share > 0
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        origin = start.get_parameter(name) if name.startswith("1.") else p
        assert torch.allclose(p - q, share * origin, rtol=1e-9, atol=TOLERANCE)
