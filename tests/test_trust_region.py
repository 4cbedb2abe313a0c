"""kl_clip="auto": κ follows what the loss of the same batch does on both sides of the step."""

import copy
import functools
import logging
import math
import warnings

import pytest
import torch
from rank_pair import WORLD
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacopt import KFACOptimizer
from kfacopt.optim.steps.trust_region import (
    FIRST_KL_CLIP,
    GOOD,
    GROWTH,
    LEAST_KL_CLIP,
    MOST_KL_CLIP,
    POOR,
)

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-9  # differences of losses of about 1 in float64, of steps of about 1e-2
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
TARGETS = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)


def mlp():
    torch.manual_seed(0)
    kind = {"dtype": torch.float64}  # on the ranks, too
    return nn.Sequential(nn.Linear(4, 5, **kind), nn.Tanh(), nn.Linear(5, 3, **kind))


def make(model, **options):
    """Make an optimizer that measures its first step, and each 40th after that."""
    return KFACOptimizer(model.parameters(), **({"fisher_type": "type-2"} | options))


def cross_entropy(model):
    return F.cross_entropy(model(X), LABELS)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fill(model, vector):
    nn.utils.vector_to_parameters(vector.clone(), model.parameters())


def step(model, optimizer, loss_of=cross_entropy, change=lambda _: None):
    """Take a step, after a change of the gradients; return its direction d."""
    before = flat(model)
    optimizer.zero_grad()
    loss_of(model).backward()
    change(model)
    optimizer.step()
    return flat(model) - before


def kl_clip(optimizer):
    (value,) = {group["trust_region"] for group in optimizer.param_groups}
    assert value == optimizer.statistics()["trust_region"]
    return value


def with_kl_clip(optimizer, value):
    for group in optimizer.param_groups:
        group["trust_region"] = value
    return optimizer


def measured(optimizer):
    found = optimizer.statistics()
    return [found[name] for name in ("gain_ratio", "slope", "change")]


def dense(model, theta, d, loss_of=cross_entropy):
    """Return ρ, s and L(θ + d) − L(θ) from plain evaluations."""
    twin = copy.deepcopy(model)
    values = []
    for point in (theta, theta + d, theta - d):
        fill(twin, point)
        with torch.no_grad():
            values.append(loss_of(twin).item())
    here, there, back = values
    slope = (there - back) / 2
    return [(there - here) / slope, slope, there - here]


def close(found, expected):
    return all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(found, expected, strict=True))


# The rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e-6, 1e-2, 10.0])
def test_the_measurement_is_that_of_the_losses_on_both_sides_of_the_step(clip):
    model = mlp()
    theta, optimizer = flat(model), with_kl_clip(make(model), clip)
    d = step(model, optimizer)
    assert close(measured(optimizer), dense(model, theta, d))


def test_of_a_quadratic_it_is_slope_and_curvature():
    """s = ⟨∇, d⟩ and ρ = 1 + dᵀHd / (2 s)."""
    model = nn.Linear(4, 3)
    theta, optimizer = flat(model), with_kl_clip(make(model), 0.1)

    def loss(vector):
        return F.mse_loss(F.linear(X, vector[:12].reshape(3, 4), vector[12:]), TARGETS)

    gradient, H = torch.func.grad(loss)(theta), torch.autograd.functional.hessian(loss, theta)
    d = step(model, optimizer, lambda m: F.mse_loss(m(X), TARGETS))
    slope, curvature = (gradient @ d).item(), (d @ H @ d).item()
    assert close(measured(optimizer)[:2], [1 + curvature / (2 * slope), slope])


# Of a step that goes u times as far as the minimum, ρ = 1 − u / 2.
QUADRATIC_TOLERANCE = 1e-6  # the damping of 1e-12 beside eigenvalues of about 0.1
SHARES = {"short": (0.4, GROWTH), "whole": (1.0, 1.0), "far": (1.6, 1 / GROWTH), "up": (2.4, 0.5)}


