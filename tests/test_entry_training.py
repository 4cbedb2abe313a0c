"""KFACOptimizer with `nn.Parameter` among layers=: vectors and scalars that multiply or add."""

import copy
import pickle

import pytest
import torch
from dense_curvature import empirical_fisher
from dense_curvature import ggn as dense_ggn
from entry_cases import OPERATIONS, UNCERTAIN, Net
from test_normalizations import OPTIONS as OF_NORMALIZATIONS
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACOptimizer, default_layers, diagnose

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
DRAWS = 60
DAMPING = 1e-2
LAYERS = [*default_layers(), nn.Parameter]
EVERY_STEP = {
    "layers": LAYERS,
    "factor_update_interval": 1,
    "inverse_update_interval": 1,
    "ema_decay": 0.0,
    "damping": DAMPING,
    "momentum": 0.0,
    "kl_clip": None,
    "weight_decay": 0.0,
}
ORACLES = {"type-2": dense_ggn, "empirical": empirical_fisher}


def batch(count=6):
    draws = torch.Generator().manual_seed(count)
    return torch.randn(count, 4, generator=draws), torch.randint(3, (count,), generator=draws)


def make(name):
    operation, shapes = OPERATIONS[name]
    return Net(operation, **shapes)


def train(model, optimizer, steps, X=None, y=None):
    X, y = batch() if X is None else (X, y)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def rows_of(optimizer):
    return {row.parameter: row for row in optimizer.describe().parameters}


def diagonal(optimizer, names):
    return torch.cat([optimizer.factors(name).grad_output_factor.flatten() for name in names])


@pytest.mark.parametrize(
    ("fisher_type", "preconditioner"), [("type-2", "kfac"), ("empirical", "ekfac")]
)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "cast"])
def test_a_step_is_that_of_the_exact_diagonal(name, fisher_type, preconditioner):
    model, (X, y) = make(name), batch()
    options = {"fisher_type": fisher_type, "preconditioner": preconditioner}
    optimizer = KFACOptimizer(model.parameters(), lr=1.0, **EVERY_STEP | options)
    train(model, optimizer, 1)
    own = model.entries()
    oracle = ORACLES[fisher_type]
    exact = oracle(model, nn.CrossEntropyLoss(), own, [(X, y)]).diagonal()
    before = torch.cat([p.detach().flatten() for p in own])
    train(model, optimizer, 1)
    names = [key for key, p in model.named_parameters(recurse=False)]
    found = diagonal(optimizer, names)
    torch.testing.assert_close(found, exact, rtol=TOLERANCE, atol=TOLERANCE)
    moved = torch.cat([p.detach().flatten() for p in own]) - before
    gradient = torch.cat([p.grad.flatten() for p in own])
    expected = -gradient / (exact + DAMPING)
    torch.testing.assert_close(moved, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("fisher_type", ORACLES)
def test_micro_batches_of_any_size_add_up(fisher_type):
    """Also those of one datum, where no axis could be told from another."""
    model, (X, y) = make("several-uses"), batch(7)
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | {"fisher_type": fisher_type})
    train(model, optimizer, 1, X, y)
    exact = ORACLES[fisher_type](model, nn.CrossEntropyLoss(), [model.p], [(X, y)]).diagonal()
    optimizer.zero_grad()
    for own in (slice(0, 1), slice(1, 3), slice(3, 7)):
        loss = F.cross_entropy(model(X[own]), y[own], reduction="sum") / len(X)
        loss.backward()
    optimizer.step()
    found = diagonal(optimizer, ["p"])
    torch.testing.assert_close(found, exact, rtol=TOLERANCE, atol=TOLERANCE)


def test_data_with_several_rows_count_as_a_whole():
    """Half of the rows would be half of each datum; the other use is of the same data."""
    model, (X, y) = make("rows-per-datum"), batch()
    options = {"fisher_type": "type-2", "factor_batch_fraction": 0.5}
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | options)
    train(model, optimizer, 1)
    exact = dense_ggn(model, nn.CrossEntropyLoss(), [model.p], [(X, y)]).diagonal()
    train(model, optimizer, 1)
    torch.testing.assert_close(diagonal(optimizer, "p"), exact, rtol=TOLERANCE, atol=TOLERANCE)


