"""Parameters with an axis of experts, and functional convolutions, in the optimizer."""

import copy

import pytest
import torch
from dense import dense_ggn
from kfac_cases import to_dense
from product_cases import LABELS, D, data
from test_products import DAMPING, EVERY_STEP, INTERVALS, INVERTED, OPTIONS, ROUND_OFF
from torch import nn
from torch.nn import functional as F

from kfacopt import EKFACLinearOperator, KFACLinearOperator, KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

E = 4
X = data(6, D)


class Experts(nn.Module):
    """Each datum goes through the expert that `route` names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.head = nn.Parameter(torch.randn(E, D, D)), nn.Linear(D, 3)
        self.route = torch.arange(6) % E

    def apply_expert(self, e, x):
        return F.linear(x, self.experts[e])

    def forward(self, x):
        h = torch.zeros_like(x)
        for e in range(E):
            chosen = (self.route == e).nonzero()[:, 0]
            h = h.index_add(0, chosen, self.apply_expert(e, x[chosen]))
        return self.head(h.tanh())


class Biased(Experts):
    """The same with a bias for each expert."""

    def __init__(self):
        super().__init__()
        self.shifts = nn.Parameter(torch.randn(E, D))

    def apply_expert(self, e, x):
        return F.linear(x, self.experts[e], self.shifts[e])


class Modules(Experts):
    """The same with a module for each expert."""

    def __init__(self):
        super().__init__()
        kept = self.experts.detach()
        del self.experts
        self.experts = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(E))
        for layer, weight in zip(self.experts, kept, strict=True):
            layer.weight.data.copy_(weight)

    def apply_expert(self, e, x):
        return self.experts[e](x)


def backward(net, optimizer):
    optimizer.zero_grad()
    loss = F.cross_entropy(net(X), LABELS)
    loss.backward()
    return loss.detach()


def steps(net, optimizer, number):
    for _ in range(number):
        loss = backward(net, optimizer)
        optimizer.step()
    return loss


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_experts_are_layers_of_their_own(preconditioner):
    nets = [Experts(), Modules()]
    # EKFAC's bases are left alone while they are good for all experts together.
    number = 1 if preconditioner == "ekfac" else 3
    options = EVERY_STEP | {"fisher_type": "type-2", "preconditioner": preconditioner}
    optimizers = [KFACOptimizer(net.parameters(), **options) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        steps(net, optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.1
        steps(net, optimizer, number)
    stacked, apart = nets[0].experts, torch.stack([la.weight for la in nets[1].experts])
    torch.testing.assert_close(stacked, apart, rtol=INVERTED, atol=INVERTED)
    found = optimizers[0].factors("experts")
    for e in range(E):
        wanted = optimizers[1].factors(f"experts.{e}")
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one[e], other, rtol=INVERTED, atol=INVERTED)


def test_averages_are_weighted_by_an_experts_own_rows():
    """One that has none stays as it is, one that never had any gets the others' mean."""
    net, decay = Experts(), 0.5
    options = EVERY_STEP | {"fisher_type": "type-2", "ema_decay": decay}
    optimizer = KFACOptimizer(net.parameters(), **options)
    net.route = torch.tensor([0, 0, 0, 0, 1, 2])
    steps(net, optimizer, 2)
    first = [f.clone() for f in optimizer.factors("experts")]
    torch.testing.assert_close(first[0][0], X[:4].T @ X[:4] / 4, rtol=ROUND_OFF, atol=ROUND_OFF)
    assert not first[0][3].any()
    net.route = torch.tensor([0, 2, 2, 0, 0, 2])
    steps(net, optimizer, 1)
    second = optimizer.factors("experts")
    for before, after in zip(first, second, strict=True):
        assert torch.equal(after[1], before[1])  # had none
        assert not torch.equal(after[0], before[0])
    own, weight = X[[0, 3, 4]], decay * 4 + 3
    expected = (decay * X[:4].T @ X[:4] + own.T @ own) / weight
    torch.testing.assert_close(second[0][0], expected, rtol=ROUND_OFF, atol=ROUND_OFF)
    state = optimizer.state[net.experts]
    A = second[0][:3].mean(0)
    G = second[1][:3].mean(0)
    pi = (A.trace() / G.trace()).sqrt()
    inverse = torch.linalg.inv(A + DAMPING**0.5 * pi * torch.eye(D))
    torch.testing.assert_close(state["input_inverse"][3], inverse, rtol=INVERTED, atol=INVERTED)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", OPTIONS)
