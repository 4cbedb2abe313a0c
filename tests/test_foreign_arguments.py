"""Arguments of AdamW and SGD: an error that says what to do, where they are given or in a group."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from kfacopt import KFACOptimizer
from kfacopt.optim.foreign_arguments import FOREIGN

GIVEN = {
    "betas": ((0.9, 0.95), "momentum= is"),
    "eps": (1e-8, "damping= is"),
    "amsgrad": (False, "no such variant"),
    "fused": (True, "foreach=None"),
    "dampening": (0.0, "momentum is not dampened"),
    "decoupled_weight_decay": (True, "is decoupled always"),
}


def test_all_names_are_tested():
    assert GIVEN.keys() == FOREIGN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_the_constructor_says_what_to_do(name):
    value, cure = GIVEN[name]
    with pytest.raises(TypeError, match=rf"K-FAC has no {name}: leave it out .*{cure}"):
        KFACOptimizer(nn.Linear(2, 1).parameters(), **{name: value})


def test_several_are_named_at_once():
    with pytest.raises(TypeError, match=r"no betas: .*; K-FAC has no eps: "):
        KFACOptimizer(nn.Linear(2, 1).parameters(), eps=1e-8, betas=(0.9, 0.999))


def test_typos_are_pythons_own_error_and_the_signature_is_there():
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        KFACOptimizer(nn.Linear(2, 1).parameters(), momentun=0.9)
    parameters = inspect.signature(KFACOptimizer).parameters
    assert {"lr", "momentum", "kl_clip"} <= parameters.keys()
    assert not FOREIGN.keys() & parameters.keys()
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("name", [name for name in GIVEN if name != "amsgrad"])
def test_a_group_says_what_to_do(name):
    value, model = GIVEN[name][0] or 0.5, nn.Linear(2, 1)
    with pytest.raises(ValueError, match=f"K-FAC has no {name}: leave it out"):
        KFACOptimizer([{"params": model.parameters(), name: value}])
    optimizer = KFACOptimizer(model.parameters())
    with pytest.raises(ValueError, match=f"K-FAC has no {name}: leave it out"):
        optimizer.add_param_group({"params": nn.Linear(2, 1).parameters(), name: value})
    assert len(optimizer.param_groups) == 1


def test_keys_of_others_stay_in_a_group():
    """Names, what schedulers keep, and flags of torch's that are off."""
    model = nn.Linear(4, 1)
    group = {"params": model.parameters(), "name": "head", "lr_scale": 0.5, "fused": None}
    optimizer = KFACOptimizer([group | {"amsgrad": False}])
    schedulers = [
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=20, cycle_momentum=True),
        lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=0.2, cycle_momentum=True),
    ]
    for scheduler in schedulers:
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(torch.ones(3, 4)), torch.zeros(3, 1)).backward()
            optimizer.step()
            scheduler.step()
    own = optimizer.param_groups[0]
    assert own["name"] == "head"
    assert own["lr_scale"] == 0.5
    assert {"max_momentum", "base_momentum", "max_lr", "initial_lr"} <= own.keys()
    again = KFACOptimizer(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["name"] == "head"
