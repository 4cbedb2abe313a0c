"""State: saved, loaded, copied and pickled, a run goes on as if nothing had happened."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

X = torch.linspace(-2, 2, 60).reshape(6, 10).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
INTERVALS = {"factor_update_interval": 2, "inverse_update_interval": 3}


KINDS = {
    "factored": {"damping_method": "factored"},
    "exact": {"damping_method": "exact"},
    "ekfac": {"preconditioner": "ekfac"},
    "low precision": {"factor_dtype": torch.bfloat16, "inverse_dtype": torch.bfloat16},
    "ekfac in low precision": {
        "preconditioner": "ekfac",
        "factor_dtype": torch.bfloat16,
        "inverse_dtype": torch.bfloat16,
    },
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(10, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def train(model, optimizer, steps, start=0):
    dtype = model[0].weight.dtype
    for i in range(start, start + steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X.to(dtype) * (1 + 0.1 * i)), LABELS).backward()
        optimizer.step()


def assert_equal_models(one, two):
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("before", [0, 3, 4])
def test_a_resumed_run_is_bit_exact(before, fisher_type, kind, dtype):
    options = {"fisher_type": fisher_type} | KINDS[kind] | INTERVALS
    whole = network(dtype)
    optimizer = KFACOptimizer(whole.parameters(), **options)
    train(whole, optimizer, before)
    saved = round_trip({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    train(whole, optimizer, 5, before)

    resumed = network(dtype)
    resumed.load_state_dict(saved["model"])
    optimizer = KFACOptimizer(resumed.parameters(), **options)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 5, before)
    assert_equal_models(whole, resumed)


def test_the_state_is_tensors_and_numbers_by_parameter():
    model = network()
    optimizer = KFACOptimizer(model.parameters())
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    for entry in state["state"].values():
        assert all(isinstance(v, torch.Tensor | int | float) for v in entry.values())


def test_factors_keep_their_dtype_in_bfloat16_models():
    model = network(torch.bfloat16)
    optimizer = KFACOptimizer(model.parameters())
    train(model, optimizer, 1)
    before = optimizer.factors("0").input_factor
    twin = network(torch.bfloat16)
    other = KFACOptimizer(twin.parameters())
    other.load_state_dict(optimizer.state_dict())
    after = other.factors("0").input_factor
    assert after.dtype == torch.float32
    assert torch.equal(after, before)
    assert not torch.equal(before, before.bfloat16().float())


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_go_on_training(how, order):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), **INTERVALS)
    train(model, optimizer, 3)
    pair = (model, optimizer) if order == "model first" else (optimizer, model)
    copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    twin, twin_optimizer = copied if order == "model first" else copied[::-1]
    assert twin[0].weight is not model[0].weight
    train(twin, twin_optimizer, 4, 3)
    untouched = network()
    train(untouched, KFACOptimizer(untouched.parameters(), **INTERVALS), 3)
    assert_equal_models(model, untouched)
    train(model, optimizer, 4, 3)
    assert_equal_models(model, twin)


def test_foreign_and_unfitting_states_are_refused():
    model = network()
    optimizer = KFACOptimizer(model.parameters())
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lacks .*not that of a KFACOptimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    train(model, optimizer, 1)
    twin = network()
    other = KFACOptimizer(twin.parameters(), separate_weight_and_bias=True)
    with pytest.raises(
        ValueError, match=r"input_factor of '0\.weight' must .*\(1, 10, 10\), got \(1, 11, 11\)"
    ):
        other.load_state_dict(optimizer.state_dict())


def test_gradient_clipping_does_not_touch_the_factors():
    models = [network(), network()]
    factors = []
    for model, clip in zip(models, (None, 1e-3), strict=True):
        optimizer = KFACOptimizer(model.parameters(), fisher_type="empirical")
        F.cross_entropy(model(X), LABELS).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        factors.append(optimizer.factors("0").grad_output_factor)
    assert torch.equal(*factors)


def test_a_parameter_has_the_momentum_or_the_previous_value_that_its_steps_read():
    entries = {0.05: {"momentum_buffer"}, "auto": {"previous_parameter", "has_previous_parameter"}}
    for lr, expected in entries.items():
        model = network()
        optimizer = KFACOptimizer(model.parameters(), lr=lr)
        train(model, optimizer, steps=2)
        optimizer.state_dict()
        for layer in (model[0], model[3]):
            for p in layer.parameters():
                names = optimizer.state[p].keys()
                assert {n for n in names if "momentum" in n or "previous" in n} == expected