def test_experts_train_and_are_resumed_bit_by_bit(name, biased):
    make = Biased if biased else Experts
    net = make()
    net.route = net.route.clamp(max=2)  # the last never has data
    optimizer = KFACOptimizer(net.parameters(), **INTERVALS | OPTIONS[name])
    first = steps(net, optimizer, 1)
    before = net.experts.detach().clone()
    assert steps(net, optimizer, 5) < first
    assert optimizer.statistics()["fallback_parameters"] == 0.0
    assert bool((net.experts != before).flatten(1).any(1)[:3].all())
    twin = make()
    twin.route = net.route
    twin.load_state_dict(net.state_dict())
    resumed = KFACOptimizer(twin.parameters(), **INTERVALS | OPTIONS[name])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own in ((net, optimizer), (twin, resumed)):
        own[0].route = torch.tensor([3, 2, 1, 0, 3, 3])
        steps(*own, 4)
    assert all(map(torch.equal, twin.parameters(), net.parameters()))


class Convolutions(nn.Module):
    """Two convolutions, called as functions or as modules."""

    def __init__(self, functional):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(1, 4, 3, padding=1, stride=2)
        self.second, self.head = nn.ConvTranspose1d(4, 2, 3, groups=2, padding=1), nn.Linear(4, 3)
        self.functional = functional

    def forward(self, x):
        x = x[:, None]
        if not self.functional:
            return self.head(self.second(self.first(x).tanh()).flatten(1))
        h = F.conv1d(x, self.first.weight, self.first.bias, stride=2, padding=1).tanh()
        second = self.second
        h = F.conv_transpose1d(h, second.weight, second.bias, padding=1, groups=2)
        return self.head(h.flatten(1))


class Hidden(Convolutions):
    """The same with kernels that no module has."""

    def __init__(self):
        super().__init__(functional=True)
        for name in ("first", "second"):
            layer = getattr(self, name)
            delattr(self, name)
            own = nn.Module()
            own.register_parameter("weight", layer.weight)
            own.register_parameter("bias", layer.bias)
            setattr(self, name, own)


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("make", [lambda: Convolutions(True), Hidden], ids=["known", "hidden"])
def test_functional_convolutions_are_those_of_modules(make, preconditioner):
    nets = [make(), Convolutions(False)]
    options = EVERY_STEP | {"fisher_type": "type-2", "preconditioner": preconditioner}
    for net in nets:
        optimizer = KFACOptimizer(net.parameters(), **options)
        steps(net, optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.1
        steps(net, optimizer, 3)
        assert optimizer.statistics()["fallback_parameters"] == 0.0
    pairs = zip(*(sorted(n.named_parameters()) for n in nets), strict=True)
    for (_, one), (_, other) in pairs:
        torch.testing.assert_close(one, other, rtol=INVERTED, atol=INVERTED)


def test_layers_chooses_by_what_is_computed():
    net = Hidden()
    optimizer = KFACOptimizer(net.parameters(), layers=[nn.Linear, nn.Conv1d])
    steps(net, optimizer, 2)
    assert "first.weight/damping" in optimizer.statistics()
    assert optimizer.statistics()["fallback_parameters"] == 2.0


# Biases, and grouped products ---------------------------------------------------------------------

ROWS, WIDTH = [3, 0, 2, 1], 8
INDEX = torch.arange(E).repeat_interleave(torch.tensor(ROWS))
OPERATORS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}


def one_by_one(x, W, b):
    own = zip(x.split(ROWS), W, (None,) * E if b is None else b, strict=True)
    return torch.cat([F.linear(a, w, c) for a, w, c in own if len(a)])


def added_behind(x, W, b):
    return torch.cat([a @ W[e].T + b[e] for e, a in enumerate(x.split(ROWS)) if len(a)])


def all_of_them(x, W, b):
    return (torch.bmm(x.expand(E, *x.shape), W.mT) + b.unsqueeze(1)).transpose(0, 1)


