"""Terms without a second derivative beside others: the empirical Fisher stands in for each."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.nn import functional as F

from kfacopt import KFACOptimizer, KFACWarning
from kfacopt.likelihoods.roots import positive_root

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
TARGETS = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def factors(objective):
    """Return G of the last layer, whose output is z, after one step."""
    model = mlp()
    optimizer = KFACOptimizer(model.parameters(), fisher_type="type-2", ema_decay=0.0)
    z = model(X)
    objective(z).backward()
    optimizer.step()
    return z.detach(), optimizer.factors("2").grad_output_factor


def empirical(z, loss):
    """Return N Σ_n ∇L_n ∇L_nᵀ at z."""
    z = z.clone().requires_grad_()
    (rows,) = torch.autograd.grad(loss(z), z)
    return len(rows) * rows.T @ rows


class Precomputed(torch.autograd.Function):
    """Cross entropy that computes its gradient in the forward pass, as fused ones do."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward((z.softmax(1) - F.one_hot(LABELS, 3)) / len(z))
        return F.cross_entropy(z, LABELS)

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0]


def l1(z):
    return F.l1_loss(z, TARGETS)


def hinge(z):
    return (1 - z * (2 * TARGETS - 1)).clamp(min=0).mean()


def squares(z):
    return ((z - TARGETS) ** 2).mean()


FLAT = {"L1": l1, "hinge": hinge, "a function with its own gradient": Precomputed.apply}


@pytest.mark.parametrize("weight", [1e-6, 1.0])
@pytest.mark.parametrize("name", FLAT)
def test_a_small_curved_term_does_not_hide_one_without_curvature(name, weight):
    flat = FLAT[name]
    z, G = factors(lambda z: 2 * flat(z) - weight * -squares(z))
    own = (lambda z: F.cross_entropy(z, LABELS)) if flat == Precomputed.apply else flat
    expected = empirical(z, lambda z: 2 * own(z)) + weight * 2 / 3 * torch.eye(3)
    torch.testing.assert_close(G, expected, rtol=TOLERANCE, atol=1e-12)


def test_several_such_terms_are_of_the_same_data():
    z, G = factors(lambda z: l1(z) + hinge(z) + squares(z))
    expected = empirical(z, l1) + empirical(z, hinge) + 2 / 3 * torch.eye(3)
    torch.testing.assert_close(G, expected, rtol=TOLERANCE, atol=1e-12)


def test_linear_terms_are_part_of_what_the_others_mean():
    by_sums = factors(lambda z: z.logsumexp(1).mean() - z.gather(1, LABELS[:, None]).mean())[1]
    known = factors(lambda z: F.cross_entropy(z, LABELS))[1]
    torch.testing.assert_close(by_sums, known, rtol=TOLERANCE, atol=1e-12)


def test_blocks_without_a_diagonal_have_a_positive_part():
    """H = ((0, 1), (1, 0)) has the eigenvalues 1 and −1: H⁺ = ½ ((1, 1), (1, 1))."""
    block = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    blocks = torch.stack([block, torch.zeros(2, 2), torch.eye(2)])
    roots = positive_root(blocks)
    expected = torch.stack([torch.full((2, 2), 0.5), torch.zeros(2, 2), torch.eye(2)])
    torch.testing.assert_close(roots @ roots.mT, expected, rtol=TOLERANCE, atol=1e-12)
    mask = torch.tensor([1.0, 0, 1, 0, 1, 0])
    _, G = factors(lambda z: (mask * z[:, 0] * z[:, 1] + (1 - mask) * z[:, 0] ** 2).mean())
    expected = torch.zeros(3, 3)
    expected[:2, :2] = 0.25  # ½ of the rows, with ½ each
    expected[0, 0] += 1.0  # the other half, with 2
    torch.testing.assert_close(G, expected, rtol=TOLERANCE, atol=1e-12)


def by_vmap(model):
    return (vmap(lambda x: model(x).sum())(X) - 1).square().mean()


def by_forward_mode(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, X))).tangent.square().mean()


@pytest.mark.parametrize("loss", [by_vmap, by_forward_mode])
def test_transformed_calls_are_named_once_and_train(loss):
    model = mlp()
    optimizer = KFACOptimizer(model.parameters())
    values = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            values.append(value.item())
    own = [str(w.message) for w in caught if issubclass(w.category, KFACWarning)]
    assert any("kfacopt.input_derivatives" in message for message in own)
    assert len(set(own)) == len(own)
    assert values[-1] < values[0]
