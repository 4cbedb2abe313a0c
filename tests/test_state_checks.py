"""States that no training leads to are refused by name; hooks may adapt a state before."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer
from kfacopt.optim.state import running_averages

X = torch.linspace(-2, 2, 36).reshape(6, 6).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
EVERY_STEP = {"factor_update_interval": 1, "inverse_update_interval": 1}


def network():
    torch.manual_seed(0)
    square = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)]
    return nn.Sequential(*square, nn.LayerNorm(6), nn.Linear(6, 3))


def train(model, optimizer, steps=2):
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X * (1 + 0.1 * i)), LABELS).backward()
        optimizer.step()


def trained(**options):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), **options)
    train(model, optimizer)
    return model, optimizer


# Broken states ------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def group(**entries):
    return lambda state: state["param_groups"][0].update(entries)


def without(name):
    return lambda state: state["param_groups"][0].pop(name)


def entry(name, value, key=0):
    def change(state):
        old = state["state"][key][name]
        state["state"][key][name] = value(old) if callable(value) else value

    return change


def drop(name, key=0):
    return lambda state: state["state"][key].pop(name)


def put(path, value):
    def change(state):
        *parents, last = path
        for name in parents:
            state = state[name]
        state[last] = value

    return change


GROUPS = {
    "lr nan": (group(lr=NAN), r"param_groups\[0\]: lr must be a number in .*nan"),
    "lr -1": (group(lr=-1), "lr must be a number"),
    "lr text": (group(lr="0.1"), "lr must be a number"),
    "momentum nan": (group(momentum=NAN), "momentum must be a number"),
    "momentum 2": (group(momentum=2), "momentum must be a number in"),
    "base_lr nan": (group(base_lr=NAN), "base_lr must be a number"),
    "weight_decay inf": (group(weight_decay=INF), "weight_decay must be a number"),
    "fallback_lr inf": (group(fallback_lr=INF), "fallback_lr must be a number"),
    "maximize": (group(maximize="yes"), "maximize must be True or False, got 'yes'"),
    "foreach": (group(foreach="x"), "foreach must be True or False, got 'x'"),
    "steps": (group(num_steps=True), "num_steps must be an integer"),
    "kl_clip": (group(kl_clip=1.0), "kl_clip cannot be set for a group"),
    "params text": (group(params=None), "params must be a list of numbers, got NoneType"),
    "params unhashable": (group(params=[[i] for i in range(8)]), "params of groups must be num"),
    "params twice": (group(params=[0] * 8), "must be all different"),
    "groups": (put(["param_groups"], 5), "'param_groups' .a list., got .*'param_groups' .int"),
} | {
    f"no {name}": (without(name), rf"param_groups\[0\]: lacks \['{name}'\]")
    for name in ("lr", "momentum", "nesterov", "weight_decay", "maximize", "foreach", "base_lr")
}
NORM = 4  # the key of the LayerNorm's weight, which AdamW trains
ENTRIES = {
    "step nan": (entry("step", torch.tensor(NAN), NORM), "step of '3.weight' has NaN"),
    "step -1": (entry("step", torch.tensor(-1.0), NORM), "step of .* must not be negative"),
    "exp_avg nan": (entry("exp_avg", lambda t: t * NAN, NORM), "exp_avg of .* has NaN"),
    "exp_avg_sq": (entry("exp_avg_sq", lambda t: t - 1, NORM), "exp_avg_sq of .* negative"),
    "no step": (drop("step", NORM), r"the state of '3.weight' lacks \['step'\]"),
    "weight": (entry("factor_weight", torch.tensor(-1.0)), "factor_weight of '0.weight' must not"),
    "negative factor": (entry("input_factor", lambda t: -t), "input_factor .* negative entry on"),
    "unsymmetric": (entry("input_factor", lambda t: t.triu()), "input_factor .* symmetric"),
    "integers": (entry("input_factor", lambda t: t.long()), "input_factor .* floating.*int64"),
    "complex": (entry("input_factor", lambda t: t + 0j), "input_factor .* floating.*complex64"),
    "negative inverse": (entry("input_inverse", lambda t: -t), "input_inverse .* negative entry"),
    "no factor": (drop("input_factor"), r"lacks \['input_factor'\]"),
    "no inverse": (drop("input_inverse"), r"lacks \['input_inverse'\]"),
    "no inverse_step": (drop("inverse_step"), r"lacks \['inverse_step'\]"),
    "updates": (entry("factor_updates", torch.ones(2)), "factor_updates .* an integer"),
    "skipped": (
        entry("skipped_updates", torch.tensor(-1)),
        "skipped_updates .* at least 0, got -1",
    ),
    "inverse_step": (entry("inverse_step", -2), "inverse_step .* at least -1, got -2"),
    "failures": (entry("inverse_failures", 0.5), "inverse_failures .* an integer"),
    "generator": (entry("generator_state", 3), "generator_state of '0.weight' must be a vector"),
    "a list": (put(["state", 0], [1, 2]), "the state of '0.weight' must be a dict, got list"),
    "a stranger": (put(["state", 99], {}), r"has a state of \[99\]"),
}
OTHER_KINDS = {
    "eigenvalues": (entry("inverse_eigenvalues", lambda t: -t), "inverse_eigenvalues .* negative"),
    "basis": (drop("input_basis"), r"lacks \['input_basis'\]"),
    "moments": (entry("second_moments", lambda t: -t), "second_moments .* negative"),
    "moment weight": (drop("second_moment_weight"), r"lacks \['second_moment_weight'\]"),
}
CASES = [({}, *case) for case in (GROUPS | ENTRIES).values()]
CASES += [({"damping_method": "exact"}, *OTHER_KINDS[name]) for name in ("eigenvalues", "basis")]
CASES += [({"preconditioner": "ekfac"}, *OTHER_KINDS[n]) for n in ("basis", "moments")]
CASES += [({"preconditioner": "ekfac"}, *OTHER_KINDS["moment weight"])]
IDS = [*GROUPS, *ENTRIES, "exact eigenvalues", "exact basis", "ekfac basis", "moments", "weight"]


def assert_equal_states(one, two):
    assert one["param_groups"] == two["param_groups"]
    for key, state in one["state"].items():
        assert state.keys() == two["state"][key].keys()
        for name, value in state.items():
            assert torch.equal(*map(torch.as_tensor, (value, two["state"][key][name])))


@pytest.mark.parametrize(("options", "break_", "message"), CASES, ids=IDS)
def test_a_state_that_no_training_leads_to_is_named_and_changes_nothing(options, break_, message):
    model, optimizer = trained(**options)
    before = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(before)
    break_(broken)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    assert_equal_states(before, optimizer.state_dict())
    train(model, optimizer, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"damping_method": "exact"},
        {"preconditioner": "ekfac"},
        {"max_factor_dim": 4},
        {"separate_weight_and_bias": True, "factor_dtype": torch.bfloat16, "fisher_type": "type-2"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_training_are_loaded(dtype, options):
    for steps in (0, 1, 12):
        model = network().to(dtype)
        optimizer = KFACOptimizer(model.parameters(), inverse_dtype=torch.bfloat16, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(X.to(dtype)), LABELS).backward()
            optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(copy.deepcopy(before))
        assert_equal_states(before, optimizer.state_dict())


def test_maximize_is_refused_for_steps_that_tune_themselves():
    model = network()
    optimizer = KFACOptimizer(model.parameters(), lr="auto")
    state = optimizer.state_dict()
    state["param_groups"][0]["maximize"] = True
    with pytest.raises(ValueError, match='maximize must be False for lr="auto"'):
        optimizer.load_state_dict(state)


LAST_STEPS = {
    "a wrong shape": (entry("previous_parameter", torch.zeros(1)), r"shape \(6, 6\)"),
    "not finite": (entry("previous_parameter", lambda p: p * NAN), "NaN or infinite"),
    "the flag alone": (drop("previous_parameter"), r"lacks \['previous_parameter'\]"),
    "a strange flag": (entry("has_previous_parameter", 0.5), "an integer of at least 0"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by forward mode itself
@pytest.mark.parametrize("name", LAST_STEPS)
def test_the_last_step_of_a_self_tuned_run_is_checked(name):
    break_, message = LAST_STEPS[name]
    model, optimizer = trained(lr="auto")
    state, before = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups[0]["damping"]
    break_(state)
    state["param_groups"][0]["damping"] = 2 * before
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["damping"] == before
    train(model, optimizer, 1)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("saved", "own"), [("auto", 0.1), (0.1, "auto")])
def test_a_state_of_the_other_kind_of_steps_is_refused(saved, own, steps):
    """A state with lr="auto" has lr 1; a fixed lr would shorten steps that tune themselves."""
    model = network()
    first = KFACOptimizer(model.parameters(), lr=saved)
    train(model, first, steps)
    second = KFACOptimizer(model.parameters(), lr=own)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=r"state_dict was saved with .* this optimizer has .*lr"):
        second.load_state_dict(first.state_dict())
    assert_equal_states(before, second.state_dict())


@pytest.mark.parametrize(("saved", "own"), [("auto", 0.1), (0.1, "auto")])
def test_factors_alone_go_over_to_the_other_kind_of_steps(saved, own):
    model = network()
    first = KFACOptimizer(model.parameters(), lr=saved)
    train(model, first)
    second = KFACOptimizer(model.parameters(), lr=own)
    state = second.state_dict()
    names = ("input_factor", "grad_output_factor", *running_averages.RECORDS)
    for key, entries in first.state_dict()["state"].items():
        state["state"][key] |= {name: entries[name] for name in names if name in entries}
    second.load_state_dict(state)
    assert torch.equal(second.factors("0").input_factor, first.factors("0").input_factor)
    before = F.cross_entropy(model(X), LABELS).item()
    train(model, second, steps=5)
    assert F.cross_entropy(model(X), LABELS).item() < before


# Hooks --------------------------------------------------------------------------------------------


def test_a_hook_that_maps_parameters_by_name_moves_their_factors_along():
    """The recipe in torch's documentation, for parameters that come in another order."""
    one = network()
    saved = KFACOptimizer(one.named_parameters(), **EVERY_STEP)
    train(one, saved)
    two = network()
    two.load_state_dict(one.state_dict())
    reordered = KFACOptimizer(list(two.named_parameters())[::-1], **EVERY_STEP)

    def by_name(optimizer, state_dict):
        names = state_dict["param_groups"][0]["param_names"]
        own = optimizer.state_dict()["param_groups"][0]["param_names"]
        order = [names.index(name) for name in own]
        groups = [state_dict["param_groups"][0] | {"params": order, "param_names": own}]
        return state_dict | {"param_groups": groups}

    reordered.register_load_state_dict_pre_hook(by_name)
    seen = []
    reordered.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[two[2].weight]["input_factor"][0].clone())
    )
    reordered.load_state_dict(saved.state_dict())
    assert torch.equal(seen[0], saved.factors("2").input_factor)
    for name in ("0", "2", "4"):
        for got, want in zip(reordered.factors(name), saved.factors(name), strict=True):
            assert torch.equal(got, want)


