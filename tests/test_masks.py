"""Positions without any gradient count neither in A nor in G: padding, ignored targets, masks."""

import pytest
import torch
from dense import dense_ggn
from kfac_cases import to_dense
from product_cases import data
from test_products import EVERY_STEP, ROUND_OFF
from torch import nn
from torch.nn import functional as F

from kfacopt import EKFACLinearOperator, KFACLinearOperator, KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

N, S, D, C = 5, 4, 3, 2
LENGTHS = torch.tensor([4, 1, 2, 3, 2])
PADDED = torch.arange(S) >= LENGTHS[:, None]  # [N, S]
KINDS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}


def sequences():
    """Return sequences whose padding has large values, which would be seen in A."""
    return data(N, S, D).masked_fill(PADDED[..., None], 7.0)


def targets():
    y = torch.arange(N * S).reshape(N, S) % C
    return y.masked_fill(PADDED, -100)


class Tagger(nn.Module):
    """Logits that do not depend on a; so that g is independent of it, and K-FAC exact."""

    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.product = nn.Linear(D, C), product
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.product(self.layer, x)


PRODUCTS = {
    "module": lambda layer, x: layer(x).flatten(0, 1),
    "flattened before": lambda layer, x: layer(x.flatten(0, 1)),
    "classes second": lambda layer, x: layer(x).mT,
    "functional": lambda layer, x: F.linear(x, layer.weight, layer.bias).flatten(0, 1),
    "convolution": lambda layer, x: F.conv1d(x.mT, layer.weight[:, :, None], layer.bias),
}


class Kernel(nn.Module):
    """A convolution with a kernel of one entry, in the place of a linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(D, C, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x.mT)


MODELS = {
    name: lambda product=product: Tagger(product)
    for name, product in PRODUCTS.items()
    if name != "convolution"
} | {"convolution": Kernel}


def target_like(z):
    return targets() if z.ndim == 3 else targets().flatten()


# EKFAC's datum is a whole sequence where the layer sees these, but the loss single positions.
EXACT = [(name, kind) for name in MODELS for kind in KINDS if (name, kind) != ("module", "ekfac")]


@pytest.mark.parametrize(("name", "kind"), EXACT)
def test_ignored_positions_are_left_out_of_linear_models(name, kind):
    """With g independent of a, F = Σ g gᵀ ⊗ E[a aᵀ] over the positions that count."""
    model, X = MODELS[name](), sequences()
    y, params = target_like(model(X)), list(model.parameters())
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    loss = nn.CrossEntropyLoss()
    K = KINDS[kind](model, loss, params, [(X, y)], **options)
    expected = dense_ggn(model, loss, params, X, y)
    torch.testing.assert_close(to_dense(K), expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def masked_rows():
    a = torch.cat([sequences(), torch.ones(N, S, 1)], -1)
    return a[~PADDED]


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_the_optimizer_leaves_them_out(name, fisher_type):
    model, X = MODELS[name](), sequences()
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | {"fisher_type": fisher_type})
    for _ in range(2):
        optimizer.zero_grad()
        z = model(X)
        F.cross_entropy(z, target_like(z)).backward()
        optimizer.step()
    rows = masked_rows()
    A = optimizer.factors("layer").input_factor
    torch.testing.assert_close(A, rows.T @ rows / len(rows), rtol=ROUND_OFF, atol=ROUND_OFF)


class Pooled(nn.Module):
    """The mean over the positions that count, of a linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, C)

    def forward(self, x):
        z = self.layer(x).masked_fill(PADDED[..., None], 0.0)
        return z.sum(1) / LENGTHS[:, None]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_reduce_takes_the_mean_over_the_positions_that_count(kind):
    model, X = Pooled(), sequences()
    y, params, loss = torch.rand(N, C), list(model.parameters()), nn.MSELoss()
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = kind(model, loss, params, [(X, y)], kfac_approx="reduce", **options)
    expected = dense_ggn(model, loss, params, X, y)
    torch.testing.assert_close(to_dense(K), expected, rtol=ROUND_OFF, atol=ROUND_OFF)


