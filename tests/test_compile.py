"""torch.compile: a compiled model trains as the plain one does, or a warning names the cure."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACLinearOperator, KFACOptimizer, KFACWarning

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # the compiler's own, where the compiled module's input is no leaf
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

INTERVAL, STEPS = 3, 7
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 5), Block(), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return self.linear(x).relu()


def optimizer_of(model, interval=INTERVAL, **options):
    return KFACOptimizer(model.parameters(), factor_update_interval=interval, **options)


def forward(model, i):
    return F.cross_entropy(model(X * (1 + i)), LABELS)


def train(loss_of, optimizer, steps=STEPS):
    """Train, and return for each step how many graphs were compiled, and how many broke."""
    counts = []
    for i in range(steps):
        counters.clear()
        optimizer.zero_grad()
        loss_of(i).backward()
        optimizer.step()
        counts.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    return counts


def assert_as_uncompiled(model, interval=INTERVAL, **options):
    plain = Network()
    train(lambda i: forward(plain, i), optimizer_of(plain, interval, **options))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)


def compiled_before_the_optimizer(model, backend, **options):
    compiled = torch.compile(model, backend=backend, **options)
    return compiled, optimizer_of(compiled)


def compiled_after_the_optimizer(model, backend, **options):
    optimizer = optimizer_of(model)
    return torch.compile(model, backend=backend, **options), optimizer


def called_before_the_optimizer(model, backend, **options):
    compiled = torch.compile(model, backend=backend, **options)
    forward(compiled, 0).backward()
    model.zero_grad()
    return compiled, optimizer_of(model)


def called_without_gradients_in_between(model, backend, **options):
    compiled, optimizer = compiled_after_the_optimizer(model, backend, **options)
    with torch.no_grad():
        forward(compiled, 0)
    return compiled, optimizer


def in_place(model, backend, **options):
    optimizer = optimizer_of(model)
    model.compile(backend=backend, **options)
    return model, optimizer


def in_place_and_called(model, backend, **options):
    model.compile(backend=backend, **options)
    forward(model, 0).backward()
    model.zero_grad()
    return model, optimizer_of(model)


def a_part(model, backend, **options):
    optimizer = optimizer_of(model)
    model.second = torch.compile(model.second, backend=backend, **options)
    return model, optimizer


ORDERS = [
    compiled_before_the_optimizer,
    compiled_after_the_optimizer,
    called_before_the_optimizer,
    called_without_gradients_in_between,
    in_place,
    in_place_and_called,
    a_part,
]


# Every order meets either backend, and graphs that may break as well as those that may not.
CALLS = [("eager", {"fullgraph": True}), ("aot_eager", {})]


@pytest.mark.parametrize(("backend", "options"), CALLS, ids=["eager-fullgraph", "aot_eager"])
@pytest.mark.parametrize("order", ORDERS, ids=[order.__name__ for order in ORDERS])
def test_compiled_models(order, backend, options):
    """Steps without factors are one graph, compiled at most once; the others run uncompiled."""
    torch._dynamo.reset()
    model = Network()
    compiled, optimizer = order(model, backend, **options)
    counts = train(lambda i: forward(compiled, i), optimizer)
    before = order in (called_before_the_optimizer, in_place_and_called)
    assert counts == [(0, 0), (0 if before else 1, 0), *[(0, 0)] * (STEPS - 2)]
    assert_as_uncompiled(model)


def test_a_compiled_function_that_calls_model_and_loss():
    torch._dynamo.reset()
    model = Network()
    optimizer = optimizer_of(model)
    loss = torch.compile(lambda i: forward(model, i), backend="eager", dynamic=False)
    train(loss, optimizer)
    assert_as_uncompiled(model)


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_evaluations_in_between_stay_compiled(fisher_type):
    torch._dynamo.reset()
    model = Network()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = optimizer_of(compiled, fisher_type=fisher_type)

    def loss_and_evaluation(i):
        before = counters["stats"]["calls_captured"], i
        with torch.no_grad():
            assert type(compiled(X)) is torch.Tensor
        if i == 0:
            assert counters["stats"]["unique_graphs"] == 1, before
        model.eval()
        forward(compiled, 5)  # with gradients, but no step
        model.train()
        return forward(compiled, i)

    counts = train(loss_and_evaluation, optimizer)
    assert sum(broken for _, broken in counts) == 0
    assert_as_uncompiled(model, fisher_type=fisher_type)


def test_an_exception_in_an_evaluation_leaves_the_optimizer_watching():
    torch._dynamo.reset()
    model = Network()
    compiled = torch.compile(model, backend="eager")
    optimizer = optimizer_of(compiled)
    with torch.no_grad(), pytest.raises(Exception, match=r"shapes|reduction dim"):
        compiled(X[:, :2])
    with pytest.raises(Exception, match=r"shapes|reduction dim"):
        compiled(X[:, :2])
    counts = train(lambda i: forward(compiled, i), optimizer)
    assert [broken for _, broken in counts] == [0] * STEPS
    assert_as_uncompiled(model)


def test_where_compilation_has_no_effect_a_warning_names_the_cure():
    torch._dynamo.reset()
    model = Network()
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(KFACWarning, match="Raise factor_update_interval"):
        train(lambda i: forward(compiled, i), optimizer_of(model, 1))
    assert_as_uncompiled(model, 1)
    torch._dynamo.reset()
    container = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = optimizer_of(container)
    compiled = torch.compile(container, backend="eager")
    with pytest.warns(KFACWarning, match=r"bare nn\.Sequential uncompiled.*Compile a module of"):
        train(lambda i: forward(compiled, i), optimizer)


def test_hooks_that_compiled_code_ignores_are_an_error_that_names_the_cure():
    """A container is compiled with its call, hooks included: later ones are not seen."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    compiled = torch.compile(model, backend="eager")
    forward(compiled, 0).backward()
    optimizer = optimizer_of(compiled, 1)
    forward(compiled, 0).backward()
    with pytest.raises(RuntimeError, match=r"call torch\._dynamo\.reset\(\)"):
        optimizer.step()
    torch._dynamo.reset()
    with pytest.warns(KFACWarning, match="Raise factor_update_interval"):
        train(lambda i: forward(compiled, i), optimizer)


