"""Rates that a loop sets: said once where they are those of another rule, silent where not."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from kfacopt import KFACOptimizer, KFACWarning
from kfacopt.optim.rates import LOW, STEPS

X = torch.linspace(-1, 1, 24).reshape(6, 4).sin()
Y = X[:, :1] * X[:, 1:2]
MESSAGE = r"in 100 steps lr was never above .* max_lr="


def make(**options):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return model, KFACOptimizer(model.parameters(), **options)


def train(model, optimizer, steps, rate=None, scheduler=None):
    """Return the messages of warnings, as a list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KFACWarning)
        for i in range(steps):
            if rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate(i)
            optimizer.zero_grad()
            F.mse_loss(model(X), Y).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return [str(w.message) for w in caught if issubclass(w.category, KFACWarning)]


TOO_SMALL = {
    "set in each step": lambda i: 3e-4,
    "as a tensor": lambda i: torch.tensor(3e-3),
    "a warm-up to it": lambda i: min(i / 20, 1) * 3e-3,
    "just below the bound": lambda i: 0.99 * LOW * 0.2,
}
FINE = {
    "none at all": lambda i: 0.0,
    "above the bound once": lambda i: 1.1 * LOW * 0.2 if i == 0 else 1e-5,
    "a long warm-up": lambda i: 0.2 * i / 10_000,
    "the optimizer's": lambda i: 0.2,
}


@pytest.mark.parametrize("name", TOO_SMALL)
def test_rates_of_another_rule_are_named_once(name):
    model, optimizer = make()
    assert not train(model, optimizer, STEPS - 1, TOO_SMALL[name])
    (message,) = train(model, optimizer, 2 * STEPS, TOO_SMALL[name])
    assert "of the rate that the optimizer was made with" in message
    assert "(max_lr=0.2), or make the optimizer with lr= the largest rate" in message
    assert optimizer.statistics()["relative_lr"] == pytest.approx(TOO_SMALL[name](500) / 0.2)


@pytest.mark.parametrize("name", FINE)
def test_other_rates_are_fine(name):
    model, optimizer = make()
    assert not train(model, optimizer, STEPS + 20, FINE[name])


def test_schedulers():
    """OneCycleLR tells of its peak at once; others multiply the optimizer's own rate."""
    model, optimizer = make()
    cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=1000)
    (message,) = train(model, optimizer, STEPS, scheduler=cycle)
    assert "lr was never above 0.003, 0.015 of" in message
    for schedule in (
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10_000),
        lambda o: lr_scheduler.LinearLR(o, start_factor=1e-3, total_iters=10_000),
        lambda o: lr_scheduler.LambdaLR(o, lambda i: 1e-3),
    ):
        model, optimizer = make()
        assert not train(model, optimizer, STEPS + 20, scheduler=schedule(optimizer))


def test_one_group_with_a_rate_of_its_own_is_enough():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = KFACOptimizer([{"params": m.parameters()} for m in model])
    optimizer.param_groups[0]["lr"] = 1e-4
    assert not train(model, optimizer, STEPS + 20)


def test_a_resumed_run_at_the_end_of_its_schedule_is_not_named():
    model, optimizer = make()
    train(model, optimizer, 3)
    own = KFACOptimizer(model.parameters())
    own.load_state_dict(optimizer.state_dict())
    assert not train(model, own, STEPS + 20, lambda i: 1e-4)


def test_steps_that_tune_themselves_have_factors_for_rates():
    model, optimizer = make(lr="auto")
    (message,) = train(model, optimizer, STEPS, lambda i: 3e-3)
    assert message.count("(max_lr=1).")
