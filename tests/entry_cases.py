"""Networks whose vectors and scalars multiply and are added past modules; data do not mix."""

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """[N, 4] -> [N, S, 5], an operation with parameters, -> [N, 3]; not linear."""

    def __init__(self, operation, positions=2, **shapes):
        super().__init__()
        self.operation, self.positions = operation, positions
        self.first = nn.Linear(4, 5 * positions)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape).uniform_(0.5, 1.5)))
        with torch.no_grad():
            size = self.hidden(torch.zeros(1, 4))[0].numel()
        self.last = nn.Linear(size, 3)

    def hidden(self, x):
        h = torch.tanh(self.first(x)).unflatten(1, (self.positions, 5))
        return torch.tanh(self.operation(self, h)) ** 2

    def forward(self, x):
        return self.last(self.hidden(x).flatten(1))

    def entries(self):
        return list(self.parameters(recurse=False))


def _cls(m, h):
    return torch.cat([m.p.expand(len(h), -1, -1), h], 1)


def _masked(m, h):
    return torch.where(h > 0, h, m.p.repeat(len(h), 2, 1))


def _several(m, h):
    h = m.p[0] * h - m.p[1]
    return h / m.p[0] + 2 * m.p[2] + torch.add(h, m.p[1], alpha=-3)


def _functions(p):
    """Ten functions of slices, for the outputs of a further axis."""
    first = F.softplus(p[0]) + 1 / p[1] - p[2].log() + p[3] ** 3
    return first * p[4].sqrt().tanh() / (p[5].square() + 1) + p[6].clamp(0.7, 1.2) - (-p[7]) / 2


OPERATIONS = {
    # name: (what is computed of [N, 2, 5], shapes of the parameters)
    "layer-scale": (lambda m, h: m.p * h, {"p": (5,)}),
    "layer-scale-behind": (lambda m, h: h + h * m.p, {"p": (1, 1, 5)}),
    "positions": (lambda m, h: h + m.p, {"p": (2, 5)}),
    "positions-and-axis": (lambda m, h: h + m.p, {"p": (1, 2, 5)}),
    "positions-sliced": (lambda m, h: h + m.p[:, 1:3], {"p": (1, 4, 5)}),
    "along-positions": (lambda m, h: m.p.unsqueeze(-1) * h, {"p": (2,)}),
    "scalar": (lambda m, h: h * m.p, {"p": ()}),
    "divisor": (lambda m, h: h / m.p, {"p": ()}),
    "dividend": (lambda m, h: m.p / (h + 2), {"p": (5,)}),
    "subtrahend": (lambda m, h: 2 * h - m.p, {"p": (5,)}),
    "minuend": (lambda m, h: m.p - 2 * h, {"p": (2, 1)}),
    "temperature": (lambda m, h: h * m.p.exp(), {"p": (1,)}),
    "clamped-temperature": (lambda m, h: m.p.clamp(max=1.2).exp() * h, {"p": (5,)}),
    "gate": (lambda m, h: torch.sigmoid(2 - 3 * m.p[1:4]).sqrt() * h[..., 1:4], {"p": (5,)}),
    "functions": (lambda m, h: _functions(m.p) * h, {"p": (8, 1, 1)}),
    "cls": (_cls, {"p": (1, 1, 5)}),
    "cls-with-a-position": (
        lambda m, h: torch.cat([(m.p + m.q[:, :1]).expand(len(h), -1, -1), h + m.q[:, 1:]], 1),
        {"p": (1, 1, 5), "q": (1, 3, 5)},
    ),
    "mask-token": (_masked, {"p": (1, 1, 5)}),
    "rows-per-datum": (
        lambda m, h: (h.flatten(0, 1) * m.p).unflatten(0, (len(h), 2)) + m.p,
        {"p": (5,)},
    ),
    "several-uses": (_several, {"p": (3, 5)}),
    "two-scales": (lambda m, h: m.p * m.q * h, {"p": (5,), "q": (5,)}),
    "transposed": (lambda m, h: h + m.p.T, {"p": (5, 2)}),
    "functional-layer-norm": (lambda m, h: F.layer_norm(h, (5,), m.p, m.q), {"p": (5,), "q": (5,)}),
    "functional-layer-norm-of-two-axes": (
        lambda m, h: F.layer_norm(h, (2, 5), m.p.exp(), m.q),
        {"p": (2, 5), "q": (2, 5)},
    ),
    "functional-group-norm": (
        lambda m, h: F.group_norm(h.reshape(-1, 4, 5)[:, :, :2], 2, m.p[:4], m.p[4:]).flatten(1),
        {"positions": 4, "p": (8,)},
    ),
    "functional-group-norm-of-an-image": (
        lambda m, h: F.group_norm(h.unflatten(2, (1, 5)), 1, m.p, m.q),
        {"p": (2,), "q": (2,)},
    ),
    "bias-of-a-scaled-weight": (
        lambda m, h: F.linear(h, 2 * m.first.weight.detach()[:3, :1].expand(3, 5), m.p),
        {"p": (3,)},
    ),
    "bias-of-a-standardised-convolution": (
        lambda m, h: F.conv1d(h, m.first.weight.detach()[:6].reshape(4, 2, 3).softmax(-1), m.p),
        {"p": (4,)},
    ),
    "bias-of-a-scaled-convolution-of-images": (
        lambda m, h: F.conv2d(
            h.unsqueeze(1), 2 * m.first.weight.detach()[:4].reshape(4, 1, 2, 2), m.p
        ),
        {"p": (4,)},
    ),
    "in-place": (lambda m, h: h.clone().mul_(m.p).add_(m.q), {"p": (5,), "q": (2, 5)}),
    "both-ways": (lambda m, h: m.p * (h + m.p), {"p": (5,)}),
    "cast": (lambda m, h: (h.float() * m.p.float()).double(), {"p": (5,)}),
}