# Activation checkpointing -------------------------------------------------------------------------


class Checkpointed(Network):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(checkpoint(self.second, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_checkpointing_without_reentry_is_the_same_training(fisher_type, preconditioner):
    options = {"fisher_type": fisher_type, "preconditioner": preconditioner}
    model = Checkpointed(False)
    optimizer = optimizer_of(model, **options)
    train(lambda i: forward(model, i), optimizer)
    assert_as_uncompiled(model, **options)
    kfac = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(X, LABELS)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    assert bool(kfac.factors("second.linear").input_factor.isfinite().all())


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_reentrant_checkpointing_is_refused_by_name(fisher_type):
    model = Checkpointed(True)
    optimizer_ = optimizer_of(model, fisher_type=fisher_type)
    with pytest.raises(RuntimeError, match=r"'second\.linear': .*use_reentrant=False"):
        forward(model, 0)
    del optimizer_


def test_layers_that_are_called_without_gradients_are_no_checkpointing():
    class Teacher(Network):
        def forward(self, x):
            with torch.no_grad():
                target = super().forward(x)
            return super().forward(x) - target

    model = Teacher()
    optimizer = optimizer_of(model)
    train(lambda i: forward(model, i), optimizer)
    assert optimizer.factors("head").input_factor.trace() > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_sequence_of_compiled_sequences_trains_as_the_plain_one(backend):
    """The wrappers own all modules of it; tracing their hooks would end in a RecursionError."""
    torch._dynamo.reset()
    plain, model = (
        nn.Sequential(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
            nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)),
        )
        for _ in range(2)
    )
    model.load_state_dict(plain.state_dict())
    for i in range(2):
        model[i] = torch.compile(model[i], backend=backend)
    optimizer = optimizer_of(model)
    counts = train(lambda i: forward(model, i), optimizer)
    train(lambda i: forward(plain, i), optimizer_of(plain))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)
    assert counts[0] == (0, 0)  # a step whose factors are due
    assert counts[1] == (2, 0)