def test_part_of_the_data_counts_on_average():
    model, (X, y) = make("layer-scale"), batch()
    options = {"fisher_type": "type-2", "factor_batch_fraction": 0.5, "lr": 0.0}
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | options | {"fallback_lr": 0.0})
    exact = dense_ggn(model, nn.CrossEntropyLoss(), [model.p], [(X, y)]).diagonal()
    train(model, optimizer, 1)
    total = torch.zeros(5)
    for _ in range(DRAWS):
        train(model, optimizer, 1)
        total += diagonal(optimizer, "p")
    torch.testing.assert_close(total / DRAWS, exact, rtol=0.2, atol=0)


@pytest.mark.parametrize("rows", [0, 3, 6])
def test_some_rows_of_the_data(rows):
    """As an expert has them; also none, as many as half of the data, or all of them."""
    model = make("layer-scale")
    model.operation = lambda m, h: h.index_add(0, torch.arange(rows), m.p * h[:rows])
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    train(model, optimizer, 2)
    expected = "diagonal of the Fisher" if rows == 6 else "AdamW: no data axis is known"
    assert rows_of(optimizer)["p"].curvature.startswith(expected)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.p = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x):
        return self.last(torch.tanh(self.p * torch.tanh(self.first(x))))


@pytest.mark.filterwarnings("ignore::kfacopt.KFACWarning")  # where they do not fit
def test_rows_that_the_loss_chooses_anew_in_each_batch():
    """A choice that fits N / R rows a datum says nothing of the next one."""
    model, counted = Scaled(), 0
    optimizer = KFACOptimizer(model.parameters(), fisher_type="type-2", lr=1e-3, **EVERY_STEP)
    draws = torch.Generator().manual_seed(0)
    for step in range(40):
        X, y = batch(4)
        rows = torch.randperm(4, generator=draws)[:2].sort().values
        exact = dense_ggn(model, nn.CrossEntropyLoss(), [model.p], [(X[rows], y[rows])]).diagonal()
        optimizer.zero_grad()
        F.cross_entropy(model(X)[rows], y[rows]).backward()
        optimizer.step()
        if step > 2 and rows_of(optimizer)["p"].curvature.startswith("diagonal"):
            found = optimizer.factors("p").grad_output_factor.flatten()
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
            counted += 1
    assert counted > 5


@pytest.mark.parametrize("name", UNCERTAIN)
def test_what_is_not_certain_is_trained_by_the_fallback_and_said(name):
    model = UNCERTAIN[name]()
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    train(model, optimizer, 3)
    row = rows_of(optimizer)["p"]
    reason = "used in Lerp" if name == "another-operation" else "no data axis is known"
    assert reason in row.curvature
    assert row.curvature.startswith("AdamW: ")
    assert "exp_avg" in optimizer.state[model.p]


def test_one_datum_is_never_certain():
    model = make("layer-scale")
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    train(model, optimizer, 3, *batch(1))
    assert "no data axis is known" in rows_of(optimizer)["p"].curvature
    train(model, optimizer, 2, *batch(2))
    assert rows_of(optimizer)["p"].curvature == "diagonal of the Fisher, 5"


def test_a_use_that_comes_later_is_not_left_out():
    """From then on the block would lack it: AdamW, and a warning."""
    model = make("layer-scale")
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    train(model, optimizer, 2)
    model.operation = lambda m, h: m.p * F.linear(h, m.p * torch.eye(5))
    with pytest.warns(UserWarning, match="'p'"):
        train(model, optimizer, 1)
    assert "no data axis is known" in rows_of(optimizer)["p"].curvature


def test_it_is_an_option():
    assert nn.Parameter not in default_layers()
    model = make("layer-scale")
    optimizer = KFACOptimizer(model.parameters())
    train(model, optimizer, 2)
    assert rows_of(optimizer)["p"].curvature.startswith("AdamW: ")


