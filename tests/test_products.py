"""Products with a matrix past the call of a module have the factors of a layer, in the optimizer."""

import copy
import io
import warnings

import pytest
import torch
from dense import hessian_columns
from product_cases import (
    LABELS,
    USES,
    D,
    Net,
    at,
    both,
    corrected_step,
    damped_step,
    data,
    dense_factors,
    dense_rows,
    functional,
    shared_tower,
)
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

ROUND_OFF = 1e-10  # of sums of products of entries of about 1, in float64
INVERTED = 1e-7  # the same through inverses with condition numbers of up to 1e3
DAMPING = 1e-3
EVERY_STEP = {
    "factor_update_interval": 1,
    "inverse_update_interval": 1,
    "ema_decay": 0.0,
    "damping": DAMPING,
    "momentum": 0.0,
    "kl_clip": None,
    "lr": 0.0,
    "fallback_lr": 0.0,
}
X = data(6, D)


def backward(net, optimizer, x=X):
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x), LABELS)
    loss.backward()
    return loss


def adopted(net, **options):
    """Return an optimizer that has seen one step, which moved nothing."""
    optimizer = KFACOptimizer(net.parameters(), **EVERY_STEP | {"fisher_type": "type-2"} | options)
    backward(net, optimizer)
    optimizer.step()
    return optimizer


def loss_vectors(net, x, fisher_type):
    """Return z and v for which Σ v vᵀ is the curvature of the mean loss."""
    z = net(x)
    if fisher_type == "empirical":
        (g,) = torch.autograd.grad(F.cross_entropy(z, LABELS), z, retain_graph=True)
        return [(z, g * len(x) ** 0.5)]
    return [(z, v) for v in hessian_columns(F.cross_entropy, z.detach(), LABELS)]


def parameters(net, name):
    return (net.layer.weight, net.layer.bias) if name == "layer" else (net.kernel, net.shift)


def matrix(tensors, name, joint):
    weight, bias = tensors
    weight = weight if name == "layer" else weight.mT
    return torch.cat([weight, bias[:, None]], dim=1) if joint else weight


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("case", USES)
def test_factors_and_a_step_are_those_of_all_uses(case, fisher_type, preconditioner):
    use, name = USES[case]
    net = Net(use)
    optimizer = adopted(net, fisher_type=fisher_type, preconditioner=preconditioner)
    vectors = loss_vectors(net, X, fisher_type)
    rows, grads = dense_rows(net, vectors)
    A, G = dense_factors(rows, grads)
    optimizer.param_groups[0]["lr"] = 1.0
    backward(net, optimizer)
    params = parameters(net, name)
    joint = len(A) == D + 1
    before, gradient = (
        matrix([x.detach().clone() for x in own], name, joint)
        for own in (params, [p.grad if p.grad is not None else p for p in params])
    )
    optimizer.step()
    found = optimizer.factors(name)
    torch.testing.assert_close(found.input_factor, A, rtol=ROUND_OFF, atol=ROUND_OFF)
    torch.testing.assert_close(found.grad_output_factor, G, rtol=ROUND_OFF, atol=ROUND_OFF)
    if preconditioner == "kfac":
        expected = damped_step(A, G, gradient, DAMPING)
    else:
        expected = corrected_step(A, G, rows, grads, len(X), gradient, DAMPING)
    step = before - matrix([p.detach() for p in params], name, joint)
    torch.testing.assert_close(step, expected, rtol=INVERTED, atol=INVERTED)


def test_a_stated_loss_has_the_same_factors():
    nets = [Net(both), Net(both)]
    stated = {"loss_func": nn.CrossEntropyLoss()}
    found = []
    for net, options in zip(nets, ({}, stated), strict=True):
        optimizer = adopted(net, **options)
        backward(net, optimizer)
        optimizer.step()
        found.append(optimizer.factors("layer"))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUND_OFF, atol=ROUND_OFF)