# Compiled code around a model that is not compiled ------------------------------------------------


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x.relu())


class LossModule(nn.Module):
    def forward(self, z, y):
        return F.cross_entropy(z, y)


def accuracy(z, y):
    return (z.argmax(1) == y).double().mean()


def cross_entropy(z, y):
    return F.cross_entropy(z, y) + 1e-3 * z.square().mean()


AROUND = {
    # name: (head, loss)
    "a function": (None, lambda: cross_entropy),
    "nn.CrossEntropyLoss": (None, nn.CrossEntropyLoss),
    "a module": (None, LossModule),
    "a bare nn.Linear": (lambda: nn.Linear(3, 3), None),
    "a head": (Head, None),
    "head and loss": (Head, nn.CrossEntropyLoss),
}


def loop_around(name, compiled, fisher_type):
    torch._dynamo.reset()
    make_head, make_loss = AROUND[name]
    body = Network()
    head = nn.Identity() if make_head is None else make_head()
    loss = F.cross_entropy if make_loss is None else make_loss()
    optimizer = optimizer_of(nn.ModuleList([body, head]), fisher_type=fisher_type)
    metric = accuracy
    if compiled is not None:
        head = head if make_head is None else compiled(head)
        loss = loss if make_loss is None else compiled(loss)
        metric = compiled(accuracy)
    rights = []
    counters.clear()
    for i in range(STEPS):
        z = head(body(X * (1 + i)))
        optimizer.zero_grad()
        with torch.no_grad():
            rights.append(float(metric(z, LABELS)))
        value = loss(z, LABELS)
        value.backward()
        optimizer.step()
        with torch.no_grad():
            rights.append(float(metric(z, LABELS)))
    graphs = counters["stats"]["unique_graphs"]
    return list(body.parameters()), rights, float(value.detach()), graphs


@pytest.mark.parametrize(
    ("backend", "fullgraph", "fisher_type"),
    [("eager", False, "mc"), ("aot_eager", True, "empirical")],
)
@pytest.mark.parametrize("name", AROUND)
def test_compiled_losses_metrics_and_heads_around_an_eager_model(
    name, backend, fullgraph, fisher_type
):
    def compiled(function):
        return torch.compile(function, backend=backend, dynamic=False, fullgraph=fullgraph)

    params, rights, value, graphs = loop_around(name, compiled, fisher_type)
    plain, plain_rights, plain_value, _ = loop_around(name, None, fisher_type)
    assert rights == plain_rights
    assert value == pytest.approx(plain_value, rel=1e-12)
    for p, q in zip(params, plain, strict=True):
        assert torch.allclose(p, q, atol=1e-12)
    assert graphs > 0  # on the other steps the compiled code runs


def test_the_compilers_stance_is_the_users_again_after_a_step():
    torch._dynamo.reset()
    model = Network()
    optimizer = optimizer_of(model)
    before = torch._dynamo.eval_frame._stance
    loss = forward(model, 0)
    assert torch._dynamo.eval_frame._stance is not before
    loss.backward()
    optimizer.step()
    assert torch._dynamo.eval_frame._stance is before
    optimizer = optimizer_of(model)
    forward(model, 0)  # whose graph is gone
    assert torch._dynamo.eval_frame._stance is before
    loss = forward(model, 0)
    with torch.compiler.set_stance("fail_on_recompile"):
        users = torch._dynamo.eval_frame._stance
        loss.backward()
        optimizer.step()
        assert torch._dynamo.eval_frame._stance is users
    train(lambda i: forward(model, i), optimizer, INTERVAL)
    assert torch._dynamo.eval_frame._stance is before


def test_a_probed_tensor_that_the_compiler_meets_nevertheless_is_recognised():
    torch._dynamo.reset()
    model, plain = Network(), Network()
    optimizer = optimizer_of(model)
    loss = torch.compile(nn.CrossEntropyLoss(), backend="eager", dynamic=False)

    def under_another_stance(i):
        z = model(X * (1 + i))
        with torch.compiler.set_stance("default"):
            return loss(z, LABELS)

    train(under_another_stance, optimizer)
    train(lambda i: forward(plain, i), optimizer_of(plain))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)
