"""Networks on which K-FAC and EKFAC are compared with dense matrices."""

import torch
from torch import nn


def to_dense(operator):
    return operator @ torch.eye(operator.shape[1])


class Mean(nn.Module):
    """Average over the positions [N, S, C] -> [N, C], or [N, C, H, W] -> [N, C]."""

    def forward(self, x):
        return x.mean((2, 3)) if x.ndim == 4 else x.mean(1)


class Flatten(nn.Module):
    """[N, C, H, W] -> [N, H W, C]: every position is an output of its own."""

    def forward(self, x):
        return x.flatten(2).mT


LINEAR = nn.Linear
EXACT = {
    # name: (layers of a deep linear net, input shape of a datum, approximation)
    "mlp-expand": (lambda: [LINEAR(4, 5), LINEAR(5, 3)], (4,), "expand"),
    "mlp-reduce": (lambda: [LINEAR(4, 5), LINEAR(5, 3)], (4,), "reduce"),
    "positions-expand": (lambda: [LINEAR(4, 5), LINEAR(5, 3, bias=False)], (6, 4), "expand"),
    "two-axes-expand": (lambda: [LINEAR(4, 5), LINEAR(5, 2)], (2, 3, 4), "expand"),
    "positions-reduce": (lambda: [LINEAR(4, 5), LINEAR(5, 3), Mean()], (6, 4), "reduce"),
    "conv1x1-expand": (
        lambda: [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), Flatten()],
        (2, 3, 3),
        "expand",
    ),
    "conv-patches-expand": (
        lambda: [nn.Conv2d(2, 4, 2, stride=2), nn.Conv2d(4, 3, 1), Flatten()],
        (2, 4, 4),
        "expand",
    ),
    "conv-grouped-expand": (
        lambda: [nn.Conv2d(4, 6, 2, stride=2, groups=2), nn.Conv2d(6, 4, 1, groups=2), Flatten()],
        (4, 4, 4),
        "expand",
    ),
    "conv-circular-reduce": (
        lambda: [nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), Mean()],
        (2, 4, 4),
        "reduce",
    ),
    "conv-same-reduce": (
        lambda: [nn.Conv2d(2, 4, (2, 4), padding="same"), Mean(), LINEAR(4, 3)],
        (2, 5, 4),
        "reduce",
    ),
    "conv-strided-dilated-reduce": (
        lambda: [nn.Conv2d(2, 4, 3, stride=2, dilation=2, padding=2), Mean(), LINEAR(4, 3)],
        (2, 6, 7),
        "reduce",
    ),
}


def exact_case(name):
    make, shape, approx = EXACT[name]
    model = nn.Sequential(*make())
    data = [(torch.rand(n, *shape), None) for n in (4, 3)]
    data = [(X, torch.rand_like(model(X))) for X, _ in data]
    return model, data, approx


def joint_data(data):
    return torch.cat([X for X, _ in data]), torch.cat([y for _, y in data])


def group_blocks(model, params, separate):
    """Number the diagonal blocks; groups of a convolution are told apart by `grouped_mask`."""
    owners = [name.rsplit(".", 1)[0] for name, _ in model.named_parameters()]
    return list(range(len(params))) if separate else [owners.index(owner) for owner in owners]


def grouped_mask(model, params):
    """Ones where two entries of θ belong to the same group's output channels."""
    modules = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    owner = []
    for p in params:
        groups = getattr(modules[id(p)], "groups", 1)
        owner.append(torch.arange(groups).repeat_interleave(p.numel() // groups))
    owner = torch.cat(owner)
    return (owner[:, None] == owner[None, :]).to(params[0].dtype)


class Twice(nn.Module):
    """A layer used twice in a forward pass, once with an in-place activation behind it."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = LINEAR(4, 4), LINEAR(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(self.shared(x).relu_())))


def cnn(**kwargs):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, **kwargs),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


FACTORS = {
    "mlp": (lambda: nn.Sequential(LINEAR(4, 5), nn.Tanh(), LINEAR(5, 3)), (4,), "0"),
    "shared-axis": (
        lambda: nn.Sequential(LINEAR(4, 5), nn.Tanh(), nn.Flatten(), LINEAR(15, 3)),
        (3, 4),
        "0",
    ),
    "used-twice": (Twice, (4,), "shared"),
    "conv": (lambda: cnn(padding=1), (2, 4, 5), "0"),
    "conv-circular": (lambda: cnn(padding=(1, 2), padding_mode="circular"), (2, 4, 5), "0"),
    "conv-reflect": (lambda: cnn(padding=1, padding_mode="reflect"), (2, 4, 5), "0"),
    "conv-same-uneven": (lambda: cnn(padding="same", dilation=2), (2, 6, 5), "0"),
    "conv-strided": (lambda: cnn(stride=(2, 1), padding=1), (2, 5, 4), "0"),
    "conv-grouped": (lambda: cnn(groups=2, padding=1), (2, 4, 4), "0"),
}


def factor_case(name):
    make, shape, layer = FACTORS[name]
    model, X = make(), torch.randn(5, *shape)
    with torch.no_grad():
        model(X)  # makes lazy layers
    return model, X, torch.randint(3, (5,)), layer
