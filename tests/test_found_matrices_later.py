"""Matrices that products found, later: frozen and trained again, and loaded by checkpoint tools."""

import copy
import logging

import pytest
import torch
from product_cases import LABELS, D, Net, at, both, data, functional
from test_products import EVERY_STEP, ROUND_OFF
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn import functional as F

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

X = data(6, D)


def train(net, optimizer, steps, start=0):
    for i in range(start, start + steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X * (1 + 0.1 * i)), LABELS).backward()
        optimizer.step()


class Tied(torch.nn.Module):
    """The lookup of the tied weight is seen first, and the matrix comes first or last."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        matrix = torch.nn.Parameter(torch.randn(4, 4))
        if first:
            self.matrix = matrix
        self.embedding = torch.nn.Embedding(7, 4)
        self.layer = torch.nn.Linear(4, 4)
        self.matrix = matrix

    def forward(self, tokens):
        h = self.layer(self.embedding(tokens)).tanh() @ self.matrix
        return F.linear(h.tanh(), self.embedding.weight)


@pytest.mark.parametrize("first", [True, False])
def test_resumption_keeps_the_order_of_layers(first):
    """And with it that of all sums over layers: it is exact to the bit."""

    def run(net, optimizer, start, stop):
        for i in range(start, stop):
            draws = torch.Generator().manual_seed(i)
            tokens, labels = torch.randint(7, (2, 6, 5), generator=draws)
            optimizer.zero_grad()
            F.cross_entropy(net(tokens).mT, labels).backward()
            optimizer.step()

    def make(net):
        return KFACOptimizer(net.parameters(), layers=[torch.nn.Linear, torch.nn.Embedding])

    net, resumed = Tied(first), Tied(first)
    optimizer = make(net)
    run(net, optimizer, 0, 3)
    other = make(resumed)
    resumed.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for start in range(3, 30, 9):
        run(net, optimizer, start, start + 9)
        run(resumed, other, start, start + 9)
    for p, q in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


# Frozen, and trained again ------------------------------------------------------------------------

PARTS = {"found": (at, "kernel"), "product": (functional, "layer"), "module": (both, "layer")}


def freeze(net, name, frozen):
    own = (net.kernel, net.shift) if name == "kernel" else net.layer.parameters()
    for p in own:
        p.requires_grad_(not frozen)


def input_moment(i):
    a = torch.cat([X * (1 + 0.1 * i), torch.ones(len(X), 1)], 1)
    return a.T @ a / len(a)


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["found", "product"])
def test_a_matrix_that_missed_an_update_starts_anew(name, preconditioner):
    use, layer = PARTS[name]
    net = Net(use)
    options = {"factor_update_interval": 4, "ema_decay": 0.9, "preconditioner": preconditioner}
    optimizer = KFACOptimizer(net.parameters(), **EVERY_STEP | options)
    train(net, optimizer, 3)
    freeze(net, layer, True)
    train(net, optimizer, 3, 3)
    freeze(net, layer, False)
    train(net, optimizer, 1, 6)
    assert optimizer.statistics()["fallback_parameters"] == 0.0
    A = optimizer.factors(layer).input_factor
    torch.testing.assert_close(A, input_moment(6), rtol=ROUND_OFF, atol=ROUND_OFF)
    assert optimizer.statistics()[f"{layer}/inverse_age"] == 0.0


@pytest.mark.parametrize("name", PARTS)
def test_one_that_missed_none_goes_on(name):
    use, layer = PARTS[name]
    net = Net(use)
    optimizer = KFACOptimizer(net.parameters(), **EVERY_STEP | {"factor_update_interval": 8})
    train(net, optimizer, 3)
    before = [f.clone() for f in optimizer.factors(layer)]
    freeze(net, layer, True)
    train(net, optimizer, 2, 3)
    freeze(net, layer, False)
    train(net, optimizer, 2, 5)
    assert all(map(torch.equal, before, optimizer.factors(layer)))


# torch.distributed.checkpoint ---------------------------------------------------------------------

CHOICES = [(disk, flat) for disk in (False, True) for flat in (False, True)]


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # one process without a group
@pytest.mark.parametrize(("disk", "flat"), CHOICES)
def test_checkpoints_are_loaded_after_one_step(disk, flat, tmp_path):
    """What that step was made of has no influence: all is loaded."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    whole = Net(at)
    optimizer = KFACOptimizer(whole.parameters())
    train(whole, optimizer, 3)
    saved = copy.deepcopy(get_state_dict(whole, optimizer, options=options))
    if disk:
        dcp.save(dict(zip("mo", saved, strict=True)), checkpoint_id=tmp_path)
    train(whole, optimizer, 4, 3)

    resumed = Net(at)
    optimizer = KFACOptimizer(resumed.parameters())
    train(resumed, optimizer, 1, 9)
    if disk:
        fresh = dict(zip("mo", get_state_dict(resumed, optimizer, options=options), strict=True))
        dcp.load(fresh, checkpoint_id=tmp_path)
        saved = fresh["m"], fresh["o"]
    states = {"model_state_dict": saved[0], "optim_state_dict": saved[1], "options": options}
    set_state_dict(resumed, optimizer, **states)
    train(resumed, optimizer, 4, 3)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_without_that_step_it_is_told(caplog):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    net = Net(at)
    optimizer = KFACOptimizer(net.parameters())
    train(net, optimizer, 3)
    saved = get_state_dict(net, optimizer, options=options)
    fresh = Net(at)
    states = {"model_state_dict": saved[0], "optim_state_dict": saved[1], "options": options}
    with caplog.at_level(logging.WARNING, "kfacopt"):
        set_state_dict(fresh, KFACOptimizer(fresh.parameters()), **states)
    assert "Make one step, of any data" in caplog.text
