"""DistributedDataParallel on gloo: two ranks with half a batch each are one process with all."""

import datetime
import gc
import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacopt import KFACOptimizer

WORLD, STEPS, TIME_LIMIT = 2, 4, datetime.timedelta(seconds=60)
TOLERANCE = 1e-10
EVERY_STEP = {"factor_update_interval": 1, "inverse_update_interval": 1}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()


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


def run_rank(rank, folder, options, late):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIME_LIMIT
    )
    try:
        X, y = (part.chunk(WORLD)[rank] for part in batch())
        model = network()
        params = list(model.parameters())
        if late:
            wrap = DistributedDataParallel
            factors = train(model, params, X, y, options, wrap)
        else:
            wrapped = DistributedDataParallel(model)
            factors = train(wrapped, params, X, y, options)
        result = {"params": [p.detach() for p in params], "factors": list(factors)}
        torch.save(result, f"{folder}/rank{rank}.pt")
        dist.barrier()  # gloo aborts a rank that still talks to one that is gone
    finally:
        dist.destroy_process_group()


TYPE_2, EMPIRICAL = {"fisher_type": "type-2"}, {"fisher_type": "empirical"}
RUNS = {
    "type-2": (TYPE_2, False),
    "empirical": (EMPIRICAL, False),
    "wrapped-after-the-optimizer": (TYPE_2, True),
    "ekfac": (TYPE_2 | {"preconditioner": "ekfac"}, False),
    "self-tuning": (TYPE_2 | {"lr": "auto"}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "late"), RUNS.values(), ids=RUNS)
def test_two_ranks_are_one_process(options, late):
    model = network()
    params = list(model.parameters())
    expected = train(model, params, *batch(), options)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (folder, options, late), nprocs=WORLD)
        results = [torch.load(Path(folder) / f"rank{r}.pt") for r in range(WORLD)]
    for result in results:
        for got, want in zip(result["factors"], expected, strict=True):
            assert torch.allclose(got, want, atol=TOLERANCE)
        for got, want in zip(result["params"], params, strict=True):
            assert torch.allclose(got, want, atol=TOLERANCE)


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


def run_micro_batches(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIME_LIMIT
    )
    try:
        results = {kind: train_micro_batches(rank, kind) for kind in ("type-2", "empirical")}
        torch.save(results, f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_micro_batches_under_no_sync_are_one_batch_and_join_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_micro_batches, (folder,), nprocs=WORLD)
        results = [torch.load(Path(folder) / f"rank{r}.pt") for r in range(WORLD)]
    for fisher_type in ("type-2", "empirical"):
        model = network()
        expected_params = list(model.parameters())
        expected_factors = train(model, expected_params, *batch(), {"fisher_type": fisher_type})
        for result in results:
            params, factors = result[fisher_type]
            for got, want in zip(factors, expected_factors, strict=True):
                assert torch.allclose(got, want, atol=TOLERANCE)
            for got, want in zip(params, expected_params, strict=True):
                assert torch.allclose(got, want, atol=TOLERANCE)


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


WRAPPED_AT = {"again": (0, 2), "after the first step": (1,), "late and again": (1, 3)}


def run_wrapped_again(rank, folder, wrap_at):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=TIME_LIMIT
    )
    try:
        X, y = (part.chunk(WORLD)[rank] for part in batch())
        torch.save(train_wrapped_again(X, y, network(), wrap_at), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrap_at", WRAPPED_AT.values(), ids=WRAPPED_AT)
def test_a_wrapper_that_comes_later_is_found(wrap_at):
    expected = train_wrapped_again(*batch(), network(), ())
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_wrapped_again, (folder, wrap_at), nprocs=WORLD)
        results = [torch.load(Path(folder) / f"rank{r}.pt") for r in range(WORLD)]
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert torch.allclose(got, want, atol=TOLERANCE)


def test_sharded_parameters_are_refused():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = network()
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"a parameter is sharded \(FSDP, DTensor\)"):
            KFACOptimizer(model.parameters())
    finally:
        dist.destroy_process_group()
