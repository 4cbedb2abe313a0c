"""lr="auto" once training has converged: slopes are round-off, a term that is missing is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

STEPS = 45
CONVERGED = 1e-2  # of what the loss was at first
PENALTY = 1e-4


def problem():
    torch.manual_seed(0)
    X = torch.randn(24, 6)
    y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
    return X, y, nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


LOSSES = {
    "cross entropy": F.cross_entropy,
    "its sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(1), y),
    "bce": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).float()),
    "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).float()),
    "by hand": lambda z, y: -z.log_softmax(1)[torch.arange(len(y)), y].mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_full_batch_script_runs_on_and_a_missing_term_is_named(name):
    X, y, model = problem()
    optimizer = KFACOptimizer(model.parameters(), lr="auto")

    def step(penalty=0.0):
        optimizer.zero_grad()
        loss = LOSSES[name](model(X), y)
        (loss + penalty * model[0].weight.square().sum() if penalty else loss).backward()
        optimizer.step()
        return loss.item()

    losses = [step() for _ in range(STEPS)]
    assert losses[-1] < CONVERGED * losses[0]
    with pytest.raises(RuntimeError, match="the objective has terms besides the losses"):
        step(PENALTY)
