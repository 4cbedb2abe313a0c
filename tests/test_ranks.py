"""Two ranks on gloo: what wrappers, sharding and own averaging do to an optimizer.

One pair of processes meets all obligations (`rank_pair`); each reports what it got, or the error
that it raised.
"""

import contextlib
import copy
import functools
import re
import warnings

import pytest
import torch
from rank_pair import WORLD
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACOptimizer, KFACWarning
from kfacopt.linalg.kronecker import DecompositionError

pytestmark = pytest.mark.slow

STEPS = 4
TOLERANCE = 1e-10  # float64, a few steps with inverses of condition up to 1e3
INTERVALS = {"factor_update_interval": 1, "inverse_update_interval": 2}
SEEDS = 64


class Network(nn.Module):
    """Two layers, and one that is never used."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.kind = kind
        if kind == "unused layer":
            self.third = nn.Linear(3, 3)
        if kind == "embedding and norm":
            self.embedding, self.norm = nn.Embedding(2, 8), nn.LayerNorm(8)

    def forward(self, X, y=None):
        if self.kind == "checkpoint":
            h = checkpoint(lambda x: torch.tanh(self.first(x)), X, use_reentrant=False)
        else:
            h = torch.tanh(self.first(X))
        if self.kind == "embedding and norm":
            h = self.norm(h + self.embedding((X > 0).long()).sum(1))
        if self.kind == "tied":
            h = h + F.embedding((X > 0).sum(1).clamp(max=2), self.second.weight)
        z = self.second(h)
        if self.kind == "loss inside":
            return {"loss": F.cross_entropy(z, y)}
        return {"logits": z, "hidden": h} if self.kind == "dict" else z


def network(kind="plain"):
    torch.manual_seed(0)
    return Network(kind).double()


def data(size=32):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return X, torch.randint(3, (size,), generator=generator)


def chunk(parts, rank, ranks):
    return parts if ranks == 1 else [x.chunk(ranks)[rank] for x in parts]


def unsynced(called, step):
    """Averaging waits for the last micro-batch; static_graph fails so in the first step itself."""
    if isinstance(called, DistributedDataParallel) and (step > 0 or not called.static_graph):
        return called.no_sync()
    return contextlib.nullcontext()


def backward(called, kind, step, X, y):
    """One step's gradients; every kind is the mean loss over X."""
    if kind == "loss inside":
        called(X, y)["loss"].backward()
    elif kind == "dict":
        F.cross_entropy(called(X)["logits"], y).backward()
    elif kind == "two passes":
        z = torch.cat([called(part) for part in X.chunk(2)])
        F.cross_entropy(z.view(-1, 3), y).backward()
    elif kind == "micro-batches":
        first, last = zip(X.chunk(2), y.chunk(2), strict=True)
        for (x, t), context in ((first, unsynced(called, step)), (last, contextlib.nullcontext())):
            with context:
                (F.cross_entropy(called(x), t) / 2).backward()
    else:
        F.cross_entropy(called(X), y).backward()


def train(kind, options, wrap, early, rank=0, ranks=1):
    model = network(kind)
    called = wrap(model) if early else model
    optimizer = KFACOptimizer(model.parameters(), **INTERVALS, **options)
    if not early:
        called = wrap(model)
    for i in range(STEPS):
        optimizer.zero_grad()
        X, y = data()
        backward(called, kind, i, *chunk((X * (1 + i), y), rank, ranks))
        optimizer.step()
    return [p.detach() for p in model.parameters()]


