"""torch.compile: a compiled model trains as the plain one does, or an error names the cure."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("default"),  # the compiler's own, raised inside it, would stop it
]

STEPS = 4
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def optimizer_of(model, interval):
    return KFACOptimizer(model.parameters(), fisher_type="type-2", factor_update_interval=interval)


def train(model, optimizer):
    for i in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(X * (1 + i)), LABELS).backward()
        optimizer.step()


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ["compiled first", "optimizer first"])
def test_compiled_models(order, backend, interval):
    torch._dynamo.reset()
    model, plain = network(), network()
    if order == "compiled first":
        compiled = torch.compile(model, backend=backend)
        optimizer = optimizer_of(compiled, interval)
    else:
        optimizer = optimizer_of(model, interval)
        compiled = torch.compile(model, backend=backend)
    train(compiled, optimizer)
    train(plain, optimizer_of(plain, interval))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)


def test_a_model_that_was_compiled_and_called_before():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="eager")
    F.cross_entropy(compiled(X), LABELS).backward()
    optimizer = optimizer_of(compiled, 1)
    F.cross_entropy(compiled(X), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"call torch\._dynamo\.reset\(\)"):
        optimizer.step()
    torch._dynamo.reset()
    train(compiled, optimizer)
