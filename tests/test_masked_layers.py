"""Masked positions of layers other than single products: in no A, so that linear models are exact.

Where a model is linear in a matrix, and g does not depend on a, K-FAC is the GGN's block only if A
is the mean over those positions alone that receive a gradient.
"""

import pytest
import torch
from dense import dense_ggn
from kfac_cases import to_dense
from product_cases import data
from test_masks import KINDS, LENGTHS, PADDED, C, D, N, S
from test_products import EVERY_STEP, ROUND_OFF
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer, default_layers

pytestmark = pytest.mark.usefixtures("float64")

FISHERS = ("mc", "type-2", "empirical")
LARGE = 7.0  # what padding has, to be seen in A


def sequences(width=D):
    return data(N, S, width).masked_fill(PADDED[..., None], LARGE)


def check_exact(model, params, x, y, kind, **options):
    loss = nn.MSELoss()
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False} | options
    K = KINDS[kind](model, loss, params, [(x, y)], **options)
    expected = dense_ggn(model, loss, params, x, y)
    torch.testing.assert_close(to_dense(K), expected, rtol=ROUND_OFF, atol=ROUND_OFF)
    return K


def moment(rows):
    return rows.T @ rows / len(rows)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=ROUND_OFF, atol=ROUND_OFF)


def trained(model, x, y, **options):
    """Return an optimizer after two steps that moved nothing: the first one finds matrices."""
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP | options)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return optimizer


# Cross-attention ----------------------------------------------------------------------------------


class Copying(nn.Module):
    """Query s attends to position s of a padded memory alone: z is linear in the weights.

    Softmax is saturated, so that queries and keys have no gradient at all.
    """

    def __init__(self, values, batch_first, need_weights):
        super().__init__()
        torch.manual_seed(0)
        width = D if values == "own width" else S
        options = {"kdim": S, "vdim": width} if width != S else {}
        attention = nn.MultiheadAttention(S, 1, bias=False, batch_first=batch_first, **options)
        with torch.no_grad():
            if width == S:
                attention.in_proj_weight[: 2 * S] = torch.eye(S).repeat(2, 1)
            else:
                attention.q_proj_weight.copy_(torch.eye(S))
                attention.k_proj_weight.copy_(torch.eye(S))
        attention.out_proj.requires_grad_(False)
        self.attention, self.values, self.need_weights = attention, values, need_weights

    def forward(self, memory):
        keys = memory if self.values == "keys" else torch.eye(S).expand(len(memory), S, S)
        own = keys.masked_fill(PADDED[..., None], 0.0)
        queries = 1e4 * torch.linalg.pinv(own).mT
        inputs = [queries, keys, keys if self.values == "keys" else memory]
        if not self.attention.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if self.values == "keys":
            inputs[2] = inputs[1]
        mask = {"key_padding_mask": PADDED, "need_weights": self.need_weights}
        z, _ = self.attention(*inputs, **mask)
        z = z if self.attention.batch_first else z.transpose(0, 1)
        return z.masked_fill(PADDED[..., None], 0.0)

    def matrix(self):
        own = self.attention
        return own.in_proj_weight if own.in_proj_weight is not None else own.v_proj_weight


# keys: projected in one product, two thirds of `in_proj_weight`; own: one third; own width: apart
VALUES = ("keys", "own", "own width")
ATTENTION = [
    (values, batch_first, weights)
    for values, batch_first, weights in [
        *((v, b, True) for v in VALUES for b in (True, False)),
        ("own width", True, False),
        ("own width", False, False),
    ]
]


def memory_for(values):
    return sequences(D if values == "own width" else S)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the oracle's torch.func
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("values", "batch_first", "weights"), ATTENTION)
def test_padded_memory_is_left_out(values, batch_first, weights, kind):
    model, x = Copying(values, batch_first, weights), memory_for(values)
    for approx in ("expand", "reduce"):  # matrices that are found have rows alone
        y = data(N, S, S)
        options = {"kfac_approx": approx}
        K = check_exact(model, [model.matrix()], x, y, kind, **options)
        close(K.factors(model.matrix()).input_factor, moment(x[~PADDED]))


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("values", VALUES)
def test_the_optimizer_leaves_padded_memory_out(values, fisher_type, preconditioner):
    model, x = Copying(values, True, True), memory_for(values)
    options = {"fisher_type": fisher_type, "preconditioner": preconditioner}
    optimizer = trained(model, x, data(N, S, S), **options)
    close(optimizer.factors(model.matrix()).input_factor, moment(x[~PADDED]))


