"""Mappings, sequences and objects as inputs: the matrices of the tensors in them, or a question."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import dense_curvature as dense
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import kfacopt
from kfacopt.data import batch_size

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12  # of float64 sums of a few numbers of about 1
SIZES = [3, 5]
C = 3
Pair = namedtuple("Pair", ["x", "mask"])


@dataclass
class Inputs:
    x: Tensor
    mask: Tensor
    name: str = "batch"


class Select(nn.Module):
    """A layer on one tensor of the inputs, and how many rows it returns."""

    def __init__(self, select):
        super().__init__()
        self.layer, self._select = nn.Linear(4, C), select

    def forward(self, inputs):
        return self.layer(self._select(inputs))


KINDS = {
    "dict": (lambda x: {"x": x, "mask": x[:, :1], "scale": torch.tensor(2.0)}, lambda i: i["x"]),
    "UserDict": (lambda x: UserDict(x=x, length=4), lambda i: i["x"]),  # as BatchEncoding
    "tuple": (lambda x: (x, x[:, 0]), lambda i: i[0]),
    "list": (lambda x: [x, None], lambda i: i[0]),
    "namedtuple": (lambda x: Pair(x, x > 0), lambda i: i.x),
    "dataclass": (lambda x: Inputs(x, x > 0), lambda i: i.x),
    "object": (lambda x: SimpleNamespace(x=x), lambda i: i.x),
    "nested": (lambda x: ({"text": {"ids": x}}, [x]), lambda i: i[0]["text"]["ids"]),
}
GRAPH = (lambda x: SimpleNamespace(x=x, edges=torch.zeros(2, 7), num=len(x)), lambda i: i.x)


def own_mean(z, y):
    return F.cross_entropy(z, y) + F.mse_loss(z, z.detach() * 0)


own_mean.reduction = "mean"


def joint(operator):
    return lambda *args, **kw: operator(*args, separate_weight_and_bias=False, **kw)


def empirical(operator):
    return lambda *args, **kw: joint(operator)(*args, fisher_type="empirical", **kw)


CE = nn.CrossEntropyLoss()
OPERATORS = {
    "H": (kfacopt.HessianLinearOperator, CE),
    "GGN": (kfacopt.GGNLinearOperator, CE),
    "Fisher": (kfacopt.FisherMCLinearOperator, CE),
    "EF": (kfacopt.EFLinearOperator, CE),
    "K-FAC": (joint(kfacopt.KFACLinearOperator), CE),
    "EKFAC": (joint(kfacopt.EKFACLinearOperator), CE),
    "K-FAC, empirical": (empirical(kfacopt.KFACLinearOperator), CE),
    "EKFAC, empirical": (empirical(kfacopt.EKFACLinearOperator), CE),
    "own mean, GGN": (kfacopt.GGNLinearOperator, own_mean),
    "own mean, H": (kfacopt.HessianLinearOperator, own_mean),
    "own mean, EF": (kfacopt.EFLinearOperator, own_mean),
}
COUNTING = ["EF", "K-FAC, empirical", "EKFAC, empirical", "own mean, GGN", "own mean, EF"]


def matrix(operator):
    return operator @ torch.eye(operator.shape[1])


def make(select):
    return Select(select), [(torch.randn(n, 4), torch.randint(C, (n,))) for n in SIZES]


@pytest.mark.parametrize(("operator", "loss"), OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize(("wrap", "select"), [*KINDS.values(), GRAPH], ids=[*KINDS, "graph"])
def test_inputs_are_counted_as_their_tensors(wrap, select, operator, loss):
    model, data = make(select)
    plain, params = model.layer, list(model.parameters())
    options = {"batch_size_fn": lambda i: i.num} if wrap is GRAPH[0] else {}
    wrapped = operator(model, loss, params, [(wrap(X), y) for X, y in data], **options)
    expected = matrix(operator(plain, loss, params, data))
    torch.testing.assert_close(matrix(wrapped), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", COUNTING)
def test_what_is_not_told_is_asked_for(name):
    """First axes that differ; one length that the predictions contradict; nothing to count."""
    operator, loss = OPERATORS[name]
    wrap, select = GRAPH
    model, data = make(select)
    texts = Select(lambda text: torch.ones(len(text), 4))
    for net, inputs, y in (
        (model, wrap(data[0][0]), data[0][1]),
        (Pooled(model), SimpleNamespace(x=torch.randn(4, 4)), torch.tensor([0, 1])),
        (texts, ["a", "b"], torch.tensor([0, 1])),
    ):
        args = net, loss, list(net.parameters()), [(inputs, y)]
        with pytest.raises(TypeError, match=r"do not tell the number of data.*Give batch_size_fn"):
            matrix(operator(*args))
        count = len(y)
        matrix(operator(*args, batch_size_fn=lambda _, count=count: count))


class Pooled(nn.Module):
    """Two nodes make a graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs).unflatten(0, (-1, 2)).mean(1)


