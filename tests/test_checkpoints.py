"""Checkpoint tools and files: what they carry is complete, what is broken is refused."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn import functional as F

from kfacopt import KFACOptimizer

X = torch.linspace(-2, 2, 48).reshape(8, 6).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2, 1, 1])
TIME_LIMIT = 120


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.norm(self.first(x).tanh()))


def train(model, optimizer, steps, start=0):
    for i in range(start, start + steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X * (1 + 0.1 * i)), LABELS).backward()
        optimizer.step()


def assert_equal_models(one, two):
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


# torch.distributed.checkpoint ---------------------------------------------------------------------

OPTIONS = {
    "mc": {},
    "type-2": {"fisher_type": "type-2"},
    "empirical": {"fisher_type": "empirical"},
    "exact": {"damping_method": "exact"},
    "ekfac": {"preconditioner": "ekfac"},
    "auto": {"lr": "auto"},
    "separate": {"separate_weight_and_bias": True, "max_factor_dim": 4},
}

# On disk or not, flattened or not, after so many steps: every pair of choices once.
CHECKPOINTS = {
    "memory-nested-before": (False, False, 0),
    "memory-flat-later": (False, True, 3),
    "disk-nested-later": (True, False, 3),
    "disk-flat-before": (True, True, 0),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # one process without a group
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by forward mode itself
@pytest.mark.parametrize(("disk", "flat", "before"), CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_distributed_checkpoints_into_a_fresh_optimizer(name, flat, disk, before, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    whole = Network()
    optimizer = KFACOptimizer(whole.parameters(), **OPTIONS[name])
    train(whole, optimizer, before)
    saved = copy.deepcopy(get_state_dict(whole, optimizer, options=options))
    if disk:
        dcp.save(dict(zip("mo", saved, strict=True)), checkpoint_id=tmp_path)
    train(whole, optimizer, 4, before)

    resumed = Network()
    optimizer = KFACOptimizer(resumed.parameters(), **OPTIONS[name])
    if disk:
        fresh = dict(zip("mo", get_state_dict(resumed, optimizer, options=options), strict=True))
        dcp.load(fresh, checkpoint_id=tmp_path)
        saved = fresh["m"], fresh["o"]
    set_state_dict(
        resumed,
        optimizer,
        model_state_dict=saved[0],
        optim_state_dict=saved[1],
        options=options,
    )
    train(resumed, optimizer, 4, before)
    assert_equal_models(whole, resumed)


FRESH_PROCESS = """
import sys
from test_checkpoints import *

options = StateDictOptions(flatten_optimizer_state_dict=True)
model = Network()
optimizer = KFACOptimizer(model.parameters())
state = dict(zip("mo", get_state_dict(model, optimizer, options=options), strict=True))
dcp.load(state, checkpoint_id=sys.argv[1])
set_state_dict(
    model, optimizer, model_state_dict=state["m"], optim_state_dict=state["o"], options=options
)
train(model, optimizer, 4, 3)
torch.save([p.detach() for p in model.parameters()], sys.argv[2])
"""


def in_process(script, *arguments, **options):
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), "."])}
    return subprocess.Popen(command, env=environment, **options)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_distributed_checkpoint_goes_on_in_a_fresh_process(tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = Network()
    optimizer = KFACOptimizer(model.parameters())
    train(model, optimizer, 3)
    saved = get_state_dict(model, optimizer, options=options)
    dcp.save(dict(zip("mo", saved, strict=True)), checkpoint_id=tmp_path / "checkpoint")
    train(model, optimizer, 4, 3)
    result = tmp_path / "params.pt"
    assert in_process(FRESH_PROCESS, tmp_path / "checkpoint", result).wait(TIME_LIMIT) == 0
    for p, q in zip(model.parameters(), torch.load(result), strict=True):
        assert torch.equal(p, q)


def test_the_step_of_a_checkpoint_tool_changes_nothing():
    untouched, model = Network(), Network()
    optimizer = KFACOptimizer(model.parameters())
    get_state_dict(model, optimizer)  # makes the state by a step with zero gradients and lr = 0
    assert optimizer.param_groups[0]["num_steps"] == 0
    with pytest.raises(KeyError, match="no step yet"):
        optimizer.factors("first")
    train(model, optimizer, 4)
    train(untouched, KFACOptimizer(untouched.parameters()), 4)
    assert_equal_models(model, untouched)


def test_a_first_step_of_a_warm_up_is_a_step():
    model = Network()
    optimizer = KFACOptimizer(model.parameters(), lr=0.0, momentum=0.0)
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["num_steps"] == 1
    assert optimizer.factors("first").input_factor.trace() > 0


def test_state_dict_before_and_between_steps_does_not_change_training():
    models = Network(), Network()
    optimizers = [KFACOptimizer(m.parameters()) for m in models]
    for i in range(4):
        optimizers[0].state_dict()
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, i)
    assert_equal_models(*models)


# Layers that come later ---------------------------------------------------------------------------


def unfreeze(model, optimizer):
    model.first.requires_grad_(True)


def add_group(model, optimizer):
    model.first.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 0.0})


@pytest.mark.parametrize("order", ["zero_grad first", "forward first"])
@pytest.mark.parametrize("how", [unfreeze, add_group])
@pytest.mark.parametrize("at", [10, 13], ids=["due", "between"])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_a_layer_that_comes_later_leaves_the_rest_unchanged(fisher_type, at, how, order):
    """Bit by bit: parameters, factors, inverses, momentum, labels drawn, number of steps."""
    models, optimizers = [Network(), Network()], []
    for model in models:
        model.first.requires_grad_(False)
        params = [p for n, p in model.named_parameters() if how is unfreeze or "first" not in n]
        # its gradient must not change the others' step by the clip they have in common
        options = {"kl_clip": None, "model": model, "fisher_type": fisher_type}
        optimizers.append(KFACOptimizer(params, **options))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, at)
    how(models[0], optimizers[0])
    for i in range(at, at + (8 if how is add_group else 1)):
        for model, optimizer in zip(models, optimizers, strict=True):
            if order == "zero_grad first":
                train(model, optimizer, 1, i)
            else:
                loss = F.cross_entropy(model(X * (1 + 0.1 * i)), LABELS)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for name in ("head", "norm"):
        pair = [model.get_submodule(name).parameters() for model in models]
        for p, q in zip(*pair, strict=True):
            assert torch.equal(p, q)
            one, two = (o.state_dict() for o in optimizers)
            states = [
                s["state"][[r is x for g in o.param_groups for x in g["params"]].index(True)]
                for s, o, r in zip((one, two), optimizers, (p, q), strict=True)
            ]
            assert states[0].keys() - {"generator_state"} == states[1].keys() - {"generator_state"}
            for key in states[1].keys() - {"generator_state"}:
                assert torch.equal(*(torch.as_tensor(s[key]) for s in states)), key
    steps = [o.param_groups[0]["num_steps"] for o in optimizers]
    assert steps[0] == steps[1]
    if how is add_group:
        assert optimizers[0].factors("first").input_factor.trace() > 0


@pytest.mark.parametrize("order", ["zero_grad first", "forward first"])
def test_a_weight_that_is_frozen_leaves_its_bias_a_block(order):
    model = Network()
    params = [p for name, p in model.named_parameters() if "unused" not in name]
    optimizer = KFACOptimizer(params, model=model)
    for i in range(9):
        if i == 5:
            model.first.weight.requires_grad_(False)
        loss = F.cross_entropy(model(X), LABELS) if order == "forward first" else None
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS) if loss is None else loss
        loss.backward()
        optimizer.step()
    assert optimizer.factors("first").input_factor.shape == (1, 1)
    assert optimizer.factors("first").grad_output_factor.trace() > 0


# Files --------------------------------------------------------------------------------------------

SAVING_FOREVER = """
import sys
from test_checkpoints import *

