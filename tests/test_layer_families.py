"""A layer of another kind is one family in the registry, whatever the layout of its weight."""

import pytest
import torch
from torch import nn

from kfacopt import EKFACLinearOperator, KFACLinearOperator, KFACOptimizer
from kfacopt.kfac.layers import registry
from kfacopt.kfac.layers.linear import Linear

pytestmark = pytest.mark.usefixtures("float64")

RELATIVE_TOLERANCE = 1e-10  # round-off of sums in another order, times a condition number of 1e3


class InputsFirst(nn.Module):
    """z = x W + b with W `[d_in, d_out]`, as GPT-2 has it."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class InputsFirstFamily(Linear):
    def matrix_shape(self, shape, groups):
        return super().matrix_shape(shape[::-1], groups)

    def to_matrix(self, tensor, shape, groups):
        turned = tensor.mT if len(shape) == 2 else tensor
        return super().to_matrix(turned, shape, groups)

    def from_matrix(self, matrix, shape):
        result = super().from_matrix(matrix, shape[::-1])
        return result.mT if len(shape) == 2 else result


@pytest.fixture
def twins(monkeypatch):
    entry = registry.Entry(InputsFirst, InputsFirstFamily(), default=True)
    monkeypatch.setattr(registry, "ENTRIES", [*registry.ENTRIES, entry])
    torch.manual_seed(0)
    turned = nn.Sequential(InputsFirst(4, 5), nn.Tanh(), InputsFirst(5, 3))
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for mine, other in zip(turned.parameters(), plain.parameters(), strict=True):
            other.copy_(mine.mT if mine.ndim == 2 else mine)
    return turned, plain, torch.randn(8, 4), torch.randint(3, (8,))


def turned_back(tensors):
    return [x.mT if x.ndim == 2 else x for x in tensors]


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_operators_are_those_of_the_same_layer_in_the_usual_layout(twins, kind, separate):
    turned, plain, X, y = twins
    results = []
    for model in (turned, plain):
        options = {"fisher_type": "type-2", "separate_weight_and_bias": separate}
        params = list(model.parameters())
        operator = kind(model, nn.CrossEntropyLoss(), params, [(X, y)], **options)
        vector = [torch.cos(p * 3) for p in params]
        results.append([*(operator @ vector), *(operator.inverse(1e-2) @ vector)])
    for found, expected in zip(turned_back(results[0]), results[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=RELATIVE_TOLERANCE, atol=1e-12)


def test_the_optimizer_takes_the_same_steps(twins):
    turned, plain, X, y = twins
    for model in (turned, plain):
        optimizer = KFACOptimizer(model.parameters(), fisher_type="type-2")
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), y).backward()
            optimizer.step()
    found = turned_back(turned.parameters())
    for mine, other in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=RELATIVE_TOLERANCE, atol=1e-12)