def test_the_number_of_data():
    sequences = pack_sequence([torch.rand(3, 2)])
    assert batch_size(sequences) == 1  # one sequence, of as many positions as tensors have rows
    assert batch_size({"x": torch.rand(0, 2)}) == 0
    assert batch_size("anything", batch_size_fn=lambda _: torch.tensor(4)) == 4
    for wrong in (1.5, -1, None, True):
        with pytest.raises(ValueError, match=r"batch_size_fn\(X\) must be an integer"):
            batch_size(None, batch_size_fn=lambda _, wrong=wrong: wrong)
    model, data = make(lambda i: i)
    for operator in (kfacopt.GGNLinearOperator, kfacopt.KFACLinearOperator):
        with pytest.raises(ValueError, match="batch_size_fn must be a function"):
            operator(model, CE, list(model.parameters()), data, batch_size_fn=3)


def test_empty_batches_and_changing_batches_are_seen():
    model, data = make(KINDS["dict"][1])
    wrap, params = KINDS["dict"][0], list(model.parameters())
    batches = [(wrap(X), y) for X, y in data]
    empty = (wrap(torch.rand(0, 4)), torch.zeros(0, dtype=torch.int64))
    expected = matrix(kfacopt.GGNLinearOperator(model, CE, params, batches))
    found = matrix(kfacopt.GGNLinearOperator(model, CE, params, [*batches, empty]))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)

    class Shuffled:
        first = True

        def __iter__(self):
            self.first = not self.first
            return iter(batches if self.first else batches[::-1])

    with pytest.raises(RuntimeError, match="data: not deterministic, the order of the batches"):
        kfacopt.GGNLinearOperator(model, CE, params, Shuffled())


# Parameters by name, the gradient and the loss ----------------------------------------------------

GRADIENTS = ["H", "GGN", "Fisher", "EF", "K-FAC", "EKFAC", "own mean, GGN"]


@pytest.mark.parametrize("kind", ["tensor", "dict"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_and_loss(name, kind):
    """Of all data, however they are batched, in the loss's own reduction."""
    operator, loss = OPERATORS[name]
    wrap, select = KINDS["dict"] if kind == "dict" else (lambda x: x, lambda x: x)
    model, data = make(select)
    params = list(model.parameters())
    for loss_func in (loss, nn.MSELoss(), weighted()):
        own = [(X, torch.rand(len(X), C)) for X, _ in data] if is_mse(loss_func) else data
        gradient, value = operator(
            model, loss_func, params, [(wrap(X), y) for X, y in own]
        ).gradient_and_loss()
        expected = loss_func(dense.predictions(model.layer, own), dense.targets(own))
        assert not value.requires_grad
        assert [g.shape for g in gradient] == [p.shape for p in params]
        torch.testing.assert_close(value, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)
        want = torch.autograd.grad(expected, params)
        torch.testing.assert_close(gradient, list(want), rtol=TOLERANCE, atol=TOLERANCE)
    assert all(p.grad is None for p in params)


def weighted():
    return nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 4.0]), ignore_index=1)


def is_mse(loss):
    return isinstance(loss, nn.MSELoss)


