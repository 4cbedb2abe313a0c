"""The check of model and data that operators make before their first product."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import kfacopt


@pytest.fixture
def dataset():
    return TensorDataset(torch.randn(10, 4), torch.randint(3, (10,)))


@pytest.fixture
def model():
    return nn.Linear(4, 3)


def make(model, data):
    return kfacopt.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)


def test_accepts_what_is_deterministic(model, dataset):
    make(model, DataLoader(dataset, batch_size=4))
    make(model, DataLoader(dataset, batch_size=5, drop_last=True))
    make(model, [dataset[:]])


def test_batch_norm_in_training_mode_sees_the_same_batches(model, dataset):
    make(nn.Sequential(model, nn.BatchNorm1d(3)), DataLoader(dataset, batch_size=4))


def test_dropout(model, dataset):
    network = nn.Sequential(model, nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match="model_func: not deterministic"):
        make(network, DataLoader(dataset, batch_size=4))
    make(network.eval(), DataLoader(dataset, batch_size=4))


def test_shuffled_data(model, dataset):
    with pytest.raises(RuntimeError, match="batches themselves changed"):
        make(model, DataLoader(dataset, batch_size=4, shuffle=True))


def test_shuffled_batches(model, dataset):
    batches = list(DataLoader(dataset, batch_size=2))

    class Rotating:
        start = 0

        def __iter__(self):
            self.start += 1
            return iter(batches[self.start :] + batches[: self.start])

    with pytest.raises(RuntimeError, match="order of the batches changed"):
        make(model, Rotating())


def test_order_within_a_batch(model, dataset):
    class Permuting:
        def __iter__(self):
            X, y = dataset[:]
            order = torch.randperm(len(X))
            return iter([(X[order], y[order])])

    with pytest.raises(RuntimeError, match="data: not deterministic"):
        make(model, Permuting())


def test_augmentation(model, dataset):
    class Noisy:
        def __iter__(self):
            X, y = dataset[:]
            return iter([(X + 0.1 * torch.randn_like(X), y)])

    with pytest.raises(RuntimeError, match="data: not deterministic"):
        make(model, Noisy())


@pytest.mark.parametrize("shuffle", [False, True])
def test_drop_last(model, dataset, shuffle):
    with pytest.raises(RuntimeError, match="drop_last=True leaves out 2 of 10 data"):
        make(model, DataLoader(dataset, batch_size=4, drop_last=True, shuffle=shuffle))


def test_drop_last_of_a_batch_sampler(model, dataset):
    batches = BatchSampler(SequentialSampler(dataset), 4, drop_last=True)
    with pytest.raises(RuntimeError, match="drop_last=True leaves out 2 of 10 data"):
        make(model, DataLoader(dataset, batch_sampler=batches))


def test_generator(model, dataset):
    with pytest.raises(RuntimeError, match="A generator can be read once only"):
        make(model, (batch for batch in [dataset[:]]))


def test_no_data(model):
    with pytest.raises(RuntimeError, match="no batches"):
        make(model, [])


def test_can_be_switched_off(model, dataset):
    network = nn.Sequential(model, nn.Dropout(0.5))
    args = network, nn.CrossEntropyLoss(), list(network.parameters()), [dataset[:]]
    kfacopt.GGNLinearOperator(*args, check_deterministic=False)


def test_progress_bar(model, dataset, capsys):
    args = model, nn.CrossEntropyLoss(), list(model.parameters()), [dataset[:]]
    kfacopt.EFLinearOperator(*args, progressbar=False) @ torch.ones(15)
    assert capsys.readouterr().err == ""
    kfacopt.EFLinearOperator(*args, progressbar=True) @ torch.ones(15)
    assert "EFLinearOperator" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["inputs", "targets"])
def test_small_entries_that_change_beside_large_ones(model, changed):
    X, y = torch.randn(10, 4).double(), torch.randn(10, 3).double()
    X[:, 0], y[0] = 1e6, 1e6
    data_model = model.double()

    class Noisy:
        def __iter__(self):
            noise = 1e-3 * torch.randn(2)
            x_noise, y_noise = noise * torch.tensor([changed == "inputs", changed == "targets"])
            return iter([(X + x_noise * (X < 1e3), y + y_noise * (y < 1e3))])

    params = list(data_model.parameters())
    with pytest.raises(RuntimeError, match="data: not deterministic"):
        kfacopt.GGNLinearOperator(data_model, nn.MSELoss(), params, Noisy())


def test_the_last_bits_of_float32_predictions_may_differ(model):
    class Rounding(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.layer, self.size = model, size

        def forward(self, X):
            z = self.layer(X)
            return z * (1 + self.size * torch.randn_like(z))

    data = [(torch.randn(10, 4), torch.randint(3, (10,)))]
    make(Rounding(1e-7), data)
    with pytest.raises(RuntimeError, match="model_func: not deterministic"):
        make(Rounding(1e-2), data)