@pytest.mark.parametrize("name", SHARES)
def test_the_ratio_of_a_quadratic_tells_how_far_the_step_goes(name):
    """K-FAC's curvature of one linear layer with a square loss is exact."""
    share, change = SHARES[name]
    torch.manual_seed(0)
    inputs, model = torch.randn(12, 4), nn.Linear(4, 3)
    targets = model(inputs).detach() + 1e-3 * torch.randn(12, 3)  # so near that nothing is clipped
    options = {"momentum": 0.0, "damping": 1e-12, "damping_method": "exact"}
    optimizer = make(model, lr=share, **options)
    step(model, optimizer, lambda m: F.mse_loss(m(inputs), targets))
    found = optimizer.statistics()
    assert found["kl_clip_scale"] == 1
    assert abs(found["gain_ratio"] - (1 - share / 2)) < QUADRATIC_TOLERANCE
    assert (1 - share / 2 > GOOD) is (change > 1)
    assert (1 - share / 2 < POOR) is (change < 1)
    assert kl_clip(optimizer) == change * FIRST_KL_CLIP


def test_kl_clip_has_a_floor_and_a_cap():
    model = mlp()
    optimizer = with_kl_clip(make(model), 0.9 * MOST_KL_CLIP)
    step(model, optimizer)
    assert optimizer.statistics()["gain_ratio"] > GOOD
    assert kl_clip(optimizer) == MOST_KL_CLIP
    model = mlp()
    optimizer = with_kl_clip(make(model), 1.1 * LEAST_KL_CLIP)
    step(model, optimizer, change=lambda m: [p.grad.neg_() for p in m.parameters()])
    assert optimizer.statistics()["slope"] > 0
    assert kl_clip(optimizer) == LEAST_KL_CLIP


def test_maximising_is_minimising_the_opposite():
    runs = []
    for sign in (1, -1):
        model = mlp()
        optimizer = make(model, maximize=sign < 0)
        step(model, optimizer, lambda m, sign=sign: sign * cross_entropy(m))
        ratio, slope, change = measured(optimizer)
        runs.append((kl_clip(optimizer), ratio, sign * slope, sign * change))
    assert runs[0] == runs[1]
    assert runs[0][0] == GROWTH * FIRST_KL_CLIP


def test_groups_that_maximise_what_others_minimise_are_not_measured(caplog):
    model = mlp()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "maximize": True},
    ]
    optimizer = KFACOptimizer(groups)
    with caplog.at_level(logging.INFO, logger="kfacopt"):
        step(model, optimizer)
    assert any("some groups maximise" in record.message for record in caplog.records)
    assert kl_clip(optimizer) == FIRST_KL_CLIP


def test_one_step_in_forty_is_measured():
    model = mlp()
    optimizer = make(model, factor_update_interval=7)
    found = []
    for _ in range(75):
        before = measured(optimizer)
        step(model, optimizer)
        found.append(measured(optimizer) != before)
    assert [i for i, new in enumerate(found) if new] == [0, 35, 70]


class CountingLinear(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


@pytest.mark.parametrize(("clip", "passes"), [("auto", 3), (1e-4, 0), (None, 0)])
def test_numbers_and_none_switch_it_off(clip, passes):
    model = nn.Sequential(CountingLinear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = make(model, kl_clip=clip)
    CountingLinear.calls = 0
    step(model, optimizer)
    assert CountingLinear.calls == 1 + passes
    assert ("trust_region" in optimizer.statistics()) is (clip == "auto")
    assert all(group["trust_region"] == FIRST_KL_CLIP for group in optimizer.param_groups) is (
        clip != "auto"
    )


def test_a_stated_loss_leaves_it_as_it_is():
    model = mlp()
    optimizer = make(model, loss_func=nn.CrossEntropyLoss())
    step(model, optimizer)
    assert kl_clip(optimizer) == FIRST_KL_CLIP
    assert math.isnan(optimizer.statistics()["gain_ratio"])


# No trace ----------------------------------------------------------------------------------------


def with_dropout():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)]
    return nn.Sequential(*layers)


