"""What KFACOptimizer does with a gradient: the pin to the operator, averages, rules, arguments."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import EKFACLinearOperator, KFACLinearOperator, KFACOptimizer, KFACWarning
from kfacopt.linalg import kronecker
from kfacopt.linalg.kronecker import DecompositionError
from kfacopt.optim.state import inverses, running_averages
from kfacopt.optim.steps.kl_clip import kl_clip_scale
from kfacopt.optim.steps.update import DECAY_PER_LR

pytestmark = pytest.mark.usefixtures("float64")

RELATIVE_TOLERANCE = 1e-11
# One step, exactly: no memory, no momentum, no decay, no clip.
PLAIN = {
    "lr": 1.0,
    "momentum": 0.0,
    "ema_decay": 0.0,
    "kl_clip": None,
    "factor_update_interval": 1,
    "inverse_update_interval": 1,
}
X = torch.linspace(-2, 2, 60, dtype=torch.float64).reshape(6, 10).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])


def network():
    return nn.Sequential(
        nn.Unflatten(1, (2, 5, 1)),
        nn.Conv2d(2, 4, (3, 1), padding=(1, 0), groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(20, 4),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def gradients(model, loss):
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(tensors, expected):
    scale = max(float(e.abs().max()) for e in expected)
    for t, e in zip(tensors, expected, strict=True):
        assert torch.allclose(t, e, rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE * scale)


COMBINATIONS = list(
    itertools.product(
        ["mc", "type-2", "empirical"],
        ["expand", "reduce"],
        [True, False],
        ["factored", "exact", "ekfac"],
        ["mean", "sum"],
    )
)


@pytest.mark.parametrize(
    ("fisher_type", "approx", "separate", "method", "reduction"),
    COMBINATIONS,
    ids=["-".join(map(str, c)) for c in COMBINATIONS],
)
def test_a_step_is_minus_inverse_times_gradient(fisher_type, approx, separate, method, reduction):
    model, damping = network(), 1e-2
    params = list(model.parameters())
    shared = {
        "fisher_type": fisher_type,
        "kfac_approx": approx,
        "separate_weight_and_bias": separate,
    }
    corrected = method == "ekfac"
    kind = {"preconditioner": "ekfac"} if corrected else {"damping_method": method}
    optimizer = KFACOptimizer(params, **PLAIN, **shared, **kind, damping=damping, model=model)
    average = "batch" if reduction == "mean" else None
    loss = nn.CrossEntropyLoss(reduction=reduction)
    operator = EKFACLinearOperator if corrected else KFACLinearOperator
    fisher = operator(model, loss, params, [(X, LABELS)], **shared, loss_average=average)
    before = [p.detach().clone() for p in params]
    grads = gradients(model, F.cross_entropy(model(X), LABELS, reduction=reduction))
    expected = fisher.inverse(damping, method="exact" if corrected else method) @ grads
    optimizer.step()
    assert_same([b - p for b, p in zip(before, params, strict=True)], expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_damping_means_the_same_at_every_batch_size(reduction):
    """Repeating the data leaves the factors of a mean, and scales G of a sum, by the repetition."""
    model = network()
    factors = []
    for repeat in (1, 3):
        optimizer = KFACOptimizer(model.parameters(), **(PLAIN | {"lr": 0.0}), fisher_type="type-2")
        X_r, y_r = X.repeat(repeat, 1), LABELS.repeat(repeat)
        F.cross_entropy(model(X_r), y_r, reduction=reduction).backward()
        optimizer.step()
        factors.append(optimizer.factors("4"))
    once, thrice = factors
    scale = 1 if reduction == "mean" else 3
    assert torch.allclose(thrice.input_factor, once.input_factor)
    assert torch.allclose(thrice.grad_output_factor, scale * once.grad_output_factor)


def test_running_averages_are_bias_corrected_and_weighted_by_terms():
    model, decay = network(), 0.8
    optimizer = KFACOptimizer(
        model.parameters(), **(PLAIN | {"lr": 0.0, "ema_decay": decay}), fisher_type="type-2"
    )
    sizes, values = (6, 4, 1), []
    for size in sizes:
        data = [(X[:size], LABELS[:size])]
        F.cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
        operator = KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            data,
            fisher_type="type-2",
            separate_weight_and_bias=False,
        )
        values.append(operator.factors("6"))
    weights = torch.tensor([s * decay ** (len(sizes) - 1 - i) for i, s in enumerate(sizes)])
    weights = (weights / weights.sum()).to(torch.float64)
    for side in ("input_factor", "grad_output_factor"):
        expected = sum(w * getattr(v, side) for w, v in zip(weights, values, strict=True))
        assert torch.allclose(getattr(optimizer.factors("6"), side), expected)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_decay_and_clip(nesterov, foreach):
    """Against the formulas of the docstring, with directions from the operator."""
    model, lr, momentum, decay, clip, damping = network(), 0.1, 0.9, 0.05, 1e-3, 0.1
    params = list(model.parameters())
    optimizer = KFACOptimizer(
        params,
        **(PLAIN | {"lr": lr, "momentum": momentum, "kl_clip": clip}),
        nesterov=nesterov,
        foreach=foreach,
        weight_decay=decay,
        damping=damping,
        fisher_type="type-2",
    )
    buffers = [torch.zeros_like(p) for p in params]
    clipped = []
    for _ in range(3):
        optimizer.zero_grad()
        kfac = KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            params,
            [(X, LABELS)],
            fisher_type="type-2",
            separate_weight_and_bias=False,
        )
        grads = gradients(model, F.cross_entropy(model(X), LABELS))
        directions = kfac.inverse(damping) @ grads
        kl = sum(lr**2 * (d * g).sum() for d, g in zip(directions, grads, strict=True))
        nu = min(1.0, math.sqrt(clip / kl))
        clipped.append(nu)
        expected = []
        for p, b, d in zip(params, buffers, directions, strict=True):
            b.mul_(momentum).add_(lr * nu * d)
            step = lr * nu * d + momentum * b if nesterov else b
            expected.append((1 - DECAY_PER_LR * lr * decay) * p.detach() - step)
        optimizer.step()
        assert_same(params, expected)
    assert min(clipped) < 1


def test_parameters_in_any_memory_format_get_the_same_steps():
    """Fused kernels go through memory and would mix up entries of tensors that lie in it unlike."""

    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.LayerNorm(5)
            self.place = nn.Parameter(torch.linspace(0, 1, 20).reshape(5, 4).sin())
            self.head = nn.Linear(20, 3)

        def forward(self, x):
            return self.head(self.norm(self.conv(x).mean(2) + self.place.T.to(x)).flatten(1))

    plain = Strided()
    strided = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    strided.place = nn.Parameter(strided.place.detach().T.contiguous().T)
    assert not strided.conv.weight.is_contiguous()
    assert not strided.place.is_contiguous()
    images = torch.linspace(-2, 2, 6 * 2 * 25).reshape(6, 2, 5, 5).sin()
    for model in (plain, strided):
        optimizer = KFACOptimizer(model.parameters(), weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(images), LABELS).backward()
            optimizer.step()
    assert_same(list(strided.parameters()), [p.detach() for p in plain.parameters()])


def test_the_clip_bounds_steps_of_a_rising_learning_rate():
    """A step is Σ_i μ^i of clipped ones, each of at most √κ in the norm of F + δI: ≤ √κ / (1 − μ).

    Nesterov's has the newest 1 + μ times and all others μ times: the same bound. It holds up to the
    rate that the optimizer was made with.
    """
    torch.manual_seed(0)
    model, momentum, clip, damping, top = nn.Linear(10, 3), 0.9, 1e-6, 0.1, 0.1
    params, bound = list(model.parameters()), math.sqrt(1e-6) / (1 - 0.9)
    optimizer = KFACOptimizer(
        params,
        **(PLAIN | {"lr": top, "momentum": momentum, "kl_clip": clip}),
        damping=damping,
        damping_method="exact",
        fisher_type="type-2",
    )
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    m, lengths = torch.zeros(33), []
    for lr in (1e-4, 1e-3, 1e-2, top):
        optimizer.param_groups[0]["lr"] = lr
        data = [(X, LABELS)]
        fisher = KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data, **options)
        damped = fisher @ torch.eye(33) + damping * torch.eye(33)
        optimizer.zero_grad()
        grads = gradients(model, F.cross_entropy(model(X), LABELS))
        g = torch.cat([grad.flatten() for grad in grads])
        direction = torch.linalg.solve(damped, g)
        nu = min(1.0, math.sqrt(clip / (top**2 * direction @ g)))
        m = momentum * m + lr * nu * direction
        before = torch.cat([p.detach().flatten() for p in params])
        optimizer.step()
        step = before - torch.cat([p.detach().flatten() for p in params])
        torch.testing.assert_close(step, lr * nu * direction + momentum * m, rtol=1e-8, atol=1e-14)
        lengths.append(float((step @ damped @ step).sqrt()))
    assert bound / 10 < max(lengths) < bound


def test_groups_have_their_own_settings():
    model = network()
    first, rest = list(model[1].parameters()), [*model[4].parameters(), *model[6].parameters()]
    groups = [{"params": first, "lr": 0.5, "damping": 1.0, "weight_decay": 0.1}, {"params": rest}]
    optimizer = KFACOptimizer(groups, **PLAIN, damping=0.1, fisher_type="type-2")
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    kfac = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), [*first, *rest], [(X, LABELS)], **options
    )
    grads = gradients(model, F.cross_entropy(model(X), LABELS))
    expected = []
    for lr, damping, decay, own in ((0.5, 1.0, 0.1, slice(0, 2)), (1.0, 0.1, 0.0, slice(2, 6))):
        directions = (kfac.inverse(damping) @ grads)[own]
        for p, d in zip([*first, *rest][own], directions, strict=True):
            expected.append((1 - DECAY_PER_LR * lr * decay) * p.detach() - lr * d)
    optimizer.step()
    assert_same([*first, *rest], expected)


def test_weight_and_bias_in_different_groups():
    model = network()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = KFACOptimizer(groups, **PLAIN, damping=0.1, fisher_type="type-2")
    kfac = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        weights + biases,
        [(X, LABELS)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    F.cross_entropy(model(X), LABELS).backward()
    directions = kfac.inverse(0.1) @ [p.grad for p in weights + biases]
    decays = [0.1] * len(weights) + [0.0] * len(biases)
    expected = [
        (1 - DECAY_PER_LR * decay) * p.detach() - d
        for p, d, decay in zip(weights + biases, directions, decays, strict=True)
    ]
    optimizer.step()
    assert_same(weights + biases, expected)


def test_intervals():
    model = network()
    optimizer = KFACOptimizer(
        model.parameters(),
        lr=0.0,
        fisher_type="type-2",
        ema_decay=0.0,
        factor_update_interval=2,
        inverse_update_interval=4,
    )
    state = optimizer.state[model[6].weight]
    factors, inverses = [], []
    for i in range(9):
        optimizer.zero_grad()
        F.cross_entropy(model(X * (1 + i)), LABELS).backward()
        optimizer.step()
        factors.append(optimizer.factors("6").input_factor.clone())
        inverses.append(state["input_inverse"].clone())
    changed = [i for i in range(1, 9) if not torch.equal(factors[i], factors[i - 1])]
    assert changed == [2, 4, 6, 8]
    changed = [i for i in range(1, 9) if not torch.equal(inverses[i], inverses[i - 1])]
    assert changed == [4, 8]


@pytest.mark.parametrize("setting", ["default", "auto", "given", "group"])
def test_the_fallback_learning_rate_follows_from_the_kind_of_a_parameter(setting):
    """AdamW's first step is as long as its rate, whatever the gradient."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(3, 4), nn.LayerNorm(4)
            self.places, self.gate = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.ones(()))
            self.recurrent, self.head = nn.GRU(4, 4), nn.Linear(4, 3)

        def forward(self, labels):
            x = self.norm(self.embedding(labels) + self.places) * self.gate
            return self.head(self.recurrent(x.unsqueeze(0))[0][0])

    model = Model()
    nn.utils.parametrizations.weight_norm(model.embedding)
    gentle = [
        model.embedding.parametrizations.weight.original1,
        model.norm.bias,
        model.gate,
        model.recurrent.bias_hh_l0,
        model.recurrent.weight_hh_l0,
    ]
    matrices = [model.places]
    options = {"default": {}, "auto": {"lr": "auto"}, "given": {"fallback_lr": 0.1}}
    group = {"params": model.parameters()} | ({"fallback_lr": 0.1} if setting == "group" else {})
    optimizer = KFACOptimizer([group], model=model, **options.get(setting, {}))
    before = [p.detach().clone() for p in (*gentle, *matrices)]
    F.cross_entropy(model(LABELS), LABELS).backward()
    for p in (*gentle, *matrices):
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = [p.detach() for p in (*gentle, *matrices)]
    moved = [float((b - a).mean()) for b, a in zip(before, after, strict=True)]
    rates = {"default": (0.015, 1e-3), "auto": (1e-3, 1e-3)}.get(setting, (0.1, 0.1))
    assert moved == pytest.approx([rates[0]] * len(gentle) + [rates[1]] * len(matrices), rel=1e-6)
    described = dict(zip(model.parameters(), optimizer.describe().parameters, strict=True))
    assert [described[p].fallback_lr for p in (*gentle, *matrices)] == pytest.approx(moved)
    places = next(x for x in str(optimizer.describe()).splitlines() if x.startswith("places"))
    assert f"AdamW at {described[model.places].fallback_lr:g}: " in places
    assert described[model.head.weight].fallback_lr is None


