"""Copies, pickles and scripts of a model are those of a model without an optimizer, at any time."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer, KFACWarning

# TorchScript's and torch.export's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

X = torch.linspace(-1, 1, 24).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
MOMENTS = ["at first", "after the forward pass", "after the backward pass", "after the step"]
KINDS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
KINDS += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))


def at(moment, function):
    """Return what a function of the model gives at a moment of a step, and the trained model."""
    model = Network()
    model.eval()
    optimizer = KFACOptimizer(model.parameters())
    result = None
    for now in MOMENTS:
        if now == "after the forward pass":
            loss = F.cross_entropy(model(X), LABELS)
        elif now == "after the backward pass":
            loss.backward()
        elif now == "after the step":
            optimizer.step()
        if now == moment:
            result = function(model)
    return result, model, optimizer


def scripted_copy(model):
    return torch.jit.script(copy.deepcopy(model))


def traced_without_gradients(model):
    with torch.no_grad():
        return torch.jit.trace(model, X)


def exported(model):
    return torch.export.export(model, (X,)).module()


MADE_OF_A_MODEL = {
    "script": torch.jit.script,
    "script of a copy": scripted_copy,
    "trace": lambda model: torch.jit.trace(model, X),
    "trace without gradients": traced_without_gradients,
    "trace_module": lambda model: torch.jit.trace_module(model, {"forward": X}),
    "symbolic trace": torch.fx.symbolic_trace,
    "export": exported,
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", MADE_OF_A_MODEL)
def test_scripts_traces_and_exports_are_made_while_an_optimizer_is_attached(name, moment):
    def values(model):
        return MADE_OF_A_MODEL[name](model)(X).detach(), model(X).detach()

    (made, expected), trained, optimizer = at(moment, values)
    assert torch.allclose(made, expected, atol=1e-6)
    assert optimizer.state[trained.head.weight]["factor_updates"] == 1
    for p, q in zip(trained.parameters(), at(None, None)[1].parameters(), strict=True):
        assert torch.equal(p, q)


def no_hooks(module):
    return all(not getattr(m, kind) for m in module.modules() for kind in KINDS)


class WithoutKfacopt(pickle.Unpickler):
    def find_class(self, module, name):
        if module.partition(".")[0] == "kfacopt":
            raise ModuleNotFoundError(module)
        return super().find_class(module, name)


def pickled(model):
    return pickle.dumps(model)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("write", [pickled, saved])
def test_a_pickled_model_loads_where_kfacopt_is_not_installed(write, moment):
    content, _, _ = at(moment, write)
    assert b"kfacopt" not in content
    if write is pickled:
        loaded = WithoutKfacopt(io.BytesIO(content)).load()
    else:
        loaded = torch.load(io.BytesIO(content), weights_only=False)
    assert no_hooks(loaded)
    loaded(X).sum().backward()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_deep_copy_carries_the_users_hooks_alone(moment):
    def copied(model):
        return copy.deepcopy(model)

    assert no_hooks(at(moment, copied)[0])

    def with_a_hook(model):
        handle = model.head.register_forward_hook(print_nothing, always_call=True, prepend=True)
        result = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        handle.remove()
        return result

    for twin in at(moment, with_a_hook)[0]:
        assert list(twin.head._forward_hooks.values()) == [print_nothing]
        assert list(twin.head._forward_hooks_always_called) == list(twin.head._forward_hooks)
        assert not twin.head._forward_pre_hooks


def print_nothing(module, args, output):
    """A user's hook."""


def test_nothing_is_left_of_hooks_that_are_gone():
    model = Network()
    fresh = {kind: vars(getattr(model.head, kind)) for kind in KINDS}
    optimizer = KFACOptimizer(model.parameters())
    assert not no_hooks(model)
    del optimizer
    assert no_hooks(model)
    assert {kind: vars(getattr(model.head, kind)) for kind in KINDS} == fresh


@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_parts_that_multiply_are_layers_from_their_second_step_on(how):
    model = Network()
    head = model.head
    model.head = (
        torch.jit.script(head)
        if how == "script"
        else torch.jit.trace(head, X[:, :3] @ torch.ones(3, 5))
    )
    optimizer = KFACOptimizer(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert optimizer.factors("body.0").input_factor.trace() > 0
    assert optimizer.factors("weight").input_factor.trace() > 0
    assert optimizer.statistics()["fallback_parameters"] == 2  # norm


def test_a_scripted_model_is_trained_by_adamw():
    model = torch.jit.script(Network())
    optimizer = KFACOptimizer(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(X), LABELS).backward()
    with pytest.warns(KFACWarning, match="none of the parameters is in a layer"):
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