def test_a_hook_that_mends_a_state_runs_before_the_checks():
    _, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["fallback_lr"]

    def mend(_, state_dict):
        group = state_dict["param_groups"][0] | {"fallback_lr": 0.5}
        return state_dict | {"param_groups": [group]}

    handle = optimizer.register_load_state_dict_pre_hook(mend)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["fallback_lr"] == 0.5
    handle.remove()
    with pytest.raises(ValueError, match=r"lacks .'fallback_lr'"):
        optimizer.load_state_dict(state)


# Groups -------------------------------------------------------------------------------------------


ARGUMENTS = set(inspect.signature(KFACOptimizer).parameters) - {"params"}
MODEL = nn.Linear(1, 1)
OF_GROUPS = set(KFACOptimizer(MODEL.parameters()).defaults)


@pytest.mark.parametrize("name", sorted(ARGUMENTS - OF_GROUPS))
def test_settings_of_the_whole_optimizer_are_refused_in_groups(name):
    """All arguments but those that are defaults of groups."""
    assert OF_GROUPS < ARGUMENTS
    model = network()
    with pytest.raises(ValueError, match=f"{name} cannot be set for a group; groups may set"):
        KFACOptimizer([{"params": model.parameters(), name: True}])


def test_keys_of_others_are_kept_in_groups():
    model = network()
    others = {"name": "all", "initial_lr": 0.1, "max_lr": 1.0, "swa_lr": 0.1, "fused": None}
    optimizer = KFACOptimizer([{"params": model.parameters(), "capturable": False, **others}])
    train(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert others.items() <= optimizer.param_groups[0].items()