@pytest.mark.parametrize("operator", [kfacopt.EFLinearOperator, kfacopt.KFACLinearOperator])
def test_gradient_and_loss_of_a_sum(operator):
    model, data = make(lambda x: x)
    params, loss = list(model.parameters()), nn.CrossEntropyLoss(reduction="sum")
    options = {"loss_average": None} if operator is kfacopt.KFACLinearOperator else {}
    gradient, value = operator(model, loss, params[:1], data, **options).gradient_and_loss()
    expected = loss(dense.predictions(model, data), dense.targets(data))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, list(torch.autograd.grad(expected, params[:1])))
    ignored = [(X, torch.full_like(y, -100)) for X, y in data]
    options = {}
    with pytest.raises(ValueError, match="mean over no terms"):
        operator(model, CE, params, ignored).gradient_and_loss()
    with pytest.raises(ValueError, match="no batches"):
        operator(model, CE, params, [], check_deterministic=False).gradient_and_loss()


@pytest.mark.parametrize("name", ["K-FAC", "EKFAC", "GGN"])
def test_parameters_by_name(name):
    model, data = make(lambda x: x)
    operator, loss = OPERATORS[name]
    named = dict(reversed(list(model.named_parameters())))
    expected = operator(model, loss, list(named.values()), data)
    found = operator(model, loss, named, data)
    torch.testing.assert_close(matrix(found), matrix(expected), rtol=0, atol=0)
    if name != "GGN":
        copies = {key: p.detach().clone().requires_grad_() for key, p in named.items()}
        swapped = {"layer.weight": model.layer.bias}
        for wrong in (copies, swapped):
            with pytest.raises(ValueError, match=r"params\['layer\..*'\] is not model_func's"):
                operator(model, loss, wrong, data)


class Sequences(nn.Module):
    """Inputs `[T, N, 2]`, a prediction for each of N."""

    def __init__(self):
        super().__init__()
        self.rnn, self.layer = nn.RNN(2, 3), nn.Linear(3, C)

    def forward(self, x):
        return self.layer(self.rnn(x)[1][0])


def mean_of_cross_entropies(z, y):
    return F.cross_entropy(z, y)


mean_of_cross_entropies.reduction = "mean"


def second_axis(x):
    return x.shape[1]


def test_data_on_another_axis_are_asked_for():
    net, T = Sequences(), 4
    X, y = torch.randn(T, 9, 2), torch.randint(C, (9,))
    data = [(X[:, :7], y[:7]), (X[:, 7:], y[7:])]
    params, head = list(net.parameters()), list(net.layer.parameters())
    own = mean_of_cross_entropies
    by_data = [(X[:, [n]], y[[n]]) for n in range(9)]
    expected = dense.ggn(net, nn.CrossEntropyLoss(), params, data)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(own(net(x), t), params)])
        for x, t in by_data
    ]
    cases = {
        kfacopt.GGNLinearOperator: (own, params, {}, expected),
        kfacopt.EFLinearOperator: (
            nn.CrossEntropyLoss(), params, {}, sum(torch.outer(g, g) for g in gradients) / 9,
        ),
        kfacopt.KFACLinearOperator: (
            nn.CrossEntropyLoss(), head, {"fisher_type": "empirical"}, None,
        ),
        kfacopt.EKFACLinearOperator: (
            nn.CrossEntropyLoss(), head, {"fisher_type": "empirical"}, None,
        ),
    }  # fmt: skip
    for operator, (loss, theta, options, matrix) in cases.items():
        eye = torch.eye(sum(p.numel() for p in theta))
        with pytest.raises(ValueError, match=r"not a multiple of the 4 data .* batch_size_fn"):
            operator(net, loss, theta, data, **options) @ eye
        found = operator(net, loss, theta, data, batch_size_fn=second_axis, **options) @ eye
        if matrix is None:  # of features that come first
            hidden = [(net.rnn(x)[1][0].detach(), t) for x, t in data]
            matrix = operator(net.layer, loss, theta, hidden, **options) @ eye
        torch.testing.assert_close(found, matrix, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("operator", [kfacopt.KFACLinearOperator, kfacopt.EKFACLinearOperator])
def test_batches_without_data_change_no_empirical_fisher(operator, place):
    net, loss = nn.Linear(4, C), nn.CrossEntropyLoss()
    X, y = torch.randn(8, 4), torch.randint(C, (8,))
    data = [(X[:3], y[:3]), (X[3:], y[3:])]
    args = net, loss, list(net.parameters())
    with_none = [*data[:place], (X[:0], y[:0]), *data[place:]]
    found, expected = (
        operator(*args, batches, fisher_type="empirical") @ torch.eye(5 * C)
        for batches in (with_none, data)
    )
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
