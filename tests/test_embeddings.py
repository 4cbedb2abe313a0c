"""Embeddings and bags: a diagonal A by token counts, against the dense GGN and dense one-hots."""

import copy

import pytest
import torch
from dense import block_mask
from dense_curvature import ggn as dense_ggn
from kfac_cases import Mean, to_dense
from torch import nn
from torch.nn import functional as F

from kfacopt import EKFACLinearOperator, KFACLinearOperator, KFACOptimizer, default_layers
from kfacopt.kfac.layers.sparse_rows import SparseRows, side_by_side

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
V, WIDTH = 6, 4

NETS = {
    # name: (layers of a net that is linear in the embedding, shape of a datum, approximation)
    "one-token": (lambda: [nn.Embedding(V, WIDTH), nn.Linear(WIDTH, 3)], (), "expand"),
    "positions": (lambda: [nn.Embedding(V, WIDTH), nn.Linear(WIDTH, 3)], (5,), "expand"),
    "padding": (
        lambda: [nn.Embedding(V, WIDTH, padding_idx=2), nn.Linear(WIDTH, 3)],
        (2, 3),
        "expand",
    ),
    "mean": (lambda: [nn.Embedding(V, WIDTH), Mean(), nn.Linear(WIDTH, 3)], (5,), "reduce"),
    "mean-with-padding": (
        lambda: [nn.Embedding(V, WIDTH, padding_idx=0), Mean(), nn.Linear(WIDTH, 3)],
        (5,),
        "reduce",
    ),
    "bag-of-means": (lambda: [nn.EmbeddingBag(V, WIDTH), nn.Linear(WIDTH, 3)], (5,), "expand"),
    "bag-of-means-with-padding": (
        lambda: [nn.EmbeddingBag(V, WIDTH, padding_idx=1), nn.Linear(WIDTH, 3)],
        (5,),
        "reduce",
    ),
    "bag-of-sums": (
        lambda: [nn.EmbeddingBag(V, WIDTH, mode="sum"), nn.Linear(WIDTH, 3)],
        (4,),
        "expand",
    ),
}


def case(name, between=()):
    make, shape, approx = NETS[name]
    embedding, *rest = make()
    model = nn.Sequential(embedding, *between, *rest)
    data = [(torch.randint(V, (n, *shape)), None) for n in (4, 7)]
    return model, [(X, torch.rand_like(model(X))) for X, _ in data], approx


def token_mask(params):
    """Ones within a block, and for the embedding within a token: A is kept as its diagonal."""
    mask = block_mask(params, range(len(params)))
    size = params[0].numel()
    mask[:size, :size] = torch.kron(torch.eye(V), torch.ones(WIDTH, WIDTH))
    return mask


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", NETS)
def test_type_2_is_the_ggn_of_linear_nets_token_by_token(name, kind):
    model, data, approx = case(name)
    params, loss = list(model.parameters()), nn.MSELoss()
    options = {"fisher_type": "type-2", "kfac_approx": approx}
    operator = kind(model, loss, params, data, **options)
    ggn = dense_ggn(model, loss, params, data)
    expected = ggn * token_mask(params)
    torch.testing.assert_close(to_dense(operator), expected, rtol=TOLERANCE, atol=TOLERANCE)
    whole = ggn * block_mask(params, range(len(params)))
    has_one_token_a_row = approx == "expand" and isinstance(model[0], nn.Embedding)
    assert torch.allclose(expected, whole) == has_one_token_a_row
    assert operator.factors("0").input_factor.shape == (V,)
    for method in ("exact",) if kind is EKFACLinearOperator else ("exact", "factored"):
        inverse = operator.inverse(0.1, method=method)
        if method == "exact":
            damped = to_dense(operator) + 0.1 * torch.eye(len(ggn))
            assert torch.allclose(to_dense(inverse), torch.linalg.inv(damped), atol=TOLERANCE)
        assert torch.allclose(inverse.trace(), to_dense(inverse).trace())


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", NETS)
def test_ekfac_has_the_trace_of_the_exact_block_of_any_net(name, approx):
    model, data, _ = case(name, [nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()])
    loss, params = nn.MSELoss(), [model[0].weight]
    options = {"fisher_type": "type-2", "kfac_approx": approx}
    ekfac = EKFACLinearOperator(model, loss, params, data, **options)
    trace = dense_ggn(model, loss, params, data).trace()
    torch.testing.assert_close(ekfac.trace(), trace, rtol=TOLERANCE, atol=0.0)


