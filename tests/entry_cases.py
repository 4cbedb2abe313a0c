"""Networks whose vectors and scalars multiply and are added past modules; data do not mix."""

import torch
from torch import nn


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
    "in-place": (lambda m, h: h.clone().mul_(m.p).add_(m.q), {"p": (5,), "q": (2, 5)}),
    "both-ways": (lambda m, h: m.p * (h + m.p), {"p": (5,)}),
    "cast": (lambda m, h: (h.float() * m.p.float()).double(), {"p": (5,)}),
}
