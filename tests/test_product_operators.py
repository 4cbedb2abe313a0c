"""K-FAC's operators on models that multiply by parameters past modules' calls."""

import pytest
import torch
from dense import dense_ggn, hessian_columns
from kfac_cases import to_dense
from product_cases import LABELS, USES, D, Net, data, dense_factors, dense_rows
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacopt import EKFACLinearOperator, KFACLinearOperator

pytestmark = pytest.mark.usefixtures("float64")

ROUND_OFF = 1e-10  # of sums of products of entries of about 1, in float64
OPERATORS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}


class Linear(nn.Module):
    """z = u(x), linear in a matrix; a datum's output does not depend on others."""

    def __init__(self, use, *shape):
        super().__init__()
        torch.manual_seed(0)
        self.W, self.b, self.use = (
            nn.Parameter(torch.randn(*shape)),
            nn.Parameter(torch.randn(3)),
            use,
        )

    def forward(self, x):
        return self.use(x, self.W, self.b)


def routed(x, W, use):
    """One expert of four for each datum; the last has none."""
    out, expert = x.new_zeros(len(x), 3), (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    for e in range(3):
        chosen = expert == e
        out = out.index_add(0, chosen.nonzero()[:, 0], use(x[chosen], W[e]))
    return out


EXACT = {
    # name: (what the model does with x [N, 4], W and b; W's shape; whether it adds b)
    "linear": (lambda x, W, b: F.linear(x, W, b), (3, 4), True),
    "addmm": (lambda x, W, b: torch.addmm(b, x, W), (4, 3), True),
    "at": (lambda x, W, b: x @ W, (4, 3), False),
    "at, with a bias": (lambda x, W, b: x @ W + b, (4, 3), True),
    "left": (lambda x, W, b: (W @ x.T).T, (3, 4), False),
    "left, turned": (lambda x, W, b: (W.T @ x.T).T, (4, 3), False),
    "positions": (lambda x, W, b: x.reshape(-1, 2, 2) @ W + b, (2, 3), True),
    "batched left": (lambda x, W, b: torch.matmul(W, x.reshape(-1, 2, 2)), (3, 2), False),
    "einsum": (lambda x, W, b: torch.einsum("ni,io->no", x, W), (4, 3), False),
    "heads": (lambda x, W, b: torch.einsum("ni,ihd->nhd", x, W), (4, 3, 2), False),
    "heads first": (lambda x, W, b: torch.einsum("ni,hid->nhd", x, W), (3, 4, 2), False),
    "heads in": (
        lambda x, W, b: torch.einsum("nhd,hdo->no", x.unflatten(1, (2, 2)), W),
        (2, 2, 3),
        False,
    ),
    "heads turned": (
        lambda x, W, b: (x @ W.permute(1, 2, 0).reshape(4, 6)).unflatten(1, (3, 2)),
        (2, 4, 3),
        False,
    ),
    "conv1d": (lambda x, W, b: F.conv1d(x.reshape(-1, 2, 2), W, b, padding=1), (3, 2, 2), True),
    "conv2d": (
        lambda x, W, b: F.conv2d(F.pad(x.reshape(-1, 1, 2, 2), [1] * 4, "reflect"), W, stride=2),
        (3, 1, 2, 3),
        False,
    ),
    "conv3d": (
        lambda x, W, b: F.conv3d(x.reshape(-1, 2, 1, 2, 1), W, padding="same", groups=2),
        (4, 1, 1, 3, 1),
        False,
    ),
    "conv_transpose1d": (
        lambda x, W, b: F.conv_transpose1d(x.reshape(-1, 2, 2), W, b, 2, 1, 1),
        (2, 3, 3),
        True,
    ),
    "conv_transpose2d": (
        lambda x, W, b: F.conv_transpose2d(
            x.reshape(-1, 4, 1, 1).expand(-1, 4, 2, 1), W, groups=2, dilation=2, padding=1
        ),
        (4, 2, 2, 2),
        False,
    ),
    "experts": (
        lambda x, W, b: torch.bmm(x.reshape(-1, 2, 2).mT.transpose(0, 1), W).transpose(0, 1),
        (2, 2, 3),
        False,
    ),
    "experts, einsum": (
        lambda x, W, b: torch.einsum("nei,eoi->neo", x.reshape(-1, 2, 2), W),
        (2, 3, 2),
        False,
    ),
    "experts, added to": (
        lambda x, W, b: torch.baddbmm(
            torch.ones(1, 1, 3), x.reshape(-1, 2, 2).transpose(0, 1), W
        ).transpose(0, 1),
        (2, 2, 3),
        False,
    ),
    "experts on the left": (
        lambda x, W, b: torch.bmm(W, x.reshape(-1, 2, 2).permute(1, 2, 0)).permute(2, 0, 1),
        (2, 3, 2),
        False,
    ),
    "routed experts": (lambda x, W, b: routed(x, W, lambda a, w: F.linear(a, w)), (4, 3, 4), False),
    "routed, inputs first": (
        lambda x, W, b: routed(x, W, lambda a, w: torch.cat([a @ w[:, :1], a @ w[:, 1:]], 1)),
        (4, 4, 3),
        False,
    ),
    "some of the experts": (
        lambda x, W, b: torch.bmm(x.reshape(-1, 2, 2).transpose(0, 1), W[1:3]).transpose(0, 1),
        (4, 2, 3),
        False,
    ),
    "mv": (lambda x, W, b: torch.stack([torch.mv(W, v) for v in x]), (3, 4), False),
    "at a vector, with a bias": (
        lambda x, W, b: torch.stack([W @ v + b for v in x]),
        (3, 4),
        True,
    ),
    "a vector at": (lambda x, W, b: torch.stack([v @ W for v in x]), (4, 3), False),
    "addmv": (
        lambda x, W, b: torch.stack([torch.addmv(b, W, v, alpha=0.5) for v in x]),
        (3, 4),
        True,
    ),
    "at a row": (lambda x, W, b: (x @ W[1]).unsqueeze(1), (3, 4), False),
    "addmm, scaled": (lambda x, W, b: torch.addmm(b, x, W, alpha=2), (4, 3), True),
    "addmm, bias scaled": (lambda x, W, b: torch.addmm(b, x, W, beta=2), (4, 3), False),
    "baddbmm, scaled": (
        lambda x, W, b: torch.baddbmm(
            torch.ones(1, 1, 3), x.reshape(-1, 2, 2).transpose(0, 1), W, alpha=-2
        ).transpose(0, 1),
        (2, 2, 3),
        False,
    ),
    "addbmm": (
        lambda x, W, b: torch.addbmm(b, x.reshape(-1, 2, 2).transpose(0, 1), W, alpha=2),
        (2, 2, 3),
        True,
    ),
    "addbmm on the left": (
        lambda x, W, b: torch.addbmm(torch.zeros(3, 1), W, x.reshape(-1, 2, 2).permute(1, 2, 0)).T,
        (2, 3, 2),
        False,
    ),
    "positions behind, with a bias": (
        lambda x, W, b: W @ x.reshape(-1, 2, 2) + b[None, :, None],
        (3, 2),
        True,
    ),
    "expanded, with a bias": (
        lambda x, W, b: W.expand(len(x), 3, 2) @ x.reshape(-1, 2, 2) + b.unsqueeze(1),
        (3, 2),
        True,
    ),
    "bilinear": (lambda x, W, b: F.bilinear(x[:, :3], x[:, 2:], W, b), (3, 3, 2), True),
    "bilinear, positions": (
        lambda x, W, b: F.bilinear(x.reshape(-1, 2, 2), x.reshape(-1, 2, 2).sin(), W),
        (3, 2, 2),
        False,
    ),
    "bilinear by einsum": (
        lambda x, W, b: torch.einsum("ni,oij,nj->no", x[:, :3], W, x[:, 2:]),
        (3, 3, 2),
        False,
    ),
    "half of the inputs": (lambda x, W, b: x[:, :2] @ W[:2] + b, (4, 3), True),
    "one input": (lambda x, W, b: F.linear(x[:, :1], W[:, 1:2]), (3, 4), False),
    "a vector at half": (
        lambda x, W, b: torch.stack([W[:, 2:] @ v[:2] for v in x]),
        (3, 4),
        False,
    ),
    "half of an expert's inputs": (lambda x, W, b: x[:, :2] @ W[1, 1:3], (2, 4, 3), False),
    "turned copies": (
        lambda x, W, b: x @ W.T.contiguous().clone() + b.expand(len(x), 3),
        (3, 4),
        True,
    ),
}


# Of products with single vectors it is not known whether they are data or positions of one.
ONE_BY_ONE = ["mv", "at a vector, with a bias", "a vector at", "addmv", "a vector at half"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the oracle
@pytest.mark.parametrize("kind", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("name", EXACT)
def test_blocks_of_linear_models_are_those_of_the_ggn(name, kind):
    """With squared errors G is the same for all data, so that K-FAC is exact."""
    use, shape, with_bias = EXACT[name]
    model, X = Linear(use, *shape), data(6, 4)
    loss, y = nn.MSELoss(), torch.rand_like(model(X))
    params = [model.b, model.W] if with_bias else [model.W]
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    sizes = [1] * 6 if name in ONE_BY_ONE else [2, 4]
    batches = list(zip(X.split(sizes), y.split(sizes), strict=True))
    K = kind(model, loss, params, batches, **options)
    expected = dense_ggn(model, loss, params, X, y)
    torch.testing.assert_close(to_dense(K), expected, rtol=ROUND_OFF, atol=ROUND_OFF)


@pytest.mark.parametrize("kind", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("case", USES)
def test_several_uses_are_further_positions(case, kind):
    use, name = USES[case]
    net, X = Net(use), data(6, D)
    z = net(X)
    vectors = [(z, v) for v in hessian_columns(F.cross_entropy, z.detach(), LABELS)]
    A, G = dense_factors(*dense_rows(net, vectors))
    joint = len(A) == D + 1
    weight, bias = (
        (net.layer.weight, net.layer.bias) if name == "layer" else (net.kernel, net.shift)
    )
    params = [weight, bias] if joint else [weight]
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = kind(net, nn.CrossEntropyLoss(), params, [(X, LABELS)], **options)
    found = K.factors(name)
    torch.testing.assert_close(found.input_factor, A, rtol=ROUND_OFF, atol=ROUND_OFF)
    torch.testing.assert_close(found.grad_output_factor, G, rtol=ROUND_OFF, atol=ROUND_OFF)


REFUSED = {
    "scaled": (lambda x, W, b: F.linear(x, 2 * W), (3, 4)),
    "both ways": (lambda x, W, b: x @ W @ W.T, (4, 3)),
    "every second": (lambda x, W, b: x @ W[:, ::2], (4, 6)),
    "other rows": (lambda x, W, b: F.linear(x, W.reshape(3, 4)), (2, 6)),
    "chosen": (lambda x, W, b: x @ W[:, [2, 0]], (4, 3)),
    "an input": (lambda x, W, b: x.mean(0, keepdim=True).T * W, (4, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_are_refused_by_name(name):
    use, shape = REFUSED[name]
    model, X = Linear(use, *shape), data(6, 4)
    with pytest.raises(NotImplementedError, match="'W' is in an unsupported layer"):
        KFACLinearOperator(model, nn.MSELoss(), [model.W], [(X, model(X).detach())])


@pytest.mark.parametrize("kind", OPERATORS.values(), ids=OPERATORS)
def test_two_halves_of_the_inputs_lack_what_they_have_in_common(kind):
    """A has their blocks, each a use of its own; the rest is that of the GGN."""
    model = Linear(
        lambda x, W, b: F.linear(x[:, :1], W[:, :1]) + F.linear(x[:, 1:], W[:, 1:]), 3, 4
    )
    X, loss = data(6, 4), nn.MSELoss()
    batches = [(X, torch.rand(6, 3))]
    options = {"fisher_type": "type-2"}
    K = to_dense(kind(model, loss, [model.W], batches, **options)).unflatten(0, (3, 4))
    expected = dense_ggn(model, loss, [model.W], *batches[0]).unflatten(0, (3, 4))
    for own in (slice(0, 1), slice(1, 4)):
        one, other = (matrix.unflatten(-1, (3, 4))[:, own, :, own] for matrix in (K, expected))
        torch.testing.assert_close(one, other, rtol=ROUND_OFF, atol=ROUND_OFF)
    if kind is KFACLinearOperator:
        assert not K.unflatten(-1, (3, 4))[:, :1, :, 1:].any()
        assert expected.unflatten(-1, (3, 4))[:, :1, :, 1:].any()


class Checkpointed(nn.Module):
    """Products within activation checkpointing, or the same without it."""

    def __init__(self, checkpointed, layer):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)
        self.W, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
        self.checkpointed, self.own = checkpointed, layer

    def block(self, x):
        h = (x @ self.first).tanh()
        h = (self.layer(h) if self.own else F.linear(h, self.layer.weight, self.layer.bias)).tanh()
        return torch.addmm(self.b, h, self.W)

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


@pytest.mark.parametrize("kind", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("layer", [True, False], ids=["a module", "products"])
def test_products_within_checkpoints(layer, kind):
    models, X = [Checkpointed(checkpointed, layer) for checkpointed in (True, False)], data(6, 4)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    found, expected = (
        to_dense(kind(m, nn.CrossEntropyLoss(), list(m.parameters()), [(X, LABELS)], **options))
        for m in models
    )
    torch.testing.assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)
    assert expected.diagonal().all()


def test_matrices_that_only_later_batches_use_are_found():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.W = nn.Linear(4, 3), nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x @ self.W if bool((x > 1).all()) else self.head(x)

    model, X = Switched(), data(6, 4)
    batches = [(x, torch.rand(6, 3)) for x in (X, X + 3)]
    loss, params = nn.MSELoss(reduction="sum"), [model.W]
    options = {"fisher_type": "type-2", "loss_average": None}
    K = KFACLinearOperator(model, loss, params, batches, **options)
    expected = dense_ggn(model, loss, params, *batches[1])
    torch.testing.assert_close(to_dense(K), expected, rtol=ROUND_OFF, atol=ROUND_OFF)