TYPE_2 = {"fisher_type": "type-2"}
KINDS = {
    "plain": TYPE_2,
    "dict": TYPE_2,
    "loss inside": TYPE_2,
    "two passes": TYPE_2,
    "micro-batches": TYPE_2,
    "checkpoint": TYPE_2,
    "unused layer": TYPE_2,
    "embedding and norm": TYPE_2 | {"layers": [nn.Linear, nn.Embedding, nn.LayerNorm]},
    "tied": TYPE_2 | {"layers": [nn.Linear, nn.Embedding]},
    "empirical": {"fisher_type": "empirical"},
    "stated loss": TYPE_2 | {"loss_func": nn.CrossEntropyLoss()},
    "self-tuning": TYPE_2 | {"lr": "auto"},
}
UNUSED, STATIC = "find_unused_parameters", "static_graph"
# Whether the optimizer is made before the wrapper, or after.
ALL = [(option, order) for option in (UNUSED, STATIC) for order in ("before", "after")]
SOME = [(UNUSED, "before"), (STATIC, "after")]
WRAPPED = [
    (kind, *case)
    for kind in KINDS
    for case in (ALL if kind in ("plain", "two passes", "self-tuning") else SOME)
]


def unwrapped(module):
    return module


def wrapper(option, module):
    return DistributedDataParallel(module, **{option: True})


def wrapped_training(kind, option, order, rank):
    wrap = functools.partial(wrapper, option)
    return train(kind, KINDS[kind], wrap, order == "after", rank, WORLD)


# Labels ---------------------------------------------------------------------------------------


def grad_output_factors(wrap):
    """G of a first step over many seeds, every rank with the same data."""
    X, y = data(8)
    found = []
    for seed in range(SEEDS):
        model = network()
        called = wrap(model)
        optimizer = KFACOptimizer(model.parameters(), model=model, seed=seed)
        F.cross_entropy(called(X), y).backward()
        optimizer.step()
        found.append(optimizer.factors("second").grad_output_factor.flatten())
    return torch.stack(found)


def resumed(rank):
    """Parameters of a run, and of one that goes on from the first rank's file, both to the bit."""
    X, y = data()
    own = [x[:5] if rank == 0 else x[5:14] for x in (X, y)]
    options = INTERVALS | {"inverse_update_interval": 2, "factor_batch_fraction": 0.7}
    saved, results = None, []
    for begin in (0, 3):
        model = network()
        optimizer = KFACOptimizer(model.parameters(), **options)
        if saved is not None:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        called = DistributedDataParallel(model)
        for i in range(begin, 6):
            if i == 3 and saved is None:
                state = [copy.deepcopy((model.state_dict(), optimizer.state_dict()))]
                dist.broadcast_object_list(state)
                saved = state[0]
            optimizer.zero_grad()
            F.cross_entropy(called(own[0] * (1 + i)), own[1]).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    return results


# Refusals -------------------------------------------------------------------------------------


