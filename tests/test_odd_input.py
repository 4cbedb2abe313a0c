"""Input that torch.optim takes is taken as there, or refused by name."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW, lr_scheduler

from kfacopt import KFACOptimizer, KFACWarning

X = torch.linspace(-1, 1, 24).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
LR = 0.03125  # a power of two: the same in every precision


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def train(model, optimizer, steps=3):
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X * (1 + i)), LABELS).backward()
        optimizer.step()


def assert_equal_models(one, two):
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def trained(optimizer_of, steps=3):
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, steps)
    return model, optimizer


# Numbers that are tensors -------------------------------------------------------------------------

NUMBERS = {
    "a tensor": torch.tensor(LR),
    "a tensor of one": torch.tensor([LR]),
    "a tensor in float64": torch.tensor(LR, dtype=torch.float64),
    "a tensor that requires a gradient": torch.tensor(LR, requires_grad=True),
    "NumPy's float32": np.float32(LR),
    "NumPy's float64": np.float64(LR),
}


@pytest.mark.parametrize("setting", ["lr", "weight_decay", "damping", "momentum", "fallback_lr"])
@pytest.mark.parametrize("name", NUMBERS)
def test_settings_may_be_tensors(name, setting):
    plain, _ = trained(lambda m: KFACOptimizer(m.parameters(), **{setting: LR}))
    given = NUMBERS[name]
    model, optimizer = trained(lambda m: KFACOptimizer(m.parameters(), **{setting: given}))
    assert_equal_models(model, plain)
    assert optimizer.param_groups[0][setting] is given  # as AdamW keeps it
    model, optimizer = trained(
        lambda m: KFACOptimizer([{"params": m.parameters(), setting: given}])
    )
    assert_equal_models(model, plain)
    assert optimizer.statistics()["0/damping"] == (LR if setting == "damping" else 1e-3)


def test_a_rate_that_is_changed_in_place_counts():
    plain, other = trained(lambda m: KFACOptimizer(m.parameters(), lr=LR))
    lr = torch.tensor(LR)
    model, optimizer = trained(lambda m: KFACOptimizer(m.parameters(), lr=lr))
    lr.mul_(0.5)
    other.param_groups[0]["lr"] *= 0.5
    train(model, optimizer)
    train(plain, other)
    assert_equal_models(model, plain)
    lr.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr must be a number in \[0, inf\)"):
        train(model, optimizer, 1)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.5**i),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_a_rate_that_is_a_tensor(name):
    models, rates = [], []
    for lr in (torch.tensor(LR, dtype=torch.float64), LR):
        model = network()
        optimizer = KFACOptimizer(model.parameters(), lr=lr)
        scheduler = SCHEDULERS[name](optimizer)
        for _ in range(4):
            train(model, optimizer, 1)
            scheduler.step()
        models.append(model)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates[0] == pytest.approx(rates[1])
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_saved_rate_that_is_a_tensor():
    model, optimizer = trained(lambda m: KFACOptimizer(m.parameters(), lr=torch.tensor(LR)))
    whole, other = trained(lambda m: KFACOptimizer(m.parameters(), lr=LR))
    twin, fresh = trained(lambda m: KFACOptimizer(m.parameters(), lr=0.5), 0)
    twin.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(twin, fresh)
    train(whole, other)
    assert_equal_models(twin, whole)


def test_a_tensor_of_two_rates_is_refused_by_name():
    with pytest.raises(ValueError, match=r"lr must be a number in \[0, inf\), got tensor"):
        KFACOptimizer(network().parameters(), lr=torch.tensor([0.1, 0.2]))


# Settings that are written later ------------------------------------------------------------------

NO_SETTINGS = [
    *((name, value) for name in ("lr", "weight_decay", "damping", "momentum", "fallback_lr")
      for value in (float("nan"), float("inf"), -1.0, "0.1", torch.tensor([0.1, 0.2]))),
    ("lr", None),
    ("damping", 0.0),
    ("momentum", 1.0),
    ("nesterov", "no"),
    ("maximize", None),
    ("foreach", 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NO_SETTINGS)
def test_a_setting_that_is_written_later_is_refused_by_name_and_nothing_is_stepped(name, value):
    model, optimizer = trained(lambda m: KFACOptimizer(m.parameters()))
    before = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    kept, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"param_groups\[0\]: {name} must be "):
            train(model, optimizer, 1)
    assert_equal_models(model, before[0])
    optimizer.param_groups[0][name] = kept
    train(model, optimizer)
    twin = KFACOptimizer(before[0].parameters())
    twin.load_state_dict(before[1])
    train(before[0], twin)
    assert_equal_models(model, before[0])


# Parameters ---------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Complex, empty and 0-dimensional parameters beside a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 5, dtype=torch.complex64), nn.Linear(5, 3)
        self.no_inputs, self.no_outputs = nn.Linear(0, 3), nn.Linear(4, 0)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.empty(0))

    def forward(self, x):
        z = self.head(self.layer(x.to(torch.complex64)).abs())
        z = z + self.no_inputs(x[:, :0]) + self.no_outputs(x).sum(1, keepdim=True)
        return (z * self.phase).real * self.scale + self.empty.sum()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_complex_and_empty_parameters_are_trained_by_adamw():
    model, start = Odd(), Odd()
    optimizer = KFACOptimizer(model.parameters())
    train(model, optimizer)
    for name, p in model.named_parameters():
        is_factored = name in ("head.weight", "head.bias", "no_inputs.bias")
        assert ("exp_avg" in optimizer.state[p]) != is_factored, name
        assert p.numel() == 0 or not torch.equal(p, start.get_parameter(name)), name
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_loss_of_complex_outputs_is_recognised():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x):
            return torch.fft.fft(self.body(x))

    model = Spectrum()
    optimizer = KFACOptimizer(model.parameters())
    F.mse_loss(model(X).abs(), torch.ones(6, 3)).backward()
    optimizer.step()
    assert optimizer.factors("body").grad_output_factor.trace() > 0


def test_parameters_on_the_meta_device_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(ValueError, match=r"params: a parameter is on the meta device.*to_empty"):
        KFACOptimizer(model.parameters())


class Cases:
    """What AdamW takes or refuses, and KFACOptimizer alike."""

    named = staticmethod(lambda m: m.named_parameters())
    named_groups = staticmethod(
        lambda m: [{"params": m[0].named_parameters()}, {"params": m[2:].named_parameters()}]
    )
    values = staticmethod(lambda m: dict(m.named_parameters()).values())
    parameter_list = staticmethod(lambda m: nn.ParameterList(m.parameters()))
    group_of_one_tensor = staticmethod(lambda m: [{"params": p} for p in m.parameters()])
    empty_group = staticmethod(lambda m: [{"params": []}, {"params": m.parameters()}])
    filtered = staticmethod(lambda m: (p for p in m.parameters() if p.requires_grad))


TAKEN = {n: f for n, f in vars(Cases).items() if isinstance(f, staticmethod)}


@pytest.mark.parametrize("name", TAKEN)
def test_parameters_as_adamw_takes_them(name):
    params = getattr(Cases, name)
    model, optimizer = trained(lambda m: KFACOptimizer(params(m)))
    assert_equal_models(model, trained(lambda m: KFACOptimizer(m.parameters()))[0])
    reference = AdamW(params(network()))
    names = [group.get("param_names") for group in reference.param_groups]
    assert [group.get("param_names") for group in optimizer.param_groups] == names


REFUSED = {
    "modules": lambda m: [m[0], m[3]],
    "modules in a group": lambda m: [{"params": [m[0], m[3]]}],
    "a module in a group": lambda m: [{"params": m}],
    "a dictionary": lambda m: dict(m.named_parameters()),
    "some without names": lambda m: [("0.weight", m[0].weight), m[0].bias],
    "groups without names": lambda m: [
        {"params": m[0].named_parameters()},
        {"params": m[3].parameters()},
    ],
    "twice": lambda m: [{"params": m.parameters()}, {"params": [m[0].weight]}],
    "nothing": lambda m: [],
    "an empty generator": lambda m: (p for p in []),
    "no leaf": lambda m: [2 * m[0].weight],
    "no leaf in a group": lambda m: [{"params": [2 * m[0].weight]}],
    "numbers": lambda m: [1, 2],
    "None": lambda m: [m[0].weight, None],
    "a text": lambda m: "weights",
    "a set in a group": lambda m: [{"params": set(m.parameters())}],
    "a group without parameters": lambda m: [{"lr": 0.1}],
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_that_adamw_refuses(name):
    errors = []
    for kind in (AdamW, KFACOptimizer):
        with pytest.raises((TypeError, ValueError, KeyError)) as caught:
            kind(REFUSED[name](network()))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("params", [network(), torch.ones(3, requires_grad=True), 5, None])
def test_no_list_of_parameters(params):
    with pytest.raises(ValueError, match="params must be an iterable of parameters or groups"):
        KFACOptimizer(params)


def test_a_parameter_twice_in_a_group_is_warned_of_by_torch():
    model = network()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = KFACOptimizer([*model.parameters(), model[0].weight])
    train(model, optimizer)


def test_a_group_that_is_empty_at_first():
    model, whole = network(), network()
    optimizer = KFACOptimizer([{"params": []}])
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": model.parameters()})
    train(model, optimizer)
    train(whole, KFACOptimizer(whole.parameters()))
    assert_equal_models(model, whole)


def test_frozen_parameters_stay():
    model, start = network(), network()
    model[0].requires_grad_(False)
    train(model, KFACOptimizer(model.parameters()))
    assert_equal_models(model[0], start[0])
    assert not torch.equal(model[3].weight, start[3].weight)
    model.requires_grad_(False)
    with pytest.warns(KFACWarning, match="none of the parameters is in a layer"):
        optimizer = KFACOptimizer(model.parameters())
    optimizer.step()


# The order of calls -------------------------------------------------------------------------------

ORDERS = {
    # what comes before the usual steps; each step; f: forward, l: loss, b: backward, s: step,
    # z: zero_grad, Z: the model's zero_grad, 0: zero_grad to zeros
    "a step before anything": ("s", "zflbs"),
    "steps before anything": ("zsssz", "zflbs"),
    "zeros before a step": ("0s0", "zflbs"),
    "a step between forward pass and loss": ("fs", "lbszf"),
    "zero_grad between forward pass and loss": ("", "fzlbs"),
    "zero_grad before the backward pass": ("", "flzbs"),
    "zero_grad at the end": ("", "flbsz"),
    "the model's zero_grad": ("", "flbsZ"),
    "the step first": ("", "szflb"),
    "zeros": ("", "0flbs"),
}


@pytest.mark.parametrize("interval", [1, 10])
@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_calls_are_the_same_training(name, interval):
    """A step without any gradient is none, as for AdamW: the factors are due until there is one."""
    before, each = ORDERS[name]
    model, plain = network(), network()
    options = {"factor_update_interval": interval}
    optimizer = KFACOptimizer(model.parameters(), **options)
    z = loss = None
    calls = {
        "s": lambda: optimizer.step(),
        "z": lambda: optimizer.zero_grad(),
        "Z": lambda: model.zero_grad(),
        "0": lambda: optimizer.zero_grad(set_to_none=False),
        "b": lambda: loss.backward(),
    }
    for call in before + each * 12:
        if call == "f":
            z = model(X)
        elif call == "l":
            loss = F.cross_entropy(z, LABELS)
        else:
            calls[call]()
    other = KFACOptimizer(plain.parameters(), **options)
    for _ in range(11 if each[0] == "s" else 12):
        other.zero_grad()
        F.cross_entropy(plain(X), LABELS).backward()
        other.step()
    assert_equal_models(model, plain)
    assert optimizer.state[model[0].weight]["factor_updates"] > 1
