"""Default intervals follow the loss: longer ones where its curvature is looked for."""

import copy
import functools

import pytest
import torch
from rank_pair import WORLD
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacopt import KFACOptimizer

X = torch.linspace(-2, 2, 64).sin().reshape(16, 4)
LABELS = torch.arange(16) % 3
KNOWN, SEARCHED = [0, 10, 20, 30, 40, 50, 60], [0, 1, 2, 5, 10, 20, 30, 60]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def known(z):
    return F.cross_entropy(z, LABELS)


def searched(z):
    return (1 - F.cosine_similarity(z, F.one_hot(LABELS, 3).float())).mean()


def unseen(z):
    return Hidden.apply(z)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return g * 2 * z / z.numel()


def updates(optimizer, model, loss_of, steps, entry="factor_step"):
    """Return the steps that changed a number in the state of the last layer's weight."""
    found, last = [], None
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step)(model(X)).backward()
        optimizer.step()
        now = int(optimizer.state[model[2].weight][entry])
        found += [step] if now != last else []
        last = now
    return found


@pytest.mark.parametrize(
    ("loss", "factors", "inverses"),
    [
        (known, KNOWN, [0, 10, 20, 30, 40, 50]),
        (searched, SEARCHED, SEARCHED),
        (unseen, SEARCHED, SEARCHED),
        (lambda z: known(z) + searched(z), SEARCHED, SEARCHED),
        (lambda z: known(z) / 4, KNOWN, [0, 10, 20, 30, 40, 50]),
    ],
)
def test_they_are_longer_where_curvature_is_looked_for(loss, factors, inverses):
    for entry, want in (("factor_step", factors), ("inverse_step", inverses)):
        model = mlp()
        optimizer = KFACOptimizer(model.parameters())
        assert updates(optimizer, model, lambda _: loss, 65, entry) == want


def test_they_change_with_the_loss():
    model = mlp()
    optimizer = KFACOptimizer(model.parameters())

    def loss_of(step):
        return searched if 25 <= step < 100 else known

    assert updates(optimizer, model, loss_of, 145) == [0, 10, 20, 30, 60, 90, 120, 130, 140]


@pytest.mark.parametrize("loss", [known, searched])
def test_numbers_stay_what_they_are(loss):
    model = mlp()
    optimizer = KFACOptimizer(model.parameters(), factor_update_interval=7)
    assert updates(optimizer, model, lambda _: loss, 30) == [0, 7, 14, 21, 28]
    optimizer = KFACOptimizer(model.parameters(), inverse_update_interval=20)
    assert updates(optimizer, model, lambda _: loss, 50, "inverse_step") == [0, 20, 40]


def test_a_resumed_run_goes_on_with_them():
    model = mlp()
    optimizer = KFACOptimizer(model.parameters())
    updates(optimizer, model, lambda _: searched, 12)
    for again in (copy.deepcopy(model), copy.deepcopy(model)):
        other = KFACOptimizer(again.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert updates(other, again, lambda _: searched, 25) == [0, 8, 18]  # steps 12, 20 and 30
    kept = copy.deepcopy((model, optimizer))
    assert updates(kept[1], kept[0], lambda _: searched, 25) == [0, 8, 18]
    updates(optimizer, model, lambda _: searched, 25)
    for p, q, r in zip(model.parameters(), again.parameters(), kept[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_a_state_with_something_else_there_is_refused():
    model = mlp()
    optimizer = KFACOptimizer(model.parameters())
    state = optimizer.state_dict()
    state["param_groups"][0]["searched"] = 3
    with pytest.raises(ValueError, match="searched must be True or False"):
        optimizer.load_state_dict(state)


def of_two_kinds(rank):
    """One rank's loss is known, the other's is not: both take the longer intervals."""
    model = mlp()
    called = DistributedDataParallel(model)
    optimizer = KFACOptimizer(model.parameters())
    loss = known if rank == 0 else searched
    found, last = [], None
    for step in range(35):
        optimizer.zero_grad()
        loss(called(X)).backward()
        optimizer.step()
        now = int(optimizer.state[model[2].weight]["factor_step"])
        found += [step] if now != last else []
        last = now
    return found


class Positions(nn.Module):
    """Positions that only one rank's data reach."""

    def __init__(self):
        super().__init__()
        self.net, self.p = mlp(), nn.Parameter(torch.zeros(2, 4))

    def forward(self, x, with_positions):
        h = self.net[0](x).tanh()
        if with_positions:
            h = h.unflatten(0, (8, 2))[..., :4] + self.p
            h = F.pad(h, (0, 1)).flatten(0, 1)
        return self.net[2](h)


def a_table_on_one_rank(rank):
    """Both ranks take it for one, and AdamW's moments stay."""
    torch.manual_seed(0)
    model = Positions()
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = KFACOptimizer(model.parameters(), factor_update_interval=1)
    for _ in range(4):
        optimizer.zero_grad()
        known(called(X, rank == 0)).backward()
        optimizer.step()
    return int(optimizer.state[model.p]["step"]), id(model.p) in optimizer._connection.vectors


def obligations(rank):
    yield "of two kinds", functools.partial(of_two_kinds, rank)
    yield "a table on one rank", functools.partial(a_table_on_one_rank, rank)


def test_ranks_agree_on_tables(ranks):
    assert [r["a table on one rank"] for r in ranks] == [(4, True)] * WORLD


def test_ranks_agree(ranks):
    assert [r["of two kinds"] for r in ranks] == [[0, 1, 2, 5, 10, 20, 30]] * WORLD