def test_buffers_and_random_numbers_are_those_of_a_run_without():
    runs = []
    for clip in ("auto", FIRST_KL_CLIP):
        model = with_dropout()
        optimizer = make(model, kl_clip=clip)
        torch.manual_seed(1)
        step(model, optimizer)
        runs.append((flat(model), *model.buffers(), torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("options", [{}, {"lr": "auto"}], ids=["measured", "self-tuned"])
def test_a_module_with_two_names_keeps_its_parameters(options):
    """What takes their place for an evaluation was put back under the first name alone."""
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3))
    before = [*model.parameters(), *model.buffers()]
    optimizer = make(model, **options)
    step(model, optimizer)
    assert all(a is b for a, b in zip(before, [*model.parameters(), *model.buffers()], strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_masks_are_those_of_the_step():
    model = with_dropout()
    optimizer, theta = make(model, fallback_lr=0.0), flat(model)
    torch.manual_seed(1)
    d = step(model, optimizer)

    def same_masks(m):
        torch.manual_seed(1)
        return cross_entropy(m)

    assert close(measured(optimizer), dense(model, theta, d, same_masks))


def test_a_clipped_gradient_is_judged_by_the_losses_alone():
    """The KL clip makes the step as long, and the gradient is not in the measurement."""
    runs = []
    for largest in (1e9, 0.1):
        model = mlp()
        optimizer, norms = with_kl_clip(make(model), 1e-7), []
        clip = functools.partial(nn.utils.clip_grad_norm_, max_norm=largest)
        step(
            model, optimizer, change=lambda m, clip=clip, to=norms: to.append(clip(m.parameters()))
        )
        assert norms[0] > 0.2
        assert optimizer.statistics()["kl_clip_scale"] < 1
        assert kl_clip(optimizer) == GROWTH * 1e-7
        runs.append(measured(optimizer))
    assert close(*runs)


def test_micro_batches_are_one_batch():
    def accumulated(m):
        halves = zip(X.chunk(2), LABELS.chunk(2), strict=True)
        losses = [F.cross_entropy(m(x), y) / 2 for x, y in halves]
        losses[0].backward()
        return losses[1]

    whole, parts = mlp(), mlp()
    one, other = make(whole), make(parts)
    step(whole, one)
    step(parts, other, accumulated)
    assert close(measured(other), measured(one))
    assert kl_clip(other) == kl_clip(one)


def test_a_loss_scale_cancels():
    plain, scaled = mlp(), mlp()
    one, other = make(plain), make(scaled)
    step(plain, one)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(cross_entropy(scaled)).backward()
    scaler.step(other)
    assert close(measured(other), measured(one))
    assert kl_clip(other) == GROWTH * FIRST_KL_CLIP


@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_a_skipped_step_is_not_measured():
    model = mlp()
    optimizer = make(model)
    step(model, optimizer, change=lambda m: m[0].weight.grad.fill_(math.nan))
    assert optimizer.statistics()["skipped_steps"] == 1
    assert math.isnan(optimizer.statistics()["gain_ratio"])
    assert kl_clip(optimizer) == FIRST_KL_CLIP
    step(model, optimizer)
    assert kl_clip(optimizer) == GROWTH * FIRST_KL_CLIP


def test_a_loss_that_is_not_finite_at_the_end_of_the_step_halves_it():
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = with_kl_clip(make(model), 10.0)

    def walled(m):
        z = m(X)
        return F.mse_loss(z, TARGETS) + 0 * (0.01 + bound - z.sum()).log()

    bound = model(X).sum().item()
    step(model, optimizer, walled)
    assert bound < model(X).sum().item() - 0.01  # past the wall
    assert kl_clip(optimizer) == MOST_KL_CLIP  # half of 10, and the cap
    assert math.isnan(optimizer.statistics()["change"])


def test_under_autocast_it_is_measured():
    model = mlp().float()
    optimizer = make(model)

    def loss_of(m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(m(X.float()), LABELS)

    step(model, optimizer, loss_of)
    assert optimizer.statistics()["gain_ratio"] > GOOD
    assert kl_clip(optimizer) == GROWTH * FIRST_KL_CLIP


# Schedules, states -------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 3.0])
def test_what_a_schedule_makes_of_the_rate_is_undone(share):
    model = mlp()
    theta, optimizer = flat(model), make(model)
    optimizer.param_groups[0]["lr"] *= share
    d = step(model, optimizer) / share
    assert close(measured(optimizer), dense(model, theta, d))


@pytest.mark.parametrize("share", [0.0, 1e-3])
def test_a_step_that_a_schedule_made_tiny_is_not_measured(share):
    model = mlp()
    optimizer = make(model)
    optimizer.param_groups[0]["lr"] *= share
    step(model, optimizer)
    assert math.isnan(optimizer.statistics()["gain_ratio"])
    assert kl_clip(optimizer) == FIRST_KL_CLIP


def test_a_resumed_run_goes_on_bit_by_bit():
    model = mlp()
    optimizer = make(model)
    for _ in range(20):
        step(model, optimizer)
    resumed = copy.deepcopy(model)
    other = make(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert kl_clip(other) == kl_clip(optimizer) == GROWTH * FIRST_KL_CLIP
    first = measured(optimizer)
    for _ in range(25):  # the 41st is measured
        step(model, optimizer)
        step(resumed, other)
    assert measured(optimizer) != first
    assert torch.equal(flat(resumed), flat(model))
    assert (kl_clip(other), measured(other)) == (kl_clip(optimizer), measured(optimizer))


def test_new_groups_have_the_clip_of_the_others():
    model = mlp()
    optimizer = make(model[0])
    step(model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert kl_clip(optimizer) == GROWTH * FIRST_KL_CLIP


# What cannot be measured -------------------------------------------------------------------------


class OwnRandomNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.layer(x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype))


def test_what_cannot_be_measured_is_logged_once_and_leaves_the_clip(caplog):
    model = OwnRandomNumbers()
    optimizer = make(model)
    with caplog.at_level(logging.INFO, logger="kfacopt"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(41):
            step(model, optimizer)
    told = [record for record in caplog.records if "cannot be measured" in record.message]
    assert len(told) == 1
    assert "the same batch gave outputs that differ" in told[0].message
    assert kl_clip(optimizer) == FIRST_KL_CLIP


# Two ranks ---------------------------------------------------------------------------------------


def trained(model, data):
    """Take 41 steps, so that two are measured; return κ, ρ, s, the change, and the parameters."""
    optimizer = make(model)
    for _ in range(41):
        step(model, optimizer, lambda m: F.cross_entropy(m(data[0]), data[1]))
    return kl_clip(optimizer), measured(optimizer), flat(model)


def on_a_rank(rank):
    data = (X.chunk(WORLD)[rank], LABELS.chunk(WORLD)[rank])
    return trained(DistributedDataParallel(mlp()), data)


def failing_on_one_rank(rank):
    model = OwnRandomNumbers()
    if rank == 0:
        model.generator = None
    wrapped = DistributedDataParallel(model)
    optimizer = make(model)
    step(wrapped, optimizer, lambda m: F.cross_entropy(m(X), LABELS))
    assert dist.get_world_size() == WORLD
    return kl_clip(optimizer)


def obligations(rank):
    yield "trained", lambda: on_a_rank(rank)
    yield "failing on one", lambda: failing_on_one_rank(rank)


@pytest.mark.slow
def test_ranks_have_the_clip_of_one_process(ranks):
    found = [results["trained"] for results in ranks]
    clip, numbers, params = trained(mlp(), (X, LABELS))
    for other_clip, others, other_params in found:
        assert other_clip == clip
        assert close(others, numbers)
        assert torch.allclose(other_params, params, atol=1e-8)
    assert found[0][:2] == found[1][:2]


@pytest.mark.slow
def test_what_fails_on_one_rank_leaves_the_clip_of_all(ranks):
    clips = [results["failing on one"] for results in ranks]
    assert clips == [FIRST_KL_CLIP] * WORLD