model = Network()
optimizer = KFACOptimizer(model.parameters())
path = sys.argv[1]
while True:
    train(model, optimizer, 1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path + ".tmp")
    os.replace(path + ".tmp", path)
"""


def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path):
    path, unfinished = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.pt.tmp"
    process = in_process(SAVING_FOREVER, path)
    try:
        deadline = time.monotonic() + TIME_LIMIT
        while not (path.exists() and unfinished.exists()):  # it is writing the next one
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(TIME_LIMIT)
    saved = torch.load(path, weights_only=True)
    model = Network()
    model.load_state_dict(saved["model"])
    optimizer = KFACOptimizer(model.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 2)


def trained():
    model = Network()
    optimizer = KFACOptimizer(model.parameters())
    train(model, optimizer, 2)
    return model, optimizer


def test_a_truncated_file_is_an_error(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(trained()[1].state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises((RuntimeError, OSError, EOFError, pickle.UnpicklingError)):  # torch's
            torch.load(path, weights_only=True)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_hostile_file_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = trained()[1].state_dict()
    state["state"][0]["input_factor"] = Hostile()
    torch.save(state, "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load("checkpoint.pt", weights_only=True)
    assert not Path("executed").exists()


def changed(**entries):
    def change(state):
        state["state"][0].update(entries)

    return change


BROKEN = {
    "list": (lambda s: [s], "must be what KFACOptimizer.state_dict.. returned.*got list"),
    "no groups": (
        lambda s: {"state": s["state"]},
        r"keys 'state' .a dict. and 'param_groups' .a list., got 'state' .dict.\.",
    ),
    "state": (lambda s: s | {"state": 3}, "must be what KFACOptimizer.state_dict"),
    "group": (lambda s: s | {"param_groups": [3]}, r"param_groups\[0\] must be a dict.*got int"),
    "steps": (lambda s: s["param_groups"][0].update(num_steps="1"), "num_steps must be .*got '1'"),
    "damping": (lambda s: s["param_groups"][0].update(damping=-1), "damping must be .*got -1"),
    "count": (lambda s: s["param_groups"][0].update(params=[0] * 7), "has 7 parameters.*has 8"),
    "text": (changed(input_factor="A"), "input_factor of 'first.weight' must .*got str"),
    "shape": (
        changed(input_inverse=torch.eye(3)),
        r"input_inverse of .* \(1, 7, 7\), got \(3, 3\)",
    ),
    "number": (changed(momentum_buffer=1.0), r"momentum_buffer of .* shape \(8, 6\), got float"),
    "records": (
        lambda s: s["state"][0].pop("factor_updates") and None,
        r"the state of 'first.weight' lacks \['factor_updates'\]",
    ),
    "nan": (
        changed(grad_output_factor=torch.full((1, 8, 8), torch.nan)),
        "grad_output_factor of 'first.weight' has NaN or infinite entries",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_named_and_changes_nothing(name):
    break_, message = BROKEN[name]
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    broken = break_(state) or state
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        for entry_name, value in entry.items():
            assert torch.equal(*map(torch.as_tensor, (value, after["state"][key][entry_name])))
    train(model, optimizer, 1)


def test_a_generator_of_another_device_is_logged(caplog):
    model, optimizer = trained()
    state = optimizer.state_dict()
    state["state"][0]["generator_state"] = torch.zeros(16, dtype=torch.uint8)  # a GPU's
    optimizer.load_state_dict(state)
    assert "labels are drawn from the seed instead" in caplog.text
    train(model, optimizer, 5)
