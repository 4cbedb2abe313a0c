"""K-FAC's operators on models that multiply by parameters past modules' calls."""

import pytest
import torch
from dense import dense_ggn, hessian_columns
from kfac_cases import to_dense
from product_cases import LABELS, USES, D, Net, data, dense_factors, dense_rows
from torch import nn
from torch.nn import functional as F

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
    "turned copies": (
        lambda x, W, b: x @ W.T.contiguous().clone() + b.expand(len(x), 3),
        (3, 4),
        True,
    ),
}


@pytest.mark.parametrize("kind", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("name", EXACT)
def test_blocks_of_linear_models_are_those_of_the_ggn(name, kind):
    """With squared errors G is the same for all data, so that K-FAC is exact."""
    use, shape, with_bias = EXACT[name]
    model, X = Linear(use, *shape), data(6, 4)
    loss, y = nn.MSELoss(), torch.rand_like(model(X))
    params = [model.b, model.W] if with_bias else [model.W]
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = kind(model, loss, params, [(X[:2], y[:2]), (X[2:], y[2:])], **options)
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
    "half of the inputs": (lambda x, W, b: x[:, :2] @ W[:2], (4, 3)),
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