def zero_redundancy(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = DistributedDataParallel(network())
    ZeroRedundancyOptimizer(net.parameters(), KFACOptimizer, lr=0.07)


def one_step(model, optimizer):
    X, y = data()
    F.cross_entropy(model(X), y).backward()
    optimizer.step()


def fsdp1(rank, use_orig_params, late):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = network()
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if late:
            optimizer = KFACOptimizer(model.parameters())
        sharded = FullyShardedDataParallel(model, **options)
    if not late:
        optimizer = KFACOptimizer(sharded.parameters())
    one_step(sharded, optimizer)


def fully_shard_after(rank, part):
    from torch.distributed.fsdp import fully_shard

    model = network()
    optimizer = KFACOptimizer(model.parameters())
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    fully_shard(model.first if part else model, mesh=mesh)
    one_step(model, optimizer)


def pipeline(rank, late):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = (nn.Linear(4, 8), nn.Linear(8, 3))[rank].double()
    X, y = data()
    if late:
        optimizer = KFACOptimizer(stage.parameters())
    pipe = PipelineStage(stage, rank, WORLD, torch.device("cpu"))
    if not late:
        optimizer = KFACOptimizer(stage.parameters())
    schedule = ScheduleGPipe(pipe, 2, loss_fn=F.cross_entropy)
    schedule.step(X) if rank == 0 else schedule.step(target=y)
    optimizer.step()


def other_layers(rank):
    model = network()
    called = DistributedDataParallel(model)
    optimizer = KFACOptimizer((model.first, model.second)[rank].parameters())
    one_step(called, optimizer)


def other_steps(rank):
    model = network()
    called = DistributedDataParallel(model)
    optimizer = KFACOptimizer(model.parameters(), **INTERVALS)
    one_step(called, optimizer)
    saved = optimizer.state_dict()
    optimizer = KFACOptimizer(model.parameters(), **INTERVALS)
    if rank == 0:
        optimizer.load_state_dict(saved)
    one_step(called, optimizer)


def failing_inverse(rank):
    import kfacopt.optim.state.inverses as inverses

    def fails(*_):
        raise DecompositionError("as a test has it")

    model = network()
    called = DistributedDataParallel(model)
    optimizer = KFACOptimizer(model.parameters())
    original = inverses._factors  # no input makes a decomposition fail on one rank alone
    if rank == 1:
        inverses._factors = fails
    try:
        one_step(called, optimizer)
    finally:
        inverses._factors = original


SHARDED, LATE = r"a parameter is sharded \(FSDP", r"sharded after the optimizer was made"
REFUSALS = {
    "ZeroRedundancyOptimizer": (zero_redundancy, "ZeroRedundancyOptimizer.*on every rank"),
    "FSDP": (functools.partial(fsdp1, use_orig_params=False, late=False), SHARDED),
    "FSDP, use_orig_params": (functools.partial(fsdp1, use_orig_params=True, late=False), SHARDED),
    "FSDP late": (functools.partial(fsdp1, use_orig_params=False, late=True), "no longer in the"),
    "FSDP late, use_orig_params": (functools.partial(fsdp1, use_orig_params=True, late=True), LATE),
    "fully_shard late": (functools.partial(fully_shard_after, part=False), LATE),
    "fully_shard late, a part": (functools.partial(fully_shard_after, part=True), LATE),
    "pipeline": (functools.partial(pipeline, late=False), "pipelining.*DistributedDataParallel"),
    "pipeline late": (functools.partial(pipeline, late=True), "pipelining.*Distributed"),
    "other layers on a rank": (other_layers, "different layers or settings"),
    "a state on one rank": (other_steps, "from 1 to 2 steps|from 0 to 1 steps"),
    "an inverse that fails on one rank": (failing_inverse, "'module.first': (as a test|rank 1)"),
}


def refusal(name, rank):
    try:
        REFUSALS[name][0](rank)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "not refused"


# Without a wrapper ----------------------------------------------------------------------------


def averaged_after(model, X, y):
    F.cross_entropy(model(X), y).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= WORLD


def averaged_in_hooks(model, X, y):
    def average(p):
        dist.all_reduce(p.grad)
        p.grad /= WORLD

    handles = [p.register_post_accumulate_grad_hook(average) for p in model.parameters()]
    F.cross_entropy(model(X), y).backward()
    for handle in handles:
        handle.remove()


def replicas(model, X, y):
    loss = F.cross_entropy(model(X), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    if dist.is_initialized():
        dist.all_reduce(loss.detach().clone())  # to be logged


def plain_backward(model, X, y):
    F.cross_entropy(model(X), y).backward()


UNWRAPPED = {
    "averaged after the backward pass": (averaged_after, True),
    "averaged in hooks": (averaged_in_hooks, True),
    "replicas that log and clip": (replicas, False),
    "replicas": (plain_backward, False),
}


def without_wrapper(name, rank):
    X, y = chunk(data(), rank, WORLD)
    model = network()
    optimizer = KFACOptimizer(model.parameters(), **INTERVALS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            optimizer.zero_grad()
            UNWRAPPED[name][0](model, X, y)
            optimizer.step()
    told = [str(w.message) for w in caught if issubclass(w.category, KFACWarning)]
    return told, [p.detach() for p in model.parameters()]


# Round-off ------------------------------------------------------------------------------------


def rounded_otherwise(preconditioner, rank):
    """Parameters and state of ranks with other numbers of threads."""
    torch.set_num_threads(1 + rank)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
        options = INTERVALS | {"preconditioner": preconditioner}
        optimizer = KFACOptimizer(model.parameters(), **options)
        called = DistributedDataParallel(model)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(6):
            X = torch.randn(16, 200, generator=generator)
            y = torch.randint(10, (16,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(called(X), y).backward()
            optimizer.step()
    finally:
        torch.set_num_threads(1)
    state = optimizer.state_dict()["state"]
    return [p.detach() for p in model.parameters()], state


# The pair of processes ------------------------------------------------------------------------


def obligations(rank):
    for case in WRAPPED:
        yield ("wrapped", *case), functools.partial(wrapped_training, *case, rank)
    yield "labels", functools.partial(grad_output_factors, DistributedDataParallel)
    yield "resumed", functools.partial(resumed, rank)
    for name in UNWRAPPED:
        yield ("unwrapped", name), functools.partial(without_wrapper, name, rank)
    for kind in ("kfac", "ekfac"):
        yield ("rounded", kind), functools.partial(rounded_otherwise, kind, rank)
    for name in REFUSALS:
        yield ("refusal", name), functools.partial(refusal, name, rank)


@functools.cache
def single_process(kind):
    return train(kind, KINDS[kind], unwrapped, early=True)


@pytest.mark.parametrize(("kind", "option", "order"), WRAPPED)
def test_two_ranks_under_any_wrapper_are_one_process(ranks, kind, option, order):
    for result in (r["wrapped", kind, option, order] for r in ranks):
        assert not isinstance(result, str), result
        for got, want in zip(result, single_process(kind), strict=True):
            assert torch.allclose(got, want, atol=TOLERANCE)


def test_ranks_draw_labels_of_their_own(ranks):
    found = [r["labels"] for r in ranks]
    assert torch.equal(*found)
    ratio = grad_output_factors(unwrapped).var(0).sum() / found[0].var(0).sum()
    # A variance of n draws has the relative standard deviation sqrt(2 / (n - 1)), a ratio of two of
    # them sqrt(2) times that, at the most (entries average). Ranks with the same labels give 1.
    deviation = WORLD * 2 / (SEEDS - 1) ** 0.5
    assert abs(ratio - WORLD) < 2 * deviation
    assert ratio > 1 + deviation / 2


def test_a_run_that_is_resumed_from_one_ranks_state_is_bit_exact_with_unequal_batches(ranks):
    for whole, continued in (r["resumed"] for r in ranks):
        for got, want in zip(continued, whole, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_shared_out_over_ranks_is_refused_on_all_of_them(ranks, name):
    for message in (r["refusal", name] for r in ranks):
        assert re.search(REFUSALS[name][1], message), message


@pytest.mark.parametrize("name", UNWRAPPED)
def test_averaging_without_a_wrapper_is_noticed_and_replicas_are_left_alone(ranks, name):
    backward_pass, averaged = UNWRAPPED[name]
    for rank, (told, params) in enumerate(r["unwrapped", name] for r in ranks):
        assert len(told) == int(averaged), told
        if averaged:
            assert "averaged over ranks without a wrapper" in told[0]
            assert "Wrap the model in nn.parallel.DistributedDataParallel" in told[0]
            continue
        X, y = chunk(data(), rank, WORLD)
        model = network()
        optimizer = KFACOptimizer(model.parameters(), **INTERVALS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            backward_pass(model, X, y)
            optimizer.step()
        for got, want in zip(params, model.parameters(), strict=True):
            assert torch.allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_ranks_that_round_otherwise_hold_the_same(ranks, kind):
    (first, state), (second, other) = (r["rounded", kind] for r in ranks)
    for got, want in zip(second, first, strict=True):
        assert torch.equal(got, want)
    for key, entries in state.items():
        inverses = {n: v for n, v in entries.items() if n.endswith(("_inverse", "_basis"))}
        for name, value in inverses.items():
            assert torch.equal(value, other[key][name]), name
