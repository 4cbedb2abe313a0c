"""Parameters that multiply and are added entry by entry: the exact diagonal of the GGN."""

from math import prod as size

import pytest
import torch
from dense_curvature import ggn as dense_ggn
from entry_cases import OPERATIONS, UNCERTAIN, Net, SequenceFirst
from hypothesis import given, settings
from hypothesis import strategies as st
from kfac_cases import to_dense
from torch import nn

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


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_is_not_certain_is_refused_by_name(name, kind):
    model, X, y = UNCERTAIN[name](), torch.randn(6, 4), torch.randint(3, (6,))
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


@st.composite
def shapes(draw):
    """The shape of a datum's positions, and one of a parameter that is broadcast to it."""
    positions = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    own = [draw(st.sampled_from((1, n))) for n in positions]
    lead = (1,) * draw(st.integers(0, 1))
    start = draw(st.integers(0, len(own))) if not lead else 0
    return positions, (*lead, *own[start:]), draw(st.permutations(range(len(positions))))


@settings(max_examples=40, deadline=None)
@given(shapes(), st.sampled_from(("times", "plus", "minus", "over")), st.integers(2, 5))
def test_any_shape(drawn, operation, count):
    positions, own, order = drawn

    def operate(m, h):
        h = h.flatten(1)[:, : size(positions)].unflatten(1, [positions[i] for i in order])
        h = h.permute(0, *(order.index(i) + 1 for i in range(len(order))))
        return {"times": h * m.p, "plus": m.p + h, "minus": m.p - h, "over": h / m.p}[operation]

    model = Net(operate, positions=6, p=own)
    loss, data = nn.MSELoss(), [(torch.randn(count, 4), torch.randn(count, 3))]
    operator = KFACLinearOperator(model, loss, [model.p], data, fisher_type="type-2")
    expected = dense_ggn(model, loss, [model.p], data).diagonal().diag()
    torch.testing.assert_close(to_dense(operator), expected, rtol=TOLERANCE, atol=TOLERANCE)