class ScaledWeight(nn.Module):
    """`t * W`, where W has as many rows as there are data."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(6, 3)
        self.p, self.W = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return self.last(torch.tanh(F.linear(torch.tanh(self.first(x)), self.p * self.W)))


class ScaledAdapter(ScaledWeight):
    """The same with a weight that products of parameters make, one of them frozen."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.randn(6, 6), requires_grad=False)

    def forward(self, x):
        W = torch.tanh(self.first.weight[:1].T @ self.first.weight[:1, :1]).T.expand(6, 4)
        W = torch.cat([self.p * (self.A @ self.W), self.p + W[:, :0]], 1)
        return self.last(torch.tanh(F.linear(torch.tanh(self.first(x)), W)))


class SequenceFirst(nn.Module):
    """[N, 4] -> [S, N, 5], times p, -> [N, 3], with as many positions as data."""

    def __init__(self, pick=lambda h: h.mean(0)):
        super().__init__()
        self.first, self.last = nn.Linear(4, 30), nn.Linear(5, 3)
        self.p, self.pick = nn.Parameter(torch.rand(5)), pick

    def forward(self, x):
        h = torch.tanh(self.first(x)).unflatten(1, (6, 5)).transpose(0, 1)
        return self.last(self.pick(torch.tanh(self.p * h)))


class BothWays(Net):
    """Multiplied with data and with a weight."""

    def __init__(self):
        super().__init__(lambda m, h: m.p * F.linear(h, m.p * m.W), p=(5,), W=(5, 5))


class Mixed(Net):
    """Data see each other behind the parameter."""

    def __init__(self):
        super().__init__(lambda m, h: (m.p * h).softmax(0), p=(5,))


class Grouped(Net):
    """Rows of one datum are not one behind the other."""

    def __init__(self):
        def operation(m, h):
            return torch.stack((m.p * torch.cat([h[:, 0], h[:, 1]])).chunk(2), 1)

        super().__init__(operation, p=(5,))


class Reversed(Net):
    """The rows of a product are not those of z."""

    def __init__(self):
        super().__init__(lambda m, h: m.p * h, p=(5,))

    def forward(self, x):
        return super().forward(x).flip(0)


class Hidden(Net):
    """In an operation that is none of those that are known."""

    def __init__(self):
        super().__init__(lambda m, h: torch.lerp(h, h.square(), m.p), p=(5,))


class OfInputs(nn.Module):
    """What has no graph may be data, or anything else."""

    def __init__(self):
        super().__init__()
        self.p, self.last = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.p * x))


class OfATable(nn.Module):
    """A row for each datum, looked up in their order this time."""

    def __init__(self):
        super().__init__()
        self.p, self.table = nn.Parameter(torch.rand(())), nn.Parameter(torch.randn(6, 4))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(F.embedding(torch.arange(len(x)), self.p * self.table) + x))


def first_position(h):
    return h[0]


def last_position(h):
    return h[-1]


UNCERTAIN = {
    "a-scaled-weight": ScaledWeight,
    "a-scaled-adapter": ScaledAdapter,
    "sequence-first": SequenceFirst,
    "sequence-first-cls": lambda: SequenceFirst(first_position),
    "sequence-first-last": lambda: SequenceFirst(last_position),
    "both-ways": BothWays,
    "data-that-see-each-other": Mixed,
    "scattered-rows": Grouped,
    "reversed-rows": Reversed,
    "another-operation": Hidden,
    "inputs": OfInputs,
    "a-table": OfATable,
}
