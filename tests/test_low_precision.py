"""Factors and inverses in bfloat16 or float32: training on digits does not suffer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

SEEDS, EPOCHS, BATCH = range(5), 4, 64
ACCURACY_LOSS = 0.01  # of the mean over seeds
LOSS_RATIO = 1.2

PRECISIONS = {
    "factors bfloat16": {"factor_dtype": torch.bfloat16},
    "inverses bfloat16": {"inverse_dtype": torch.bfloat16},
    "both bfloat16": {"factor_dtype": torch.bfloat16, "inverse_dtype": torch.bfloat16},
    "both float32, parameters float64": {
        "factor_dtype": torch.float32,
        "inverse_dtype": torch.float32,
    },
}


def digits():
    data = pytest.importorskip("sklearn.datasets", reason="the digits").load_digits()
    X, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return X[order], y[order]


def train(seed, dtype=torch.float32, **options):
    X, y = digits()
    X = X.to(dtype)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).to(dtype)
    optimizer = KFACOptimizer(model.parameters(), **options)
    generator = torch.Generator().manual_seed(seed)
    # With a constant rate the last batches' noise makes the last loss: 0.002 to 0.037 by the seed.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * -(-1400 // BATCH))
    for _ in range(EPOCHS):
        for index in torch.randperm(1400, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(X[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (model(X[1400:]).argmax(1) == y[1400:]).double().mean()
        return accuracy.item(), F.cross_entropy(model(X[:1400]), y[:1400]).item(), optimizer


# Each choice meets each preconditioner, alone or with the other.
CHOICES = {
    "kfac": ("both bfloat16", "both float32, parameters float64"),
    "ekfac": ("factors bfloat16", "inverses bfloat16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("preconditioner", CHOICES)
def test_training_does_not_suffer(preconditioner):
    def means(**options):
        runs = [train(seed, preconditioner=preconditioner, **options)[:2] for seed in SEEDS]
        return torch.tensor(runs, dtype=torch.float64).mean(0).tolist()

    accuracy, loss = means()
    assert accuracy > 0.93
    for name in CHOICES[preconditioner]:
        options = PRECISIONS[name]
        wide = {"dtype": torch.float64} if "float64" in name else {}
        low_accuracy, low_loss = means(**options, **wide)
        assert low_accuracy > accuracy - ACCURACY_LOSS, name
        assert low_loss < LOSS_RATIO * loss, name


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_the_state_is_in_the_stated_dtypes(preconditioner):
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=torch.float64)
    optimizer = KFACOptimizer(
        model.parameters(),
        preconditioner=preconditioner,
        factor_dtype=torch.bfloat16,
        inverse_dtype=torch.float32,
    )
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(torch.rand(9, 5).double()), torch.rand(9, 3).double()).backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    kept = {
        "input_factor": torch.bfloat16,
        "grad_output_factor": torch.bfloat16,
        "second_moments": torch.bfloat16,
        "input_inverse": torch.float32,
        "grad_output_inverse": torch.float32,
        "input_basis": torch.float32,
        "grad_output_basis": torch.float32,
    }
    found = {key: state[key].dtype for key in kept if key in state}
    assert len(found) == (5 if preconditioner == "ekfac" else 4)
    assert found == {key: kept[key] for key in found}
    assert model.weight.dtype == torch.float64
