"""optimizer.statistics(): plain numbers for logging, beside an oracle, and free when not called."""

import math

import pytest
import torch
from test_faults import LABELS, X, network, step
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kfacopt import KFACOptimizer
from kfacopt.optim.state import inverses, running_averages

pytestmark = pytest.mark.usefixtures("float64")


def damped_condition(A, G, damping, method):
    if method == "exact":
        values = torch.linalg.eigvalsh(torch.kron(G, A)).clamp(min=0) + damping
        return float(values.max() / values.min())
    pi = float(((A.trace() / len(A)) / (G.trace() / len(G))).sqrt())
    a = torch.linalg.eigvalsh(A) + pi * damping**0.5
    g = torch.linalg.eigvalsh(G) + damping**0.5 / pi
    return float(a.max() / a.min() * g.max() / g.min())


@pytest.mark.parametrize("method", ["factored", "exact"])
def test_conditions_dampings_and_ages(method):
    model = network()
    head = {"params": list(model[3].parameters()), "damping": 0.5}
    body = {"params": [*model[0].parameters(), *model[2].parameters()]}
    optimizer = KFACOptimizer(
        [body, head],
        damping=0.1,
        damping_method=method,
        factor_update_interval=2,
        inverse_update_interval=4,
    )
    names = [f"{layer}/{key}" for layer in ("0", "3") for key in ("factor_age", "inverse_age")]
    assert all(math.isnan(optimizer.statistics()[name]) for name in names)
    ages, factors = [], None
    for i in range(8):
        step(model, optimizer)
        if i == 4:
            factors = {name: [f.clone() for f in optimizer.factors(name)] for name in ("0", "3")}
        ages.append([optimizer.statistics()[name] for name in names])
    assert ages == [[i % 2, i % 4] * 2 for i in range(8)]
    statistics = optimizer.statistics()
    for name, damping in (("0", 0.1), ("3", 0.5)):
        assert statistics[f"{name}/damping"] == damping
        expected = damped_condition(*factors[name], damping, method)
        assert statistics[f"{name}/condition"] == pytest.approx(expected, rel=1e-6)
        assert statistics[f"{name}/skipped_factor_updates"] == 0
        assert statistics[f"{name}/inverse_failures"] == 0
    assert statistics["fallback_parameters"] == 2  # those of the norm
    assert all(type(value) is float for value in statistics.values())


def test_the_condition_of_ekfac_is_that_of_its_second_moments():
    model = network()
    optimizer = KFACOptimizer(model.parameters(), preconditioner="ekfac", damping=0.1)
    step(model, optimizer)
    moments = optimizer.state[model[0].weight]["second_moments"] + 0.1
    condition = optimizer.statistics()["0/condition"]
    assert condition == pytest.approx(float(moments.max() / moments.min()))


def test_the_clip_that_was_applied():
    """Without momentum and decay the step is the clipped direction."""
    model, plain = network(), network()
    options = {"momentum": 0.0, "lr": 0.5}
    optimizer = KFACOptimizer(model.parameters(), kl_clip=1e-3, **options)
    unclipped = KFACOptimizer(plain.parameters(), kl_clip=None, **options)
    before = model[0].weight.detach().clone()
    for m, o in ((model, optimizer), (plain, unclipped)):
        step(m, o)
    scale = optimizer.statistics()["kl_clip_scale"]
    assert scale < 1
    assert torch.allclose(model[0].weight - before, scale * (plain[0].weight - before), atol=1e-12)
    assert unclipped.statistics()["kl_clip_scale"] == 1.0


def test_blocks_of_their_own_are_named_by_parameter():
    model = network()
    optimizer = KFACOptimizer(model.parameters(), separate_weight_and_bias=True)
    step(model, optimizer)
    statistics = optimizer.statistics()
    assert {"0.weight/condition", "0.bias/condition"} <= statistics.keys()
    assert "0/condition" not in statistics


class HostReads(TorchDispatchMode):
    """Counts how often the device is asked for a number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("depth", [1, 6])
def test_a_step_asks_the_device_once(depth, preconditioner, monkeypatch):
    """On all steps but those that compute EKFAC's bases, which are checked one by one.

    That K-FAC's inverses are finite is asked for all at once (by `tolist`, which does not count).
    """
    for module in (running_averages, inverses):
        monkeypatch.setattr(module, "is_free_to_read", lambda value: False)  # as a GPU's
    layers = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(4, 3))  # AdamW reads its step counters on the CPU
    optimizer = KFACOptimizer(
        model.parameters(),
        preconditioner=preconditioner,
        factor_update_interval=2,
        inverse_update_interval=10,
    )
    counts = []
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        with HostReads() as reads:
            optimizer.step()
        counts.append(reads.count)
    assert counts[1:] == [1] * 5
    assert counts[0] == 1 if preconditioner == "kfac" else counts[0] > 1
