"""Products with a matrix past the call of a module: the optimizer has the factors of a layer."""

import copy
import pickle
from functools import partial

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
    both_with_bias,
    corrected_step,
    damped_step,
    data,
    dense_factors,
    dense_rows,
    functional,
)
from rank_pair import WORLD
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacopt import KFACOptimizer, KFACWarning

pytestmark = pytest.mark.usefixtures("float64")

ROUND_OFF = 1e-10  # of sums of products of entries of about 1, in float64
BFLOAT16 = 2**-7  # a module's input is kept before its cast, a product's behind it
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


@pytest.mark.parametrize("use", [functional, both], ids=["functional", "both"])
def test_autocast_products_are_those_of_modules(use):
    class Called(Net):
        """The same, all through the module."""

        def forward(self, x):
            h = self.layer(x).tanh()
            return self.head(self.layer(h).tanh() if use is both_with_bias else h)

    use = both_with_bias if use is both else use
    found = []
    for net in (Net(use).float(), Called(use).float()):
        optimizer = KFACOptimizer(net.parameters(), **EVERY_STEP | {"fisher_type": "type-2"})
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(X.float()), LABELS)
            loss.backward()
            optimizer.step()
        found.append(optimizer.factors("layer"))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < BFLOAT16 * other.abs().max()


class TwoHeads(nn.Module):
    """A shared tower and two heads, one of them a matrix that no module has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.kernel = nn.Linear(D, D), nn.Parameter(torch.randn(D, 3))

    def forward(self, x):
        h = self.tower(x).tanh()
        return h, h @ self.kernel


def test_products_that_a_later_loss_shows_count_for_the_empirical_fisher():
    """Those of the first loss have their hooks by then."""
    net = TwoHeads()
    options = EVERY_STEP | {"fisher_type": "empirical"}
    optimizer = KFACOptimizer(net.parameters(), **options)
    y = data(6, D).cos()
    for _ in range(2):
        optimizer.zero_grad()
        h, z = net(X)
        (F.cross_entropy(z, LABELS) + F.mse_loss(h, y)).backward()
        optimizer.step()
    h, z = net(X)
    (g,) = torch.autograd.grad(F.cross_entropy(z, LABELS), z)
    A, G = dense_factors(h.detach(), [g * len(X) ** 0.5])
    found = optimizer.factors("kernel")
    torch.testing.assert_close(found.input_factor, A, rtol=ROUND_OFF, atol=ROUND_OFF)
    # Both losses are of the same data: κ is the mean of 1/6 and of 1/24.
    ratio = found.grad_output_factor / G
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-6, atol=0.0)


# Attention ----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """`nn.MultiheadAttention`, and an average over positions."""

    def __init__(self, crossed):
        super().__init__()
        torch.manual_seed(0)
        self.mixer, self.head = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, 3)
        self.crossed = crossed

    def forward(self, x):
        other = x[:, 1:].cos() if self.crossed else x
        return self.head(self.mixer(x, other, other)[0].mean(1))

    def by_hand(self, x):
        """Return z, and for each product a, its output, and which rows of the weight it has."""
        m, uses = self.mixer, []
        other = x[:, 1:].cos() if self.crossed else x
        parts = [(x, 0, D), (other, D, 3 * D)] if self.crossed else [(x, 0, 3 * D)]
        outputs = []
        for a, i, j in parts:
            outputs.append(F.linear(a, m.in_proj_weight[i:j], m.in_proj_bias[i:j]))
            uses.append((a, outputs[-1], i, j))
        q, k, v = torch.cat([outputs[0][..., :D]], -1), *outputs[-1][..., -2 * D :].chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, D // 2)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT / (D // 2) ** 0.5).softmax(-1)
        return self.head(m.out_proj((weights @ v).transpose(1, 2).flatten(2)).mean(1)), uses


@pytest.mark.parametrize("crossed", [False, True], ids=["self", "cross"])
def test_packed_projections_of_attention(crossed):
    net, x = Attention(crossed), data(6, 3, D)
    optimizer = KFACOptimizer(net.parameters(), **EVERY_STEP | {"fisher_type": "type-2"})
    for _ in range(2):
        backward(net, optimizer, x)
        optimizer.step()
    assert optimizer.statistics()["fallback_parameters"] == 0.0
    z, uses = net.by_hand(x)
    rows, total = [], 0.0
    for a, out, i, j in uses:
        rows.append(torch.cat([a.flatten(0, 1), torch.ones(a.shape[0] * a.shape[1], 1)], 1))
        for v in hessian_columns(F.cross_entropy, z.detach(), LABELS):
            (g,) = torch.autograd.grad(z, out, v, retain_graph=True)
            own = torch.zeros(g.shape[0] * g.shape[1], 3 * D)
            own[:, i:j] = g.flatten(0, 1)
            total = total + own.T @ own
    a = torch.cat(rows).detach()
    found = optimizer.factors("mixer.in_proj_weight")
    torch.testing.assert_close(found.input_factor, a.T @ a / len(a), rtol=ROUND_OFF, atol=ROUND_OFF)
    torch.testing.assert_close(found.grad_output_factor, total, rtol=ROUND_OFF, atol=ROUND_OFF)


# What becomes of an optimizer ---------------------------------------------------------------------

OPTIONS = {
    "mc": {},
    "type-2": {"fisher_type": "type-2"},
    "empirical": {"fisher_type": "empirical"},
    "ekfac": {"preconditioner": "ekfac"},
    "stated loss": {"loss_func": nn.CrossEntropyLoss()},
    "auto": {"lr": "auto"},
    "reduce": {"kfac_approx": "reduce"},
    "own blocks": {"separate_weight_and_bias": True},
    "a subset": {"factor_batch_fraction": 0.5},
}
INTERVALS = {"factor_update_interval": 2, "inverse_update_interval": 2}


def train(net, optimizer, steps):
    for _ in range(steps):
        loss = backward(net, optimizer)
        optimizer.step()
    return loss.detach()


def test_blocks_of_their_own_want_the_bias_in_every_use():
    """W and b have G in common there, and b is no part of a product without it."""
    net = Net(USES["both"][0])
    optimizer = KFACOptimizer(net.parameters(), **OPTIONS["own blocks"])
    with pytest.warns(KFACWarning, match="in other ways, too"):
        train(net, optimizer, 2)
    assert "exp_avg" in optimizer.state[parameters(net, USES["both"][1])[0]]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", ["both", "at", "on the left"])
def test_it_trains_and_is_resumed_bit_by_bit(case, options):
    if case == "both" and options == OPTIONS["own blocks"]:
        pytest.skip("the product does not add b, whose G is W's: AdamW, see the test above")
    use, name = USES[case]
    net = Net(use)
    optimizer = KFACOptimizer(net.parameters(), **INTERVALS | options)
    first = train(net, optimizer, 1)
    last = train(net, optimizer, 6)
    assert last < first
    assert "exp_avg" not in optimizer.state[parameters(net, name)[0]]
    twin = Net(use)
    twin.load_state_dict(net.state_dict())
    resumed = KFACOptimizer(twin.parameters(), **INTERVALS | options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copies = pickle.loads(pickle.dumps((_plain(net), optimizer)))
    for own in ((twin, resumed), copies, (net, optimizer)):
        train(*own, 4)
    for model in (twin, copies[0]):
        assert all(map(torch.equal, model.parameters(), net.parameters()))


def _plain(net):
    net.uses.clear()  # tensors with a graph are not pickled
    return net


def test_frozen_and_unfrozen():
    net = Net(at)
    optimizer = KFACOptimizer(net.parameters(), **INTERVALS)
    train(net, optimizer, 4)
    net.kernel.requires_grad_(False)
    before = net.kernel.clone()
    train(net, optimizer, 4)
    assert torch.equal(net.kernel, before)
    net.kernel.requires_grad_(True)
    train(net, optimizer, 4)
    assert not torch.equal(net.kernel, before)
    age = optimizer.statistics()["kernel/factor_age"]
    assert age < 2


def test_a_group_that_is_added_later():
    net = Net(at)
    rest = [p for name, p in net.named_parameters() if name not in ("kernel", "shift")]
    optimizer = KFACOptimizer(rest, **INTERVALS, model=net)
    train(net, optimizer, 3)
    optimizer.add_param_group({"params": [net.kernel, net.shift], "damping": 1e-2})
    train(net, optimizer, 4)
    assert optimizer.statistics()["kernel/damping"] == 1e-2


class Routed(nn.Module):
    """One of four experts for each datum; the second rank has those that the first has not."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.randn(4, D, D)), nn.Linear(D, 3)
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x):
        h, expert = torch.zeros_like(x), (x[:, 0] > 0).long() + 2 * (x[:, 0] > 2).long()
        for e in range(4):
            chosen = (expert == e).nonzero()[:, 0]
            if len(chosen):
                h = h.index_add(0, chosen, x[chosen] @ self.experts[e])
        return self.head(h.tanh()) + self.shift