class Projections(nn.Module):
    """The same by hand: a mean over the memory that counts, of its projection."""

    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.values, self.product = nn.Linear(D, C), product

    def forward(self, memory):
        scores = torch.zeros(N, 1, S).masked_fill(PADDED[:, None], -torch.inf)
        return (scores.softmax(-1) @ self.product(self.values, memory)).squeeze(1)


@pytest.mark.parametrize("kind", KINDS)
def test_projections_by_hand_take_means_over_what_counts(kind):
    model, x = Projections(lambda layer, memory: layer(memory)), sequences()
    check_exact(model, list(model.parameters()), x, data(N, C), kind, kfac_approx="reduce")


class Decoder(nn.Module):
    """A decoder over a padded memory."""

    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerDecoderLayer(
            4, 2, 8, 0.0, batch_first=batch_first, activation="gelu"
        )
        self.head = nn.Linear(4, C)

    def forward(self, memory, padded):
        x = data(N, 3, 4)[: len(memory)]
        if not self.block.self_attn.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        h = self.block(x, memory, memory_key_padding_mask=padded)
        return self.head(h if self.block.self_attn.batch_first else h.transpose(0, 1))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoders_have_the_factors_of_memory_without_padding(batch_first, approx):
    model, x, y = Decoder(batch_first), sequences(4), data(N, 3, C)
    options = EVERY_STEP | {"fisher_type": "type-2", "kfac_approx": approx}

    def factors(parts):
        optimizer = KFACOptimizer(model.parameters(), **options)
        for _ in range(2):
            optimizer.zero_grad()
            torch.manual_seed(0)
            outputs = [model(memory, padded) for memory, padded in parts]
            loss = sum(F.mse_loss(z, y[:1] if len(z) == 1 else y, reduction="sum") for z in outputs)
            loss.backward()
            optimizer.step()
        names = ("self_attn.in_proj_weight", "multihead_attn.in_proj_weight", "linear1")
        return [f for name in names for f in optimizer.factors(f"block.{name}")]

    cut = [(x[:1, : LENGTHS[0]], None)]
    whole = [(torch.cat([x[:1], torch.full((1, 2, 4), LARGE)], 1), torch.arange(S + 2)[None] >= S)]
    for one, other in zip(factors(cut), factors(whole), strict=True):
        close(one, other)


# Embeddings ---------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Masked embeddings, or their mean over what counts."""

    def __init__(self, pooled, padding_idx=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, C, padding_idx=padding_idx)
        self.pooled = pooled

    def forward(self, tokens):
        z = self.embedding(tokens).masked_fill(PADDED[..., None], 0.0)
        return z.sum(1) / LENGTHS[:, None] if self.pooled else z


def tokens():
    return (torch.arange(N * S).reshape(N, S) % 5 + 1).masked_fill(PADDED, 0)


