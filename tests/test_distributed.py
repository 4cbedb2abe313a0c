"""DistributedDataParallel on gloo: two ranks with half a batch each are one process with all."""

import functools
import gc

import pytest
import torch
from rank_pair import WORLD
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.slow

STEPS = 4
TOLERANCE = 1e-10  # float64, a few steps with inverses of condition up to 1e3
EVERY_STEP = {"factor_update_interval": 1, "inverse_update_interval": 1}


def network(options=()):
    torch.manual_seed(0)
    width = 16 if "wide_factor" in options else 8
    layers = [nn.Linear(4, width), nn.ReLU(inplace=True), nn.Linear(width, 3)]
    if "conv_factor" in options:
        layers = [nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 4, 2, padding=1), nn.Flatten(), layers[1]]
        layers.append(nn.Linear(12, 3))
    return nn.Sequential(*layers).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(32, 4, generator=generator, dtype=torch.float64)
    return X, torch.randint(3, (32,), generator=generator)


def train(model, params, X, y, options, wrap_late=None):
    intervals = {"factor_update_interval": 1, "inverse_update_interval": 2}
    optimizer = KFACOptimizer(params, **intervals, **options)
    if wrap_late is not None:
        model = wrap_late(model)
    for i in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(X * (1 + i)), y).backward()
        optimizer.step()
    return optimizer.factors("0.weight" if wrap_late is not None else next(iter(params)))


def wrapped_training(rank, options, late):
    X, y = (part.chunk(WORLD)[rank] for part in batch())
    model = network(options)
    params = list(model.parameters())
    if late:
        factors = train(model, params, X, y, options, DistributedDataParallel)
    else:
        factors = train(DistributedDataParallel(model), params, X, y, options)
    return [p.detach() for p in params], list(factors)


TYPE_2, EMPIRICAL = {"fisher_type": "type-2"}, {"fisher_type": "empirical"}
RUNS = {
    "type-2": (TYPE_2, False),
    "empirical": (EMPIRICAL, False),
    "wrapped-after-the-optimizer": (TYPE_2, True),
    "ekfac": (TYPE_2 | {"preconditioner": "ekfac"}, False),
    "self-tuning": (TYPE_2 | {"lr": "auto"}, False),
    "split": (TYPE_2 | {"conv_factor": "channels"}, False),
    "low rank": (TYPE_2 | {"wide_factor": "low_rank"}, False),
    "split, ekfac": (TYPE_2 | {"conv_factor": "channels", "preconditioner": "ekfac"}, False),
}


def train_micro_batches(rank, fisher_type):
    X, y = (part.chunk(WORLD)[rank] for part in batch())
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = KFACOptimizer(
        model.parameters(),
        fisher_type=fisher_type,
        factor_update_interval=1,
        inverse_update_interval=2,
    )
    for i in range(STEPS):
        optimizer.zero_grad()
        halves = list(zip((X * (1 + i)).chunk(2), y.chunk(2), strict=True))
        with wrapped.no_sync():
            (F.cross_entropy(wrapped(halves[0][0]), halves[0][1]) / 2).backward()
        (F.cross_entropy(wrapped(halves[1][0]), halves[1][1]) / 2).backward()
        optimizer.step()
    result = (
        [p.detach().clone() for p in model.parameters()],
        list(optimizer.factors(model[0].weight)),
    )
    optimizer.zero_grad()
    with wrapped.join():
        F.cross_entropy(wrapped(X), y).backward()
        with pytest.raises(RuntimeError, match=r"join\(\).*drop_last=True"):
            optimizer.step()
    return result


def train_wrapped_again(X, y, model, wrap_at):
    optimizer = KFACOptimizer(model.parameters(), fisher_type="type-2", **EVERY_STEP)
    called = model
    for i in range(STEPS):
        if i in wrap_at:
            called = None
            gc.collect()
            called = DistributedDataParallel(model)
        optimizer.zero_grad()
        loss = F.cross_entropy(called(X * (1 + i)), y)
        if called is model:  # nothing to average yet: all ranks have the same data
            full_X, full_y = batch()
            loss = F.cross_entropy(called(full_X * (1 + i)), full_y)
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def wrapped_again(rank, wrap_at):
    X, y = (part.chunk(WORLD)[rank] for part in batch())
    return train_wrapped_again(X, y, network(), wrap_at)


WRAPPED_AT = {"again": (0, 2), "after the first step": (1,), "late and again": (1, 3)}


def sharded(rank):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(ValueError, match="sharded") as refused:
        KFACOptimizer(model.parameters())
    return str(refused.value)


def obligations(rank):
    for name, run in RUNS.items():
        yield ("run", name), functools.partial(wrapped_training, rank, *run)
    for fisher_type in ("type-2", "empirical"):
        yield (
            ("micro-batches", fisher_type),
            functools.partial(train_micro_batches, rank, fisher_type),
        )
    for name, wrap_at in WRAPPED_AT.items():
        yield ("wrapped", name), functools.partial(wrapped_again, rank, wrap_at)
    yield "sharded", functools.partial(sharded, rank)


def assert_same(result, expected):
    assert not isinstance(result, str), result
    for tensors, wanted in zip(result, expected, strict=True):
        for got, want in zip(tensors, wanted, strict=True):
            assert torch.allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_process(ranks, name):
    model = network(RUNS[name][0])
    params = list(model.parameters())
    expected = train(model, params, *batch(), RUNS[name][0])
    for result in (r["run", name] for r in ranks):
        assert_same(result, (params, expected))


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_micro_batches_under_no_sync_are_one_batch_and_join_is_refused(ranks, fisher_type):
    model = network()
    params = list(model.parameters())
    expected = train(model, params, *batch(), {"fisher_type": fisher_type})
    for result in (r["micro-batches", fisher_type] for r in ranks):
        assert_same(result, (params, expected))


@pytest.mark.parametrize("name", WRAPPED_AT)
def test_a_wrapper_that_comes_later_is_found(ranks, name):
    expected = train_wrapped_again(*batch(), network(), ())
    for result in (r["wrapped", name] for r in ranks):
        assert not isinstance(result, str), result
        assert_same([result], [expected])


def test_sharded_parameters_are_refused(ranks):
    for message in (r["sharded"] for r in ranks):
        assert "a parameter is sharded (FSDP, DTensor)" in message