class Switched(Net):
    """Has a matrix that only some data use."""

    def forward(self, x):
        h = self.layer(x).tanh()
        return self.head(h @ self.kernel + self.shift if (x[:, 0] < 2).all() else h)


def switched(rank, options):
    net = Routed().float() if "experts" in options else Switched(None).float()
    name, options = ("experts", {}) if "experts" in options else ("kernel", options)
    with torch.no_grad():  # the same in processes with another default dtype
        for p in net.double().parameters():
            p.copy_(data(*p.shape))
    called, x, y = net, torch.cat([data(6, D), data(6, D) + 3]), torch.cat([LABELS, LABELS])
    optimizer = KFACOptimizer(net.parameters(), **EVERY_STEP | {"fisher_type": "type-2"} | options)
    if rank is not None:
        called = DistributedDataParallel(net, find_unused_parameters=True)
        x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
    for _ in range(3):
        optimizer.zero_grad()
        if rank is None:
            parts = zip(x.chunk(WORLD), y.chunk(WORLD), strict=True)
            sum(F.cross_entropy(net(a), b) / WORLD for a, b in parts).backward()
        else:
            F.cross_entropy(called(x), y).backward()
        optimizer.step()
    return [*optimizer.factors(name), *optimizer.factors("head"), *net.parameters()]


MOVED = {"still": {}, "moved": {"lr": 0.1, "fallback_lr": 1e-3}, "experts": {"experts": True}}


def obligations(rank):
    for name, options in MOVED.items():
        yield name, partial(switched, rank, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_a_matrix_that_one_rank_alone_uses_is_a_layer_on_both(ranks, name):
    expected = switched(None, MOVED[name])
    for result in (r[name] for r in ranks):
        assert not isinstance(result, str), result
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=INVERTED, atol=INVERTED)