class Products(nn.Module):
    """Biases that products have are theirs; one that two products do not share has its entries."""

    def __init__(self):
        super().__init__()
        self.bias, self.kernel = nn.Parameter(torch.rand(5)), nn.Parameter(torch.randn(4, 5))
        self.plain, self.other = nn.Parameter(torch.rand(5)), nn.Parameter(torch.randn(5, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(x @ self.kernel + self.bias)
        return self.head(torch.tanh(h @ self.other) ** 2 + self.plain)


def test_biases_of_products_stay_theirs():
    model = Products()
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    train(model, optimizer, 2)
    layers = {name: row.layer for name, row in rows_of(optimizer).items()}
    assert (layers["bias"], layers["plain"]) == ("kernel", "plain")


@pytest.mark.parametrize("name", ["cls-with-a-position", "temperature", "rows-per-datum"])
def test_activation_checkpointing_changes_nothing(name):
    """Where graphs are recomputed, saved tensors can be read once."""

    class Checkpointed(Net):
        def forward(self, x):
            h = checkpoint(self.hidden, x, use_reentrant=False)
            return self.last(h.flatten(1))

    model = make(name)
    twin = copy.deepcopy(model)
    twin.__class__ = Checkpointed
    optimizers = [KFACOptimizer(m.parameters(), **EVERY_STEP) for m in (model, twin)]
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        train(net, optimizer, 3)
    assert rows_of(optimizers[1])["p"].curvature.startswith("diagonal")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=TOLERANCE, atol=TOLERANCE)


OPTIONS = {**OF_NORMALIZATIONS, "reduce": {"kfac_approx": "reduce"}}


@pytest.mark.parametrize("name", ["scalar", "cls-with-a-position"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_trains_and_is_resumed_bit_by_bit(options, name):
    model = make(name)
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS, **options)
    first = train(model, optimizer, 1)
    assert train(model, optimizer, 8) < first
    assert optimizer.statistics()["fallback_parameters"] == 0.0
    twin = copy.deepcopy(model)
    resumed = KFACOptimizer(twin.parameters(), layers=LAYERS, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.operation = twin.operation = None  # lambdas are not pickled
    copies = pickle.loads(pickle.dumps((model, optimizer)))
    for own in ((twin, resumed), copies, (model, optimizer)):
        own[0].operation = OPERATIONS[name][0]
        train(*own, 3)
    for other in (twin, copies[0]):
        assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_frozen_and_unfrozen():
    model = make("layer-scale")
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    train(model, optimizer, 2)
    model.p.requires_grad_(False)
    optimizer.zero_grad()
    train(model, optimizer, 2)
    assert rows_of(optimizer)["p"].curvature == "AdamW: frozen"
    model.p.requires_grad_(True)
    train(model, optimizer, 2)
    assert rows_of(optimizer)["p"].curvature == "diagonal of the Fisher, 5"


def over_ranks(rank):
    """Train on two ranks; the second sees one datum in the first step, and can tell no axis."""
    model = make("cls-with-a-position").double()
    with torch.no_grad():  # the same in processes with another default dtype
        for p in model.parameters():
            values = torch.linspace(-1, 1, p.numel(), dtype=torch.float64)
            p.copy_(values.reshape(p.shape).sin())
    called = model if rank is None else DistributedDataParallel(model)
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | {"fisher_type": "type-2"})
    X = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(6, 4).sin()
    y = torch.arange(6) % 3
    for step in range(3):
        optimizer.zero_grad()
        parts = ((0, 1, 2, 3, 4), (5,)) if step == 0 else ((0, 2, 4), (1, 3, 5))
        own = parts if rank is None else parts[rank : rank + 1]
        for data in own:
            loss = F.cross_entropy(called(X[list(data)]), y[list(data)])
            (loss / len(own)).backward()
        optimizer.step()
    return [*(optimizer.factors(p)[1] for p in model.entries()), *model.parameters()]


def obligations(rank):
    yield "entries", lambda: over_ranks(rank)


@pytest.mark.slow
def test_two_ranks_are_one_process(ranks):
    expected = over_ranks(None)
    for result in (r["entries"] for r in ranks):
        assert not isinstance(result, str), result
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_diagnosis_covers_what_the_optimizer_does():
    model, (X, y) = make("cls-with-a-position"), batch()
    model.scale = nn.Parameter(torch.rand(6, 1))  # an entry for each datum
    model.operation = lambda m, h: (
        m.scale[: len(h), None] * OPERATIONS["cls-with-a-position"][0](m, h)
    )
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS)
    train(model, optimizer, 2)
    report = diagnose(model, nn.CrossEntropyLoss(), [(X, y)], optimizer)
    assert "p" in str(report)
    uncovered = report.to_dict()["uncovered"]
    assert uncovered == {"scale": "no data axis is known where it is multiplied or added"}
