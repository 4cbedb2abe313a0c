"""Positions that the loss does not depend on count neither in A nor in G."""

import pytest
import torch
from dense import dense_ggn
from kfac_cases import to_dense
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACLinearOperator, KFACOptimizer, default_layers

pytestmark = pytest.mark.usefixtures("float64")

N, S, D_IN, D_OUT = 4, 5, 3, 2
TOLERANCE = 1e-12  # round-off of sums of 20 terms of order 1
MASK = torch.arange(S) < torch.tensor([5, 2, 3, 0])[:, None]


class Masked(nn.Module):
    """Outputs of some positions, which is linear in the weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D_IN, D_OUT)

    def forward(self, x):
        return self.layer(x) * MASK[..., None].to(x)


def factors(x, kfac_approx="expand", layer=None):
    """Return the factors of a layer after a step on a masked squared error, and the gradient."""
    torch.manual_seed(0)
    layer = nn.Linear(D_IN, D_OUT) if layer is None else layer
    optimizer = KFACOptimizer(
        layer.parameters(),
        fisher_type="type-2",
        kfac_approx=kfac_approx,
        layers=[*default_layers(), nn.Embedding],
    )
    F.mse_loss(layer(x)[MASK], torch.ones(int(MASK.sum()), D_OUT)).backward()
    optimizer.step()
    return optimizer.factors("")


def test_expand_is_the_exact_ggn_of_a_masked_model():
    """Every position that counts has the same Hessian, so that G ⊗ A is exact."""
    torch.manual_seed(1)
    model, loss = Masked(), nn.MSELoss()
    x, y = torch.randn(N, S, D_IN), torch.randn(N, S, D_OUT)
    params = list(model.parameters())
    K = KFACLinearOperator(
        model, loss, params, [(x, y)], fisher_type="type-2", separate_weight_and_bias=False
    )
    expected = dense_ggn(model, loss, params, x, y)
    torch.testing.assert_close(to_dense(K), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_padding_counts_in_no_factor(kfac_approx):
    torch.manual_seed(1)
    x = torch.randn(N, S, D_IN)
    padded = torch.where(MASK[..., None], x, 1e3)
    for one, other in zip(factors(x, kfac_approx), factors(padded, kfac_approx), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    rows = torch.cat([x, torch.ones(N, S, 1)], dim=-1)
    if kfac_approx == "expand":
        kept = rows[MASK]
    else:  # the last datum has no position that counts
        kept = torch.stack([rows[n, MASK[n]].mean(0) for n in range(N - 1)])
    A = factors(padded, kfac_approx).input_factor
    torch.testing.assert_close(A, kept.mT @ kept / len(kept), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_padding_tokens_count_in_no_embedding(kfac_approx):
    torch.manual_seed(1)
    tokens = torch.randint(6, (N, S))
    padded = torch.where(MASK, tokens, 5)
    A = factors(padded, kfac_approx, nn.Embedding(6, D_OUT)).input_factor
    hot = F.one_hot(tokens, 6).to(torch.float64)
    if kfac_approx == "expand":
        kept = hot[MASK]
    else:
        kept = torch.stack([hot[n, MASK[n]].mean(0) for n in range(N - 1)])
    torch.testing.assert_close(A, kept.square().mean(0), rtol=0, atol=TOLERANCE)


def test_a_step_without_gradients_leaves_a_as_it_is():
    torch.manual_seed(0)
    layer = nn.Linear(D_IN, D_OUT)
    optimizer = KFACOptimizer(layer.parameters(), fisher_type="type-2", factor_update_interval=1)
    found = []
    for margin in (0.0, 1e6):  # no datum is within it
        optimizer.zero_grad()
        (layer(torch.randn(N, D_IN)) - margin).relu().square().mean().backward()
        optimizer.step()
        found.append(optimizer.factors("").input_factor.clone())
    assert torch.equal(*found)