def test_fallback_learning_rate_follows_the_schedule():
    model = nn.Sequential(nn.Linear(10, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    optimizer = KFACOptimizer(model.parameters(), lr=0.1, fallback_lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    moved = []
    for _ in range(3):
        before = model[1].bias.detach().clone()
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        # a gradient that is always the same, of which AdamW makes steps of the learning rate
        model[1].bias.grad = torch.ones(4)
        optimizer.step()
        scheduler.step()
        moved.append(float((before - model[1].bias.detach()).mean()))
    assert moved == pytest.approx([1e-2, 5e-3, 2.5e-3], rel=1e-6)


@pytest.mark.parametrize("method", ["factored", "exact"])
def test_wide_sides_are_diagonal(method, caplog):
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 40))
    y = torch.randint(40, (6,))
    optimizer = KFACOptimizer(
        model.parameters(),
        **PLAIN,
        damping=0.1,
        damping_method=method,
        fisher_type="type-2",
        max_factor_dim=20,
    )
    assert "layer '2': its grad_output factor is kept as a diagonal, 40 > max" in caplog.text
    kfac = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(X, y)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    before = torch.cat([model[2].weight, model[2].bias[:, None]], dim=1).detach().clone()
    F.cross_entropy(model(X), y).backward()
    gradient = torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], dim=1)
    A, G = kfac.factors("2")
    optimizer.step()
    assert torch.allclose(optimizer.factors("2").grad_output_factor, G.diagonal())
    g = G.diagonal()
    if method == "factored":
        pi = ((A.trace() / 5) / (g.sum() / 40)) ** 0.5
        left = 1 / (g + 0.1**0.5 / pi)
        right = torch.linalg.inv(A + 0.1**0.5 * pi * torch.eye(5))
        expected = left[:, None] * gradient @ right
    else:
        expected = torch.stack(
            [torch.linalg.solve(g[i] * A + 0.1 * torch.eye(5), gradient[i]) for i in range(40)]
        )
    after = torch.cat([model[2].weight, model[2].bias[:, None]], dim=1)
    assert torch.allclose(before - after, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_statistics_that_are_not_finite_never_enter_an_average(fisher_type, bad):
    model = network()
    optimizer = KFACOptimizer(
        model.parameters(), lr=0.0, fisher_type=fisher_type, factor_update_interval=1
    )
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    kept = {n: [f.clone() for f in optimizer.factors(n)] for n in ("1", "4", "6")}
    optimizer.zero_grad()
    broken = X.clone()
    broken[0, 0] = bad
    F.cross_entropy(model(broken), LABELS).backward()
    with pytest.warns(KFACWarning, match="the step is skipped"):
        optimizer.step()
    for name, factors in kept.items():
        for value, before in zip(optimizer.factors(name), factors, strict=True):
            assert torch.equal(value, before)


@pytest.fixture(params=["cpu", "gpu"])
def inverses_as_on(request, monkeypatch):
    """A GPU computes the inverses of one size in one call; here with the CPU's arithmetic."""
    if request.param == "gpu":
        for module in (running_averages, inverses):
            monkeypatch.setattr(module, "is_free_to_read", lambda value: False)


@pytest.mark.usefixtures("inverses_as_on")
def test_a_failing_inverse_is_kept_counted_and_raised():
    model = network()
    optimizer = KFACOptimizer(
        model.parameters(), lr=0.0, factor_update_interval=1, inverse_update_interval=1
    )

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()

    step()
    state = optimizer.state[model[6].weight]
    inverse = state["input_inverse"].clone()
    for failures in range(1, 4):
        state["input_factor"].fill_(-1e6)  # as round-off would, but more so
        step()
        assert torch.equal(state["input_inverse"], inverse)
        assert state["inverse_failures"] == failures
    state["input_factor"].fill_(-1e6)
    with pytest.raises(DecompositionError, match=r"layer '6': .*4 failures in a row"):
        step()


@pytest.mark.parametrize("options", [{}, {"separate_weight_and_bias": True}])
@pytest.mark.parametrize("entries", [1, 2**24])
def test_inverses_at_once_are_those_one_by_one(options, entries, monkeypatch):
    monkeypatch.setattr(kronecker, "_BATCH_ENTRIES", entries)
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    calls = []
    invert = inverses.inverses_by_size
    monkeypatch.setattr(
        inverses, "inverses_by_size", lambda *args: calls.append(len(args[0])) or invert(*args)
    )
    for model, free in ((one, True), (two, False)):
        for module in (running_averages, inverses):
            monkeypatch.setattr(module, "is_free_to_read", lambda value, free=free: free)
        intervals = {"factor_update_interval": 1, "inverse_update_interval": 2}
        optimizer = KFACOptimizer(model.parameters(), max_factor_dim=20, **intervals, **options)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(X), LABELS).backward()
            optimizer.step()
    assert len(calls) == 2
    assert min(calls) >= 4
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11)


