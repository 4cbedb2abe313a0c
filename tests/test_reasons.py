"""What `describe()` says of parameters that AdamW trains, and what could be done about it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

X, LABELS = torch.linspace(-1, 1, 24).reshape(6, 4).sin(), torch.arange(6) % 3
TOKENS = torch.arange(24).reshape(6, 4) % 7


class Net(nn.Module):
    """Something with parameters of its own, [N, 4] -> [N, 4], and a head."""

    def __init__(self, function, inner=None, **shapes):
        super().__init__()
        self.head, self.function, self.inner = nn.Linear(4, 3), function, inner
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.linspace(0.5, 1.5, 7 * 4 * 4)[: shape[0] * 4]))
            own = getattr(self, name)
            own.data = own.data.reshape(shape)

    def forward(self, x):
        return self.head(self.function(self, x))


def tied(m, x):
    return F.linear(F.embedding(TOKENS, m.p).mean(1), m.p)[:, :4]


CASES = {
    # name: (the net, its parameter, layers=, what is said)
    "embedding": (
        lambda: Net(lambda m, x: m.inner(TOKENS).mean(1), nn.Embedding(7, 4)),
        ("inner.weight", None, "nn.Embedding is not among layers="),
    ),
    "lookup": (
        lambda: Net(lambda m, x: F.embedding(TOKENS, m.p).mean(1), p=(7, 4)),
        ("p", None, "nn.Embedding is not among layers="),
    ),
    "tied": (lambda: Net(tied, p=(7, 4)), ("p", None, "nn.Linear and nn.Embedding among layers=")),
    "weight norm": (
        lambda: Net(
            lambda m, x: m.inner(x), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        ),
        ("inner.parametrizations.weight.original1", None, "weight norm"),
    ),
    "scaled": (
        lambda: Net(lambda m, x: x @ (2 * m.p), p=(4, 4)),
        ("p", None, "may scale the layer's output instead"),
    ),
    "by entries": (
        lambda: Net(lambda m, x: m.head.weight.new_tensor(2.0) * x + m.p, p=(1, 4)),
        ("p", None, "nn.Parameter among layers="),
    ),
    "a vector": (
        lambda: Net(lambda m, x: m.p.flatten() * x, p=(1, 4)),
        ("p", None, "nn.Parameter among layers="),
    ),
    "unknown": (
        lambda: Net(lambda m, x: x @ torch.matrix_exp(m.p).tril(), p=(4, 4)),
        ("p", None, "used in "),
    ),
    "the bias of a layer that is left out": (
        lambda: Net(lambda m, x: m.inner(x), nn.LayerNorm(4)),
        ("inner.bias", None, "nn.LayerNorm is not among layers="),
    ),
    "another kind of product": (
        lambda: Net(lambda m, x: x @ m.p, p=(4, 4)),
        ("p", [nn.Conv1d], "nn.Linear is not among layers="),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::kfacopt.KFACWarning")
def test_the_reason_says_what_can_be_done(name):
    make, (key, layers, said) = CASES[name]
    model = make()
    optimizer = KFACOptimizer(model.parameters(), layers=layers, factor_update_interval=1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    row = next(row for row in optimizer.describe().parameters if row.parameter == key)
    assert row.curvature.startswith("AdamW: ")
    assert said in row.curvature
