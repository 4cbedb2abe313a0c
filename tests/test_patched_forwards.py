"""A `forward` that was put on a module itself: what it computes is found in the graph, or named."""

import functools

import pytest
import torch
from dense import block_mask
from dense_curvature import ggn as dense_ggn
from kfac_cases import to_dense
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACLinearOperator, KFACOptimizer, KFACWarning

pytestmark = pytest.mark.usefixtures("float64")

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
TOKENS = torch.arange(6).reshape(3, 2) % 5
ROUND_OFF = 1e-10
EVERY_STEP = {"lr": 0.0, "fallback_lr": 0.0, "fisher_type": "type-2", "factor_update_interval": 1}


def patched(module, forward):
    old = module.forward
    module.forward = lambda x: forward(module, old, x)
    return module


FORWARDS = {
    "the input doubled": lambda module, old, x: old(2 * x),
    "the output doubled": lambda module, old, x: 2 * old(x),
    "a branch": lambda module, old, x: old(x) + x.sum(),
}
LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), X),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), X),
    "convolution": (lambda: nn.Conv1d(2, 3, 2), X.reshape(6, 2, 2)),
    "two axes": (lambda: nn.Conv2d(1, 3, 2), X.reshape(6, 1, 2, 2)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 3, 1), X.reshape(6, 4, 1)),
}


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_products_are_those_of_the_forward_that_runs(layer, forward):
    make, x = LAYERS[layer]
    torch.manual_seed(0)
    model = patched(make(), FORWARDS[forward])
    params, loss, y = list(model.parameters()), nn.MSELoss(), torch.zeros_like(model(x))
    args = model, loss, params, [(x, y)]
    K = KFACLinearOperator(*args, fisher_type="type-2")
    expected = dense_ggn(*args) * block_mask(params, range(len(params)))
    torch.testing.assert_close(to_dense(K), expected, rtol=ROUND_OFF, atol=ROUND_OFF)
    optimizer = KFACOptimizer(params, **EVERY_STEP, separate_weight_and_bias=True)
    loss(model(x), y).backward()
    optimizer.step()
    for own, other in zip(optimizer.factors(params[0]), K.factors(params[0]), strict=True):
        torch.testing.assert_close(own, other, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_lookups_are_those_of_the_forward_that_runs():
    torch.manual_seed(0)
    model = nn.Sequential(patched(nn.Embedding(5, 3), lambda m, old, x: old(4 - x)), nn.Flatten())
    args = model, nn.MSELoss(), list(model.parameters()), [(TOKENS, torch.zeros(3, 6))]
    K = KFACLinearOperator(*args, fisher_type="type-2")
    torch.testing.assert_close(to_dense(K), dense_ggn(*args), rtol=ROUND_OFF, atol=ROUND_OFF)


UNKNOWN = {
    "a scaled weight": (
        lambda: nn.Linear(4, 4),
        lambda m, old, x: F.linear(x, 3 * m.weight, m.bias),
    ),
    "a norm": (lambda: nn.LayerNorm(4), lambda m, old, x: old(x + torch.arange(4))),
    "a norm of groups": (lambda: nn.GroupNorm(2, 4), lambda m, old, x: old(x + torch.arange(4))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_product_is_named(name):
    make, forward = UNKNOWN[name]
    model = nn.Sequential(nn.Linear(4, 4), patched(make(), forward), nn.Linear(4, 3))
    params, kinds = list(model[1].parameters()), [nn.Linear, nn.LayerNorm, nn.GroupNorm]
    K = KFACLinearOperator(model, nn.MSELoss(), params, [(X, torch.zeros(6, 3))])
    with pytest.raises(NotImplementedError, match=r"1\.weight"):
        to_dense(K)
    optimizer = KFACOptimizer(model.parameters(), layers=kinds, **EVERY_STEP)
    F.mse_loss(model(X), torch.zeros(6, 3)).backward()
    with pytest.warns(KFACWarning, match="'1"):
        optimizer.step()


def hooked(module):
    """What accelerate's `add_hook_to_module` does: a partial that calls the stock forward."""
    old = module._old_forward = module.forward

    def forward(module, *args, **kwargs):
        return old(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(forward, module), old)


@pytest.mark.parametrize("later", [False, True], ids=["before", "after the optimizer was made"])
def test_wrappers_of_the_stock_forward_lose_no_layer(later):
    models, optimizers = [], []
    for is_hooked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        for layer in model if is_hooked and not later else ():
            hooked(layer)
        optimizers.append(KFACOptimizer(model.parameters(), **EVERY_STEP))
        for layer in model if is_hooked and later else ():
            hooked(layer)
        models.append(model)
        F.mse_loss(model(X), torch.zeros(6, 3)).backward()
        optimizers[-1].step()
    plain, wrapped = (o.describe() for o in optimizers)
    assert [p.curvature for p in wrapped.parameters] == [p.curvature for p in plain.parameters]
    for name in ("0", "2"):
        for own, other in zip(*(o.factors(name) for o in optimizers), strict=True):
            torch.testing.assert_close(own, other, rtol=ROUND_OFF, atol=ROUND_OFF)