class ScaledPadding(nn.Module):
    """An embedding whose padded positions have other gradients than the rest."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = make()

    def forward(self, x):
        z = self.embedding(x)
        padded = x == 2
        padded = padded.all(-1) if isinstance(self.embedding, nn.EmbeddingBag) else padded
        return (z * torch.where(padded, 5.0, 1.0)[..., None]).flatten(1)


SCALED = {
    "positions": (lambda: nn.Embedding(V, WIDTH, padding_idx=2), (3,), "expand"),
    "one-token": (lambda: nn.Embedding(V, WIDTH, padding_idx=2), (), "reduce"),
    "bag": (lambda: nn.EmbeddingBag(V, WIDTH, mode="sum", padding_idx=2), (1,), "expand"),
}


@pytest.mark.parametrize("name", SCALED)
def test_padding_counts_in_no_factor(name):
    make, shape, approx = SCALED[name]
    model, X = ScaledPadding(make), torch.arange(10 * (shape or (1,))[0]).reshape(10, *shape) % 4
    y, loss = torch.zeros_like(model(X)), nn.MSELoss()
    args = model, loss, list(model.parameters()), [(X[:4], y[:4]), (X[4:], y[4:])]
    K = KFACLinearOperator(*args, fisher_type="type-2", kfac_approx=approx)
    torch.testing.assert_close(to_dense(K), dense_ggn(*args), rtol=TOLERANCE, atol=TOLERANCE)
    optimizer = KFACOptimizer(
        model.parameters(),
        lr=0.0,
        layers=[nn.Embedding, nn.EmbeddingBag],
        fisher_type="type-2",
        kfac_approx=approx,
        factor_update_interval=1,
    )
    loss(model(X), y).backward()
    optimizer.step()
    (p,) = model.parameters()
    for own, expected in zip(optimizer.factors(p), K.factors(p), strict=True):
        torch.testing.assert_close(own, expected, rtol=TOLERANCE, atol=TOLERANCE)


class TwoTowers(nn.Module):
    """One embedding for queries [N, 2] and documents [N, 3]."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        query, document = self.embedding(x[:, :2]).mean(1), self.embedding(x[:, 2:]).mean(1)
        return self.head(torch.tanh(query) * document)


def test_uses_of_one_embedding_are_further_positions():
    model, X, y = TwoTowers(), torch.randint(V, (6, 5)), torch.randint(2, (6,))
    params, loss = [model.embedding.weight], nn.CrossEntropyLoss()
    for approx in ("expand", "reduce"):
        options = {"fisher_type": "type-2", "kfac_approx": approx}
        ekfac = EKFACLinearOperator(model, loss, params, [(X, y)], **options)
        trace = dense_ggn(model, loss, params, [(X, y)]).trace()
        torch.testing.assert_close(ekfac.trace(), trace, rtol=TOLERANCE, atol=0.0)
        A = ekfac.factors("embedding").input_factor
        one_hots = F.one_hot(X, V).double()
        rows = one_hots.mean(1) if approx == "reduce" else one_hots.flatten(0, 1)
        torch.testing.assert_close(A, rows.square().mean(0))


def random_rows(N, S, M):
    places = [torch.randint(n, (M,)) for n in (N, S, V)]
    return SparseRows(*places, torch.randn(M), (N, S, V))


@pytest.mark.parametrize("count", [1, 12, 60])
def test_sums_over_sparse_rows_are_those_of_dense_ones(count):
    N, S = 4, 3
    parts = [random_rows(N, S, count), random_rows(N, 2, count)]
    rows, g = side_by_side(parts), torch.randn(1, N, S + 2, 5)
    a = rows.dense()
    torch.testing.assert_close(a, torch.cat([part.dense() for part in parts], dim=2))
    gradients = torch.einsum("bnso,bnsi->bnoi", g, a)
    torch.testing.assert_close(rows.products(g), gradients.sum(1))
    torch.testing.assert_close(rows.gradient_squares(g), gradients.square().sum(1))
    for reduce, expected in ((False, a.flatten(1, 2)), (True, a.mean(2))):
        squares, number = rows.squares(reduce)
        torch.testing.assert_close(squares, expected.square().sum(1))
        assert number == expected.shape[1]


# Bags of different sizes, and weights of tokens ---------------------------------------------------

SIZES = torch.tensor([2, 0, 3, 1, 4, 2])