class Encoder(nn.Module):
    """An encoder with a padding mask, and the mean over what it does not cover."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Linear(D, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, C)

    def forward(self, x, padded):
        h = self.block(self.lift(x).tanh(), src_key_padding_mask=padded)
        h = h.masked_fill(padded[..., None], 0.0)
        return self.head(h.sum(1) / (~padded).sum(1, keepdim=True))


def test_sequence_masks_leave_padding_out_of_all_layers():
    """A padded batch has the factors of the same sequences one by one, without padding."""
    model, X, y = Encoder(), sequences(), torch.rand(N, C)
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | {"fisher_type": "type-2"})

    def factors(parts):
        for _ in range(2):
            optimizer.zero_grad()
            outputs = [model(x, padded) for x, padded in parts]
            F.mse_loss(torch.cat(outputs), y).backward()
            optimizer.step()
        names = (
            "lift",
            "block.linear1",
            "block.linear2",
            "block.self_attn.out_proj.weight",
            "head",
        )
        return [[f.clone() for f in optimizer.factors(name)] for name in names]

    padded = factors([(X, PADDED)])
    cut = [(X[n : n + 1, :k], PADDED[n : n + 1, :k]) for n, k in enumerate(LENGTHS.tolist())]
    for own, other in zip(padded, factors(cut), strict=True):
        for one, two in zip(own, other, strict=True):
            torch.testing.assert_close(one, two, rtol=ROUND_OFF, atol=ROUND_OFF)


class TwoLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.first, self.second = nn.Linear(D, 4), nn.Linear(4, C), nn.Linear(4, C)

    def forward(self, x):
        h = self.layer(x).tanh()
        return self.first(h[:, 0]), self.second(h[:, 1:3])


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_positions_that_any_loss_reaches_count_once(fisher_type):
    model, X = TwoLosses(), sequences()
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | {"fisher_type": fisher_type})
    first, second = model(X)
    loss = F.mse_loss(first, torch.rand_like(first)) + F.mse_loss(second, torch.rand_like(second))
    loss.backward()
    optimizer.step()
    a = torch.cat([X[:, :3], torch.ones(N, 3, 1)], -1).flatten(0, 1)
    A = optimizer.factors("layer").input_factor
    torch.testing.assert_close(A, a.T @ a / len(a), rtol=ROUND_OFF, atol=ROUND_OFF)


def test_a_batch_of_ignored_targets_alone_changes_no_average():
    model, X = Tagger(PRODUCTS["module"]), sequences()
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    F.cross_entropy(model(X), targets().flatten()).backward()
    optimizer.step()
    before = [f.clone() for f in optimizer.factors("layer")]
    ignored = torch.full((N * S,), -100)
    optimizer.zero_grad()
    F.cross_entropy(model(X), ignored, reduction="sum").backward()
    optimizer.step()
    for one, other in zip(before, optimizer.factors("layer"), strict=True):
        assert torch.equal(one, other)


ORDERS = {
    "one batch": [[0, 1, 2, 3, 4]],
    "ignored last": [[0, 1, 2], [3, 4]],
    "ignored first": [[3, 4], [0, 1, 2]],
    "mixed": [[0, 3], [1], [2, 4]],
}


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_data_of_ignored_targets_are_none_of_the_empirical_fishers(
    reduction, order, preconditioner
):
    """Sums divided by the number of targets that count, in micro-batches in any order."""
    torch.manual_seed(0)
    model, X, y = nn.Linear(D, C), data(N, D), torch.tensor([0, 1, 1, -100, -100])
    options = {**EVERY_STEP, "fisher_type": "empirical", "preconditioner": preconditioner}
    optimizer = KFACOptimizer(model.parameters(), **options)
    for own in ORDERS[order]:
        (F.cross_entropy(model(X[own]), y[own], reduction=reduction).sum() / 3).backward()
    z = model(X[:3]).detach()
    optimizer.step()
    a = torch.cat([X[:3], torch.ones(3, 1)], 1)
    g = z.softmax(1) - F.one_hot(y[:3], C)
    A, G = optimizer.factors("")
    torch.testing.assert_close(A, a.T @ a / 3, rtol=ROUND_OFF, atol=ROUND_OFF)
    torch.testing.assert_close(G, g.T @ g / 3, rtol=ROUND_OFF, atol=ROUND_OFF)


@pytest.mark.parametrize("output", [lambda z: z.mT, lambda z: z], ids=["classes second", "last"])
def test_a_datum_is_a_sequence_with_any_target_for_the_empirical_fisher(output):
    """Its positions are parts of one datum's loss; a sequence of ignored ones is none."""
    torch.manual_seed(0)
    model, X = nn.Linear(D, C), sequences()
    y = targets()
    y[1] = -100
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP, fisher_type="empirical")
    z = output(model(X))
    z = z if z.shape[1] == C else z.flatten(0, 1)
    live = (y != -100).sum()
    loss = F.cross_entropy(z, y.reshape(z.shape[0], *z.shape[2:]), reduction="none")
    probabilities = model(X).detach().softmax(-1)
    (loss.sum() / live).backward()
    optimizer.step()
    g = (probabilities - F.one_hot(y.clamp(min=0), C)) * (y != -100)[..., None] / live
    rows = g.flatten(0, 1)
    G = optimizer.factors("").grad_output_factor
    torch.testing.assert_close(G, (N - 1) * rows.T @ rows, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_adapters_that_start_at_zero_have_inputs_beside_ignored_targets():
    """Their first factor gets no gradient until the second one moves (LoRA)."""
    model = nn.Sequential(nn.Linear(D, 2), nn.Linear(2, C))
    nn.init.zeros_(model[1].weight)
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    X = sequences()
    F.cross_entropy(model(X).flatten(0, 1), targets().flatten()).backward()
    optimizer.step()
    a = torch.cat([X, torch.ones(N, S, 1)], -1).flatten(0, 1)
    A, G = optimizer.factors("0")
    torch.testing.assert_close(A, a.T @ a / len(a), rtol=ROUND_OFF, atol=ROUND_OFF)
    assert not G.any()


def test_dead_units_are_no_padding():
    """A datum whose gradients vanish by accident, behind a ReLU, counts as before."""
    model = nn.Sequential(nn.Linear(D, 2), nn.ReLU(), nn.Linear(2, C))
    X = torch.cat([data(4, D), -9 * torch.ones(1, D)])
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(2, D))
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP)
    F.mse_loss(model(X), torch.rand(5, C)).backward()
    optimizer.step()
    a = torch.cat([X, torch.ones(5, 1)], 1)
    A = optimizer.factors("0").input_factor
    torch.testing.assert_close(A, a.T @ a / 5, rtol=ROUND_OFF, atol=ROUND_OFF)