def token_means(pooled):
    counts = F.one_hot(tokens(), 6).double() * ~PADDED[..., None]
    rows = counts.sum(1) / LENGTHS[:, None] if pooled else counts[~PADDED]
    return rows.square().mean(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_masked_tokens_are_left_out(padding_idx, kind):
    model, x = Tokens(False, padding_idx), tokens()
    K = check_exact(model, list(model.parameters()), x, data(N, S, C), kind)
    close(K.factors("embedding").input_factor, token_means(False))


@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("pooled", [False, True])
def test_the_optimizer_leaves_masked_tokens_out(pooled, fisher_type):
    model, x = Tokens(pooled), tokens()
    options = {"fisher_type": fisher_type, "layers": [*default_layers(), nn.Embedding]}
    approx = {"kfac_approx": "reduce" if pooled else "expand"}
    optimizer = trained(model, x, data(*model(x).shape), **options | approx)
    close(optimizer.factors("embedding").input_factor, token_means(pooled))


class Towers(nn.Module):
    """One embedding for tokens with padding and for others without."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, C)

    def forward(self, x):
        padded, other = x[:, :S], x[:, S:]
        first = self.embedding(padded).masked_fill(PADDED[..., None], 0.0)
        return torch.cat([first, self.embedding(other)], 1)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_masked_tokens_of_several_uses(approx):
    x = torch.cat([tokens(), torch.arange(N * 2).reshape(N, 2) % 6], 1)
    options = {"fisher_type": "type-2", "kfac_approx": approx, "layers": [nn.Embedding]}
    optimizer = trained(Towers(), x, data(N, S + 2, C), **options)
    counts = F.one_hot(x, 6).double()
    live = torch.cat([~PADDED, torch.ones(N, 2, dtype=torch.bool)], 1)
    rows = counts[live]
    if approx == "reduce":
        rows = (counts * live[..., None]).sum(1) / live.sum(1, keepdim=True)
    close(optimizer.factors("embedding").input_factor, rows.square().mean(0))


# Uses one after the other -------------------------------------------------------------------------


class Loop(nn.Module):
    """A matrix that is used at each time, by sequences of different lengths."""

    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.product = nn.Linear(D, C), product

    def forward(self, x):
        z = torch.stack([self.product(self.layer, x[:, t]) for t in range(S)], 1)
        return z.masked_fill(PADDED[..., None], 0.0)


LOOPS = {
    "module": lambda layer, x: layer(x),
    "functional": lambda layer, x: F.linear(x, layer.weight, layer.bias),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOOPS)
def test_times_beyond_a_sequence_are_left_out(name, kind):
    model, x = Loop(LOOPS[name]), sequences()
    check_exact(model, list(model.parameters()), x, data(N, S, C), kind)


@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("name", LOOPS)
def test_the_optimizer_leaves_times_beyond_a_sequence_out(name, fisher_type):
    model, x = Loop(LOOPS[name]), sequences()
    optimizer = trained(model, x, data(N, S, C), fisher_type=fisher_type)
    a = torch.cat([x, torch.ones(N, S, 1)], -1)
    close(optimizer.factors("layer").input_factor, moment(a[~PADDED]))


# Experts ------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two experts, of positions by turns; padding is routed as well, and masked behind."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.way = nn.Parameter(torch.randn(2, D, C)), way

    def forward(self, x):
        if self.way == "places":
            z = torch.bmm(x.reshape(N * S // 2, 2, D).transpose(0, 1), self.experts)
            z = z.transpose(0, 1).reshape(N, S, C)
        elif self.way == "gathered":
            W = self.experts[torch.arange(N * S) % 2]
            z = torch.bmm(x.reshape(N * S, 1, D), W).reshape(N, S, C)
        else:
            flat, z = x.reshape(N * S, D), x.new_zeros(N * S, C)
            for e in range(2):
                own = torch.arange(e, N * S, 2)
                z = z.index_add(0, own, flat[own] @ self.experts[e])
            z = z.reshape(N, S, C)
        return z.masked_fill(PADDED[..., None], 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["places", "chosen", "gathered"])
def test_experts_count_no_padding(way, kind):
    model, x = Experts(way), sequences()
    check_exact(model, list(model.parameters()), x, data(N, S, C), kind)


@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("way", ["places", "chosen", "gathered"])
def test_the_optimizers_experts_count_no_padding(way, fisher_type):
    model, x = Experts(way), sequences()
    optimizer = trained(model, x, data(N, S, C), fisher_type=fisher_type)
    A = optimizer.factors("experts").input_factor
    for e in range(2):
        own = x.reshape(-1, D)[e::2][~PADDED.flatten()[e::2]]
        close(A[e], moment(own))


class Chosen(nn.Module):
    """Modules as experts: each gets some rows of `[N S, d]`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.layer = nn.Linear(D, D), nn.Linear(D, C)
        self.lift.requires_grad_(True)

    def forward(self, x):
        rows = self.lift(x).reshape(-1, D)
        own = torch.arange(0, N * S, 2)
        z = torch.zeros(N * S, C).index_add(0, own, self.layer(rows[own]))
        return z.reshape(N, S, C).masked_fill(PADDED[..., None], 0.0)


def test_modules_as_experts_count_no_padding():
    model, x = Chosen(), sequences()
    optimizer = trained(model, x, data(N, S, C), fisher_type="type-2")
    live = torch.arange(N * S)[(~PADDED).flatten()]
    rows = model.lift(x).detach().reshape(-1, D)[live[live % 2 == 0]]
    a = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    close(optimizer.factors("layer").input_factor, moment(a))


# Convolutions -------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """A convolution with a mask behind it."""

    def __init__(self, layer, mask, pooled=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.mask, self.pooled = layer(), mask, pooled

    def forward(self, x):
        z = self.layer(x)
        mask = self.mask(z)
        z = z * mask
        if not self.pooled:
            return z.flatten(2).mT
        return z.flatten(2).sum(2) / mask.flatten(2).sum(2)


def of_sequences(z):
    return (torch.arange(z.shape[2]) < LENGTHS[:, None])[:, None].double()


def of_images(z):
    """Images that are padded below and on the left."""
    rows = torch.arange(z.shape[2])[:, None] < LENGTHS[:, None, None].clamp(max=z.shape[2])
    columns = torch.arange(z.shape[3]) >= (torch.arange(N) % 2)[:, None, None]
    return (rows & columns)[:, None].double()


CONVOLUTIONS = {
    # name: (layer, mask, shape of a datum)
    "conv1d": (lambda: nn.Conv1d(D, C, 2, stride=2), of_sequences, (D, 2 * S)),
    "groups": (lambda: nn.Conv1d(2, 4, 1, groups=2), of_sequences, (2, S)),
    "turned": (lambda: nn.ConvTranspose1d(D, C, 1), of_sequences, (D, S)),
    "conv2d": (lambda: nn.Conv2d(2, C, 2, stride=2), of_images, (2, 2 * S, 6)),
    "turned 2d": (lambda: nn.ConvTranspose2d(2, C, 1), of_images, (2, S, 3)),
}


def masked_case(name):
    layer, mask, shape = CONVOLUTIONS[name]
    model, x = Convolution(layer, mask), data(N, *shape)
    return model, x, data(*model(x).shape)


@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name != "groups"])
def test_masks_behind_convolutions_leave_positions_out(name):
    model, x, y = masked_case(name)
    check_exact(model, list(model.parameters()), x, y, "kfac")


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("name", ["conv1d", "conv2d"])
def test_the_optimizers_convolutions_leave_positions_out(name, fisher_type, pooled):
    model, x, _ = masked_case(name)
    model.pooled = pooled
    approx = {"kfac_approx": "reduce" if pooled else "expand"}
    optimizer = trained(model, x, data(*model(x).shape), fisher_type=fisher_type, **approx)
    patches = x.unfold(2, 2, 2)
    patches = patches if x.ndim == 3 else patches.unfold(3, 2, 2)
    dims = x.ndim - 2
    a = patches.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    a = a.flatten(1 + dims)
    a = torch.cat([a, torch.ones(*a.shape[:-1], 1)], -1).flatten(1, dims)
    live = model.mask(model.layer(x)).flatten(1).bool()
    rows = (a * live[..., None]).sum(1) / live.sum(1)[:, None] if pooled else a[live]
    close(optimizer.factors("layer").input_factor, moment(rows))