class Bag(nn.Module):
    """[6, 12] numbers: tokens of bags of different sizes, or of two tokens each with weights."""

    def __init__(self, way, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(V, WIDTH, **options), nn.Linear(WIDTH, 2)
        self.way = way

    def forward(self, x):
        ends = SIZES.cumsum(0)
        starts, weights = ends - SIZES, None
        tokens = x[0].long()
        if "weights" in self.way:
            weights = torch.linspace(-1, 1, len(tokens)).to(x)
        if "offsets" not in self.way:
            pairs = tokens.reshape(6, 2)
            return self.head(self.bag(pairs, per_sample_weights=weights.reshape(6, 2)))
        offsets = torch.cat([starts, ends[-1:]]) if self.bag.include_last_offset else starts
        return self.head(self.bag(offsets=offsets, input=tokens, per_sample_weights=weights))


BAGS = {
    "sums": ("offsets", {"mode": "sum"}),
    "means": ("offsets", {}),
    "means-with-padding": ("offsets", {"padding_idx": 2}),
    "last-offset": ("offsets", {"include_last_offset": True}),
    "weights": ("weights", {"mode": "sum"}),
    "offsets-and-weights": ("offsets, weights", {"mode": "sum", "padding_idx": 1}),
}


def bag_case(name):
    way, options = BAGS[name]
    model = Bag(way, **options)
    nn.init.normal_(model.bag.weight)
    return model, torch.tensor([[0, 2, 2, 4, 2, 1, 3, 3, 5, 1, 2, 0.0]]).repeat(6, 1)


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", BAGS)
def test_bags_of_different_sizes_and_weights_are_exact_token_by_token(name, kind):
    model, X = bag_case(name)
    params, loss, data = list(model.parameters()), nn.MSELoss(), [(X, torch.rand(6, 2))]
    operator = kind(model, loss, params, data, fisher_type="type-2")
    expected = dense_ggn(model, loss, params, data) * token_mask(params)
    torch.testing.assert_close(to_dense(operator), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", BAGS)
def test_bags_of_different_sizes_and_weights_train(name, fraction):
    model, X = bag_case(name)
    optimizer = KFACOptimizer(
        model.parameters(),
        layers=[nn.Linear, nn.EmbeddingBag],
        factor_update_interval=1,
        factor_batch_fraction=fraction,
    )
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(X), torch.ones(6, 2)).backward()
        optimizer.step()
    assert optimizer.statistics()["fallback_parameters"] == 0.0


# What is not covered -----------------------------------------------------------------------------


def test_maxima_of_bags_are_no_layer():
    model = nn.Sequential(nn.EmbeddingBag(V, WIDTH, mode="max"))
    data = [(torch.randint(V, (6, 5)), torch.rand(6, WIDTH))]
    with pytest.raises(NotImplementedError, match="unsupported layer"):
        KFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)


# The optimizer -----------------------------------------------------------------------------------


def text_model(**options):
    return nn.Sequential(
        nn.Embedding(V, WIDTH, **options), nn.Tanh(), nn.Flatten(), nn.Linear(5 * WIDTH, 3)
    )


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_a_step_is_the_operators_inverse_times_the_gradient(preconditioner):
    model, X, y = text_model(padding_idx=1), torch.randint(V, (8, 5)), torch.randint(3, (8,))
    kind = KFACLinearOperator if preconditioner == "kfac" else EKFACLinearOperator
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    operator = kind(model, loss, params, [(X, y)], fisher_type="type-2")
    gradient, _ = operator.gradient_and_loss()
    expected = [p - d for p, d in zip(params, operator.inverse(1e-2) @ gradient, strict=True)]
    optimizer = KFACOptimizer(
        params,
        lr=1.0,
        momentum=0.0,
        damping=1e-2,
        kl_clip=None,
        fisher_type="type-2",
        separate_weight_and_bias=True,
        preconditioner=preconditioner,
        layers=[nn.Linear, nn.Embedding],
    )
    loss(model(X), y).backward()
    optimizer.step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    assert optimizer.statistics()["fallback_parameters"] == 0.0


OPTIONS = {
    "kfac": {},
    "exact": {"damping_method": "exact"},
    "ekfac": {"preconditioner": "ekfac"},
    "reduce": {"kfac_approx": "reduce"},
    "empirical": {"fisher_type": "empirical"},
    "part": {"factor_batch_fraction": 0.5, "factor_update_interval": 1},
    "auto": {"lr": "auto"},
    "bfloat16-factors": {"factor_dtype": torch.bfloat16},
    "wide": {"max_factor_dim": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_resuming(name):
    layers = [*default_layers(), nn.Embedding]
    model, X, y = text_model(), torch.randint(V, (24, 5)), torch.randint(3, (24,))
    optimizer = KFACOptimizer(model.parameters(), layers=layers, **OPTIONS[name])

    def train(net, own, steps):
        for _ in range(steps):
            own.zero_grad()
            loss = F.cross_entropy(net(X), y)
            loss.backward()
            own.step()
        return loss.item()

    first = train(model, optimizer, 1)
    last = train(model, optimizer, 10)
    assert last < 0.9 * first
    assert optimizer.statistics()["fallback_parameters"] == 0.0
    twin = copy.deepcopy(model)
    resumed = KFACOptimizer(twin.parameters(), layers=layers, **OPTIONS[name])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 3) == train(twin, resumed, 3)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_by_default_an_embedding_is_adamws():
    model, X, y = text_model(), torch.randint(V, (8, 5)), torch.randint(3, (8,))
    optimizer = KFACOptimizer(model.parameters())
    F.cross_entropy(model(X), y).backward()
    optimizer.step()
    assert optimizer.statistics()["fallback_parameters"] == 1.0