def test_closures():
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    optimizers = [KFACOptimizer(m.parameters()) for m in (one, two)]
    for _ in range(3):
        optimizers[0].zero_grad()
        F.cross_entropy(one(X), LABELS).backward()
        optimizers[0].step()

        def closure():
            optimizers[1].zero_grad()
            loss = F.cross_entropy(two(X), LABELS)
            loss.backward()
            return loss

        assert optimizers[1].step(closure) > 0
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_layer_added_later():
    model = network()
    optimizer = KFACOptimizer(model[6].parameters(), fisher_type="type-2", model=model)
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()
    before = optimizer.factors("6").input_factor.clone()
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
    assert torch.equal(optimizer.factors("6").input_factor, before)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    assert optimizer.factors("4").input_factor.shape == (21, 21)


def test_float32_and_bfloat16_parameters_keep_their_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
        optimizer = KFACOptimizer(model.parameters())
        loss = F.cross_entropy(model(X.to(dtype)), LABELS)
        loss.backward()
        optimizer.step()
        assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in model.parameters())
        assert optimizer.factors("0").input_factor.dtype == torch.float32


# Arguments --------------------------------------------------------------------------------------

BAD = {
    "lr": -0.1,
    "momentum": 1.0,
    "nesterov": "yes",
    "weight_decay": -1,
    "damping": 0.0,
    "preconditioner": "shampoo",
    "damping_method": "cholesky",
    "fisher_type": "type2",
    "mc_samples": 0,
    "kfac_approx": "both",
    "ema_decay": 1.0,
    "factor_batch_fraction": 0.0,
    "factor_update_interval": 0,
    "inverse_update_interval": 2.5,
    "kl_clip": 0.0,
    "separate_weight_and_bias": 1,
    "max_factor_dim": -1,
    "factor_dtype": torch.float16,
    "inverse_dtype": 16,
    "fallback_lr": math.nan,
    "loss_func": nn.L1Loss(),
    "model": lambda x: x,
    "seed": None,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_with_their_value(name):
    error = NotImplementedError if name == "loss_func" else ValueError
    shown = "" if name in ("loss_func", "model") else r".*got " + str(BAD[name]).replace(".", r"\.")
    if isinstance(BAD[name], str):
        shown = f".*got '{BAD[name]}'"
    with pytest.raises(error, match=f"^{name}[ :].*{shown}"):
        KFACOptimizer(network().parameters(), **{name: BAD[name]})


def test_bad_group_settings_and_samples():
    model = network()
    with pytest.raises(ValueError, match=r'damping_method must be "exact" or None .*"factored"'):
        KFACOptimizer(model.parameters(), preconditioner="ekfac", damping_method="factored")
    with pytest.raises(ValueError, match=r"damping must be a number in \(0, inf\), got -1"):
        KFACOptimizer([{"params": list(model.parameters()), "damping": -1}])
    with pytest.raises(ValueError, match='mc_samples must be 1 unless fisher_type="mc", got 2'):
        KFACOptimizer(model.parameters(), fisher_type="empirical", mc_samples=2)
    for params in (None, 3, model):
        with pytest.raises(
            ValueError, match=f"params must be an iterable .* {type(params).__name__}"
        ):
            KFACOptimizer(params)
    with pytest.raises(ValueError, match="empty parameter list"):
        KFACOptimizer([])


@pytest.mark.parametrize("sign", [1, -1])
def test_round_off_of_the_wrong_sign_bounds_the_step_as_well(sign):
    scale = kl_clip_scale([torch.tensor([2.0])], [torch.tensor([8.0 * sign])], [0.5], 1e-2)
    torch.testing.assert_close(scale, torch.tensor((1e-2 / (0.25 * 16)) ** 0.5))
