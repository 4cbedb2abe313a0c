"""Parameters that multiply and are added entry by entry: the exact diagonal of the GGN."""

import pytest
import torch
from dense_curvature import ggn as dense_ggn
from entry_cases import OPERATIONS, Net
from kfac_cases import to_dense
from torch import nn
from torch.nn import functional as F

from kfacopt import EKFACLinearOperator, KFACLinearOperator

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
SINGLE = 1e-5  # where a model computes in float32
DRAWS = 100


def case(name, count=6):
    operation, shapes = OPERATIONS[name]
    return Net(operation, **shapes), torch.randn(count, 4), torch.randint(3, (count,))


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", OPERATIONS)
def test_type_2_is_the_exact_diagonal(name, kind):
    model, X, y = case(name)
    loss, params = nn.CrossEntropyLoss(), model.entries()
    data = [(X[:4], y[:4]), (X[4:], y[4:])]
    operator = kind(model, loss, params, data, fisher_type="type-2")
    expected = dense_ggn(model, loss, params, data).diagonal().diag()
    tolerance = SINGLE if name == "cast" else TOLERANCE
    torch.testing.assert_close(to_dense(operator), expected, rtol=tolerance, atol=tolerance)


def test_loss_on_flattened_positions():
    """A datum of the parameter's is a sequence, of which z has several rows: on average exact."""
    loss = nn.MSELoss()
    model = nn.Sequential(Net(lambda m, h: m.p * h, p=(5,)), nn.Unflatten(1, (3, 1)))
    rows = nn.Sequential(model, nn.Flatten(0, 1))
    X, y, params = torch.randn(4, 4), torch.randn(12, 1), [model[0].p]
    expected = dense_ggn(rows, loss, params, [(X, y)]).diagonal()
    options = {"fisher_type": "type-2", "check_deterministic": False}
    total = torch.zeros(5)
    for seed in range(DRAWS):
        operator = KFACLinearOperator(rows, loss, params, [(X, y)], seed=seed, **options)
        total += to_dense(operator).diagonal()
    torch.testing.assert_close(total / DRAWS, expected, rtol=0.2, atol=0)


class ScaledWeight(nn.Module):
    """`t * W`, where W has as many rows as there are data."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(6, 3)
        self.p, self.W = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return self.last(torch.tanh(F.linear(torch.tanh(self.first(x)), self.p * self.W)))


class ScaledAdapter(ScaledWeight):
    """The same with a weight that products of parameters make, one of them frozen."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.randn(6, 6), requires_grad=False)

    def forward(self, x):
        W = torch.tanh(self.first.weight[:1].T @ self.first.weight[:1, :1]).T.expand(6, 4)
        W = torch.cat([self.p * (self.A @ self.W), self.p + W[:, :0]], 1)
        return self.last(torch.tanh(F.linear(torch.tanh(self.first(x)), W)))


class SequenceFirst(nn.Module):
    """[N, 4] -> [S, N, 5], times p, -> [N, 3], with as many positions as data."""

    def __init__(self, pick=lambda h: h.mean(0)):
        super().__init__()
        self.first, self.last = nn.Linear(4, 30), nn.Linear(5, 3)
        self.p, self.pick = nn.Parameter(torch.rand(5)), pick

    def forward(self, x):
        h = torch.tanh(self.first(x)).unflatten(1, (6, 5)).transpose(0, 1)
        return self.last(self.pick(torch.tanh(self.p * h)))


class BothWays(Net):
    """Multiplied with data and with a weight."""

    def __init__(self):
        super().__init__(lambda m, h: m.p * F.linear(h, m.p * m.W), p=(5,), W=(5, 5))


class Mixed(Net):
    """Data see each other behind the parameter."""

    def __init__(self):
        super().__init__(lambda m, h: (m.p * h).softmax(0), p=(5,))


class Grouped(Net):
    """Rows of one datum are not one behind the other."""

    def __init__(self):
        def operation(m, h):
            return torch.stack((m.p * torch.cat([h[:, 0], h[:, 1]])).chunk(2), 1)

        super().__init__(operation, p=(5,))


class Reversed(Net):
    """The rows of a product are not those of z."""

    def __init__(self):
        super().__init__(lambda m, h: m.p * h, p=(5,))

    def forward(self, x):
        return super().forward(x).flip(0)


class Hidden(Net):
    """In an operation that is none of those that are known."""

    def __init__(self):
        super().__init__(lambda m, h: F.layer_norm(h, (5,), m.p), p=(5,))


class OfInputs(nn.Module):
    """What has no graph may be data, or anything else."""

    def __init__(self):
        super().__init__()
        self.p, self.last = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.p * x))


class OfATable(nn.Module):
    """A row for each datum, looked up in their order this time."""

    def __init__(self):
        super().__init__()
        self.p, self.table = nn.Parameter(torch.rand(())), nn.Parameter(torch.randn(6, 4))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(F.embedding(torch.arange(len(x)), self.p * self.table) + x))


def first_position(h):
    return h[0]


def last_position(h):
    return h[-1]


REFUSED = {
    "a-scaled-weight": ScaledWeight,
    "a-scaled-adapter": ScaledAdapter,
    "sequence-first": SequenceFirst,
    "sequence-first-cls": lambda: SequenceFirst(first_position),
    "sequence-first-last": lambda: SequenceFirst(last_position),
    "both-ways": BothWays,
    "data-that-see-each-other": Mixed,
    "scattered-rows": Grouped,
    "reversed-rows": Reversed,
    "another-operation": Hidden,
    "inputs": OfInputs,
    "a-table": OfATable,
}


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_by_name(name, kind):
    model, X, y = REFUSED[name](), torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(NotImplementedError, match="'p' is in an unsupported layer"):
        kind(model, nn.CrossEntropyLoss(), [model.p], [(X, y)])


def test_a_batch_that_is_not_like_the_first_one_is_refused():
    """One datum is never looked at alone; then there are as many positions as data."""
    model, loss = SequenceFirst(), nn.CrossEntropyLoss()
    for counts in ((1, 6), (5, 6), (6, 1), (1,)):
        data = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in counts]
        with pytest.raises(NotImplementedError, match="'p'"):
            KFACLinearOperator(model, loss, [model.p], data) @ torch.ones(5)


def test_batches_of_one_datum_count_where_others_were_certain():
    model, X, y = case("layer-scale", 5)
    loss, data = nn.CrossEntropyLoss(), [(X[:4], y[:4]), (X[4:], y[4:])]
    operator = KFACLinearOperator(model, loss, [model.p], data, fisher_type="type-2")
    expected = dense_ggn(model, loss, [model.p], data).diagonal().diag()
    torch.testing.assert_close(to_dense(operator), expected, rtol=TOLERANCE, atol=TOLERANCE)
