"""At which rate AdamW trains what has no curvature: by what it is, and how the graph uses it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACOptimizer

VECTORS, OTHERS = 0.015, 1e-3


class Network(nn.Module):
    """Positions that are added, a token that is repeated, scales, and a weight that is scaled."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, 4))
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, 4))
        self.scale = nn.Parameter(torch.ones(1, 1, 4))
        self.weight, self.weight_scale = (
            nn.Parameter(torch.randn(3, 4)),
            nn.Parameter(torch.ones(1)),
        )
        self.both = nn.Parameter(0.1 * torch.randn(5, 4))

    def inner(self, x):
        x = self.embedding(x) + self.positions
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.first(x) * self.scale

    def forward(self, x):
        x = self.inner(x)
        weight = self.weight_scale * self.weight + self.both[:3]
        return F.linear((x[:, 1:] + self.both).mean(1), weight)


class Checkpointed(Network):
    def inner(self, x):
        return checkpoint(super().inner, x, use_reentrant=False)


X = torch.arange(40).reshape(8, 5) ** 2 % 7
LABELS = torch.arange(8) % 3


def rates(model, optimizer, steps=2, clamped=True):
    """Return how far the last step moved entries: as far as the rate, in AdamW's first steps."""
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        for p in (p for p in model.parameters() if clamped and p.grad is not None):
            p.grad = p.grad.abs().clamp(min=1.0)  # moments without noise
        optimizer.step()
    return {
        name: float((p.detach() - before[name]).abs().amax())
        for name, p in model.named_parameters()
    }


def made(kind=Network):
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("kind", [Network, Checkpointed])
def test_what_is_added_to_data_or_multiplies_it_has_the_rate_of_vectors(kind):
    model = made(kind)
    found = rates(model, KFACOptimizer(model.parameters(), kl_clip=None))
    for name in ("positions", "token", "scale", "embedding.weight", "weight_scale"):
        assert found[name] == pytest.approx(VECTORS, rel=0.05), name
    for name in ("weight", "both"):
        assert found[name] == pytest.approx(OTHERS, rel=0.05), name


def test_a_rate_that_is_given_is_that_of_all():
    model = made()
    found = rates(model, KFACOptimizer(model.parameters(), fallback_lr=3e-3))
    for name in ("positions", "token", "scale", "weight", "both"):
        assert found[name] == pytest.approx(3e-3, rel=0.05), name


def test_a_resumed_run_has_the_same_rates():
    model = made()
    optimizer = KFACOptimizer(model.parameters())
    rates(model, optimizer, 3, False)
    again = copy.deepcopy(model)
    other = KFACOptimizer(again.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copies = copy.deepcopy((model, optimizer))
    for run in ((model, optimizer), (again, other), copies):
        rates(*run, 9, False)
    for p, q, r in zip(model.parameters(), again.parameters(), copies[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_moments_of_tables_stay():
    """They are not dropped where a table is found, nor where layers are found anew."""
    model = made()
    optimizer = KFACOptimizer(model.parameters())
    rates(model, optimizer, 5, False)
    model.first.bias.requires_grad_(False)
    rates(model, optimizer, 5, False)
    model.first.bias.requires_grad_(True)
    rates(model, optimizer, 5, False)
    for p in (model.positions, model.token, model.scale):
        assert int(optimizer.state[p]["step"]) == 15


class Parts(nn.Module):
    """One use of a parameter, between layers; data are `[8, 5, 4]`."""

    def __init__(self, shape, use):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.p, self.q = nn.Parameter(0.1 * torch.randn(shape)), nn.Parameter(torch.randn(5, 1, 4))
        self.style = nn.Linear(4, 4)
        self.use = use

    def forward(self, x):
        h = torch.tanh(self.first(F.one_hot(x, 4 if x.max() < 4 else 7)[..., :4].float()))
        return self.last(self.use(self, h)).flatten(1, -2).mean(1)


TABLES = {
    "positions": ((5, 4), lambda m, h: h + m.p),
    "sequence first": ((5, 1, 4), lambda m, h: (h.transpose(0, 1) + m.p).transpose(0, 1)),
    "chosen positions": ((9, 4), lambda m, h: h + m.p[torch.tensor([0, 2, 4, 6, 8])]),
    "rows and columns": ((1, 4), lambda m, h: h + (m.p + m.q[:, 0])),
    "a layer scale": ((4,), lambda m, h: h * m.p.view(1, 1, 4)),
    "a token": ((1, 1, 4), lambda m, h: torch.cat([m.p.expand(8, -1, -1), h], 1)),
    "queries": ((5, 4), lambda m, h: h + m.style(m.p.unsqueeze(0).expand(8, -1, -1))),
}
MATRICES = {
    "repeated for bmm": ((4, 4), lambda m, h: torch.bmm(h, m.p.repeat(8, 1, 1))),
    "masked": ((4, 4), lambda m, h: torch.bmm(h, (m.p * torch.eye(4)).expand(8, 4, 4))),
    "scaled and repeated": ((4, 4), lambda m, h: torch.bmm(h, 2 * m.p.expand(8, 4, 4))),
    "styled": (
        (4, 4),
        lambda m, h: torch.bmm(h, m.p * m.style(h.mean(1)).unsqueeze(1)),
    ),
    "a product by hand": ((4, 4), lambda m, h: (h.unsqueeze(-2) * m.p).sum(-1)),
    "mixed by gates": (
        (8, 4, 4),
        lambda m, h: h @ (m.style(h.mean(1)).softmax(1)[:, :1, None, None] * m.p[None]).sum(1),
    ),
    "scaled": ((4, 4), lambda m, h: F.linear(h, m.q.mean() * m.p)),
}


@pytest.mark.parametrize("name", [*TABLES, *MATRICES])
def test_tables_are_told_from_matrices(name):
    torch.manual_seed(0)
    model = Parts(*(TABLES | MATRICES)[name])
    optimizer = KFACOptimizer(model.parameters(), kl_clip=None)
    found = rates(model, optimizer)
    covered = any(row.parameter == "p" and row.layer for row in optimizer.describe().parameters)
    assert covered or (found["p"] > 4 * OTHERS) == (name in TABLES)