def all_on_the_left(x, W, b):
    return torch.baddbmm(b.unsqueeze(-1), W, x.T.expand(E, WIDTH, len(x))).permute(2, 0, 1)


def grouped(x, W, b):
    """What comes out behind the last offset is not defined."""
    offsets = torch.tensor(ROWS).cumsum(0).int()
    h = torch._grouped_mm(torch.cat([x, x[:2]]), W.mT, offs=offsets)
    if b is not None:
        h.add_(b[torch.cat([INDEX, INDEX[-2:]])])
    return h[: len(x)]


def gathered(x, W, b):
    return torch.bmm(W[INDEX], x.unsqueeze(-1)).squeeze(-1) + b[INDEX]


def gathered_and_turned(x, W, b):
    mixed = torch.tensor([3, 0, 5, 1, 4, 2])
    h = torch.bmm(x[mixed].unsqueeze(1), W.mT[INDEX[mixed]]).squeeze(1)
    return (h + b[INDEX[mixed]])[mixed.argsort()]


ONE_EACH = [one_by_one, added_behind, gathered, gathered_and_turned]


class Sorted(nn.Module):
    """Data in the order of their experts."""

    def __init__(self, use, biased=True, head=True):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(E, 4, WIDTH))
        self.shifts = nn.Parameter(torch.randn(E, 4)) if biased else None
        self.use, self.head = use, nn.Linear(4, 3) if head else nn.Identity()

    def forward(self, x):
        h = self.use(torch.cat([x, x.sin()], 1), self.experts, self.shifts)
        return self.head(h.tanh() if isinstance(self.head, nn.Linear) else h)


@pytest.mark.parametrize("kind", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("use", [*ONE_EACH, all_of_them, all_on_the_left])
def test_biases_are_in_the_blocks_of_their_experts(use, kind):
    """Experts without data have zeros there."""
    net = Sorted(use, head=False)
    loss, params = nn.MSELoss(), [net.experts, net.shifts]
    y = torch.rand_like(net(X))
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = to_dense(kind(net, loss, params, [(X, y)], **options))
    expected = dense_ggn(net, loss, params, X, y)
    # Experts on the same data have more in common than their own blocks.
    owner = torch.cat([torch.arange(E).repeat_interleave(p[0].numel()) for p in params])
    expected = torch.where(owner[:, None] == owner, expected, 0.0)
    torch.testing.assert_close(K, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_a_step_of_experts_with_biases(preconditioner, separate):
    nets = [Sorted(use) for use in ONE_EACH]
    options = EVERY_STEP | {"fisher_type": "type-2", "preconditioner": preconditioner}
    for net in nets:
        optimizer = KFACOptimizer(net.parameters(), separate_weight_and_bias=separate, **options)
        steps(net, optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.1
        steps(net, optimizer, 2)
        assert optimizer.statistics()["fallback_parameters"] == 0.0
        assert not net.experts.grad[1].any()
    for first, *others in zip(*(net.parameters() for net in nets), strict=True):
        for other in others:
            torch.testing.assert_close(first, other, rtol=INVERTED, atol=INVERTED)


FLOAT32 = 1e-4  # of what follows, in float32, as the grouped product is not there in float64


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="no torch._grouped_mm")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("kind", OPERATORS.values(), ids=OPERATORS)
def test_grouped_products_have_the_factors_of_single_ones(kind, biased):
    found = []
    for use in (grouped, one_by_one):
        net = Sorted(use, biased).float()
        params = [p for p in (net.experts, net.shifts) if p is not None]
        options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
        K = kind(net, nn.CrossEntropyLoss(), params, [(X.float(), LABELS)], **options)
        found.append([*K.factors("experts"), K @ torch.ones(K.shape[1], dtype=torch.float32)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="no torch._grouped_mm")
@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "auto"])  # no forward mode
def test_grouped_products_train(name):
    net, losses = Sorted(grouped).float(), []
    optimizer = KFACOptimizer(net.parameters(), **INTERVALS | OPTIONS[name])
    for _ in range(7):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(net(X.float()), LABELS))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[1]
    assert optimizer.statistics()["fallback_parameters"] == 0.0
