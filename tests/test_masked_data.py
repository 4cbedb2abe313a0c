"""Losses on some of the data alone: the others count in no A, and linear models have the GGN."""

import pytest
import torch
from dense import dense_ggn
from product_cases import data
from test_products import EVERY_STEP, ROUND_OFF
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACLinearOperator, KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

N, D, C = 9, 3, 2
CHOSEN = torch.arange(N) % 3 == 0
LABELS = torch.arange(N) % C
VALUES = data(N, C)


def inputs():
    """Return data of which those that are not chosen are large, which would be seen in A."""
    x = data(N, D)
    return torch.where(CHOSEN[:, None], x, 7 * x)


def over_chosen(terms):
    return (terms * CHOSEN).sum() / CHOSEN.sum()


LOSSES = {
    "rows of logits": lambda z: F.cross_entropy(z[CHOSEN], LABELS[CHOSEN]),
    "rows of values": lambda z: F.mse_loss(z[CHOSEN], VALUES[CHOSEN]),
    "ignored": lambda z: F.cross_entropy(z, LABELS.masked_fill(~CHOSEN, -100)),
    "times a mask": lambda z: over_chosen(F.cross_entropy(z, LABELS, reduction="none")),
    "terms": lambda z: F.cross_entropy(z, LABELS, reduction="none")[CHOSEN].mean(),
    "entries": lambda z: over_chosen(F.mse_loss(z, VALUES, reduction="none").sum(1)),
    "mask of entries": lambda z: (
        F.binary_cross_entropy_with_logits(z, VALUES.clamp(0, 1), reduction="none")
        * CHOSEN[:, None]
    ).mean(),
}


def linear():
    model = nn.Sequential(nn.Linear(D, C, bias=False))
    nn.init.zeros_(model[0].weight)
    return model


def stepped(model, loss, fisher_type):
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | {"fisher_type": fisher_type})
    loss(model(inputs())).backward()
    optimizer.step()
    return optimizer


def close(one, other):
    torch.testing.assert_close(one, other, rtol=ROUND_OFF, atol=ROUND_OFF)


@pytest.mark.parametrize("name", LOSSES)
def test_linear_models_have_the_ggn(name):
    model, loss = linear(), LOSSES[name]
    A, G = stepped(model, loss, "type-2").factors("0")
    params = list(model.parameters())
    close(torch.kron(G, A), dense_ggn(model, lambda z, _: loss(z), params, inputs(), None))


# Where terms are weighted, empirical Fishers are those of the whole objective.
SAMPLED = [(name, "mc") for name in LOSSES] + [(name, "empirical") for name in list(LOSSES)[:3]]


@pytest.mark.parametrize(("name", "fisher_type"), SAMPLED)
def test_only_chosen_data_count(name, fisher_type):
    A, _ = stepped(linear(), LOSSES[name], fisher_type).factors("0")
    rows = inputs()[CHOSEN]
    close(A, rows.T @ rows / len(rows))


class Heads(nn.Module):
    """Two tasks; each datum has the label of one alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(D, 4), nn.ModuleList([nn.Linear(4, C), nn.Linear(4, C)])

    def forward(self, x, few=N):
        h = self.body(x).tanh()
        return self.heads[0](h[:few]), self.heads[1](h)


@pytest.mark.parametrize("fisher_type", ["mc", "type-2"])
def test_each_task_has_the_data_with_its_label(fisher_type):
    model, x = Heads(), inputs()
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | {"fisher_type": fisher_type})
    first, second = (F.cross_entropy(z, LABELS, reduction="none") for z in model(x))
    (first * CHOSEN + second * ~CHOSEN).sum().backward()
    optimizer.step()
    h = torch.cat([model.body(x).tanh().detach(), torch.ones(N, 1)], 1)
    for i, own in enumerate((CHOSEN, ~CHOSEN)):
        close(optimizer.factors(f"heads.{i}").input_factor, h[own].T @ h[own] / int(own.sum()))
    a = torch.cat([x, torch.ones(N, 1)], 1)
    close(optimizer.factors("body").input_factor, a.T @ a / N)


def test_a_task_that_is_masked_altogether_counts_nothing():
    """The loss of another one, of more data, arrives first, and has some of them."""
    model, x = Heads(), inputs()
    optimizer, before = KFACOptimizer(model.parameters(), **EVERY_STEP), []
    for weight in (1.0, 0.0):
        optimizer.zero_grad()
        first, second = model(x, 4)
        loss = (weight * F.cross_entropy(first, LABELS[:4], reduction="none")).sum()
        (loss + F.cross_entropy(second, LABELS.masked_fill(~CHOSEN, -100))).backward()
        optimizer.step()
        before.append([f.clone() for f in optimizer.factors("heads.0")])
    for one, other in zip(*before, strict=True):
        assert torch.equal(one, other)


class Nodes(nn.Module):
    """A graph's nodes, of which some have labels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, C)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x)[CHOSEN]


def test_operators_leave_out_what_a_model_does_not_choose():
    model, x, y = Nodes(), inputs(), LABELS[CHOSEN]
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = KFACLinearOperator(model, loss, params, [(x, y)], **options)
    close(K @ torch.eye(K.shape[1]), dense_ggn(model, loss, params, x, y))


class Branch(nn.Module):
    """A layer in a branch that some data do not take, as with stochastic depth."""

    def __init__(self, layer, taken):
        super().__init__()
        self.layer, self.taken = layer, taken

    def forward(self, x):
        y = self.layer(x)
        return y * self.taken.reshape(-1, *(1,) * (y.ndim - 1))


BRANCHES = {
    "sequences": lambda: (nn.Linear(6, 4), data(8, 3, 6)),
    "convolution": lambda: (nn.Conv1d(6, 4, 3, padding=1), data(8, 6, 5)),
    "depthwise": lambda: (nn.Conv1d(6, 6, 3, padding=1, groups=6), data(8, 6, 5)),
    "split": lambda: (nn.Conv1d(6, 4, 3, padding=1), data(8, 6, 5)),
    "low rank": lambda: (nn.Linear(24, 4), data(8, 3, 24)),
}


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", BRANCHES)
def test_data_that_take_no_branch_count_in_none_of_its_factors(name, kfac_approx, fisher_type):
    layer, x = BRANCHES[name]()
    taken = torch.arange(8) % 3 != 0
    kinds = {"split": {"conv_factor": "channels"}, "low rank": {"wide_factor": "low_rank"}}
    options = EVERY_STEP | {"kfac_approx": kfac_approx, "fisher_type": fisher_type}
    options |= kinds.get(name, {})
    found = []
    for rows, mask in ((slice(None), taken), (taken, torch.ones(int(taken.sum())))):
        model = nn.Sequential(Branch(layer, mask.to(x)), nn.Flatten())
        optimizer = KFACOptimizer(model.parameters(), **options)
        z = model(x[rows])
        F.mse_loss(z, torch.ones_like(z), reduction="sum").backward()
        optimizer.step()
        found.append(optimizer.factors("0.layer").input_factor)
    close(*found)