def test_positions_that_a_stride_passes_over_are_left_out():
    model = nn.Sequential(nn.Conv1d(D, 4, 1), nn.Conv1d(4, C, 1, stride=2), nn.Flatten(2))
    x = data(N, D, S)
    options = {"fisher_type": "type-2"}
    optimizer = trained(model, x, data(*model(x).shape), **options)
    rows = torch.cat([x.mT, torch.ones(N, S, 1)], -1)[:, ::2].flatten(0, 1)
    close(optimizer.factors("0").input_factor, moment(rows))


def test_dark_spots_of_images_are_no_padding():
    """Zeros within an image, of ReLUs and pooling, are counted as before."""
    model = Convolution(lambda: nn.Conv2d(1, C, 1), lambda z: torch.ones_like(z[:, :1]))
    spots = torch.ones(4, 4)
    spots[1, 1] = spots[2, 3] = 0
    model.mask = lambda z: spots.expand_as(z[:, :1])
    x = data(N, 1, 4, 4)
    optimizer = trained(model, x, data(N, 16, C), fisher_type="type-2")
    rows = torch.stack([x.flatten(), torch.ones(16 * N)], 1)
    close(optimizer.factors("layer").input_factor, moment(rows))


# Normalisations -----------------------------------------------------------------------------------


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        return self.norm(x).masked_fill(PADDED[..., None], 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_shift_have_the_exact_diagonal_of_what_counts(kind):
    model, x = Normalized(), data(N, S, D)
    y, params, loss = data(N, S, D), list(model.parameters()), nn.MSELoss(reduction="sum")
    options = {"fisher_type": "type-2", "loss_average": None}
    K = KINDS[kind](model, loss, params, [(x, y)], **options)
    expected = dense_ggn(model, loss, params, x, y).diag()
    close(to_dense(K).diag(), expected)
