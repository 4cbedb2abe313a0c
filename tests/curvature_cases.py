"""Small float64 problems on which the exact operators are compared with dense matrices."""

import torch
from torch import nn

import kfacopt

DTYPE = torch.float64
BATCHES = {"one-batch": (5,), "unequal-batches": (2, 1, 2)}
NUM_CLASSES = 3
IGNORED = -100


class Attention(nn.Module):
    """A block of self-attention, mean-pooled; fused attention is what torch would take."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, X):
        Z = self.attention(X, X, X, need_weights=False)[0]
        return self.head((X + Z).mean(1))


class Recurrent(nn.Module):
    def __init__(self, cell=nn.LSTM):
        super().__init__()
        self.cell = cell(2, 3, batch_first=True)
        self.head = nn.Linear(3, NUM_CLASSES)

    def forward(self, X):
        return self.head(self.cell(X)[0][:, -1])


class Sequence(nn.Module):
    """Predictions `[N, C, T]`."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(2, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, X):
        return self.head(self.hidden(X).tanh()).movedim(-1, 1)


def grouped_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 3, stride=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(2, NUM_CLASSES),
    )


# name: (model, shape of a datum, shape of a datum's targets)
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), ()),
    "grouped-cnn": (grouped_cnn, (2, 4, 4), ()),
    "attention": (Attention, (3, 4), ()),
    "lstm": (Recurrent, (3, 2), ()),
    "sequence": (Sequence, (3, 2), (3,)),
}

_WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=DTYPE)

LOSSES = {
    "ce": nn.CrossEntropyLoss,
    "ce-ignored": lambda reduction: nn.CrossEntropyLoss(ignore_index=1, reduction=reduction),
    "ce-weights": lambda reduction: nn.CrossEntropyLoss(weight=_WEIGHT, reduction=reduction),
    "ce-smoothed": lambda reduction: nn.CrossEntropyLoss(
        weight=_WEIGHT, label_smoothing=0.2, reduction=reduction
    ),
    "mse": nn.MSELoss,
    "bce": nn.BCEWithLogitsLoss,
}
# An ignored target changes how many data there are, a class weight what the mean divides by.
WEIGHTED = ("ce-ignored", "ce-weights", "ce-smoothed")


def make_loss(name, reduction):
    return LOSSES[name](reduction=reduction)


def make_model(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name][0]().to(DTYPE)


def make_data(model_name, loss_name, batches, seed=1):
    _, datum, target = MODELS[model_name]
    generator = torch.Generator().manual_seed(seed)
    data = []
    for size in batches:
        X = torch.randn(size, *datum, generator=generator, dtype=DTYPE)
        if loss_name.startswith("ce"):
            y = torch.randint(NUM_CLASSES, (size, *target), generator=generator)
        else:
            y = torch.rand(size, NUM_CLASSES, *target, generator=generator, dtype=DTYPE)
        data.append((X, y))
    return data


def params_of(model):
    return [p for p in model.parameters() if p.requires_grad]


# Of entries around 1: the same products in another order of summation.
TOLERANCE = 1e-12

RISK_OPERATORS = [
    kfacopt.HessianLinearOperator,
    kfacopt.GGNLinearOperator,
    kfacopt.EFLinearOperator,
    kfacopt.FisherMCLinearOperator,
]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def columns_for(operator, count=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(operator.shape[1], count, generator=generator, dtype=DTYPE)
