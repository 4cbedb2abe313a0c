"""Recurrent modules as loops of products: torch's values, and every product in the graph."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACOptimizer, default_layers
from kfacopt.kfac import unrolled as loops
from kfacopt.kfac.matrix_uses import graph_parents, matrix_uses
from kfacopt.kfac.unrolled import unrolled

D_IN, D = 3, 4
# Sums of less than 300 terms of order 1, in another order.
ROUND_OFF = 300 * torch.finfo(torch.float64).eps
SINGLE_ROUND_OFF = 300 * torch.finfo(torch.float32).eps


def rnn_relu(*args, **kwargs):
    return nn.RNN(*args, nonlinearity="relu", **kwargs)


def rnn_cell_relu(*args, **kwargs):
    return nn.RNNCell(*args, nonlinearity="relu", **kwargs)


MODULES = {"LSTM": nn.LSTM, "GRU": nn.GRU, "tanh": nn.RNN, "relu": rnn_relu}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "tanh": nn.RNNCell, "relu": rnn_cell_relu}
LAYOUTS = ["[T, N, d]", "[T, d]", "packed", "packed, not sorted"]


@pytest.fixture
def everywhere(monkeypatch):
    """Unroll what torch's functions on the CPU unroll themselves: they are the oracle.

    There is no public way, since on the CPU there is no need to.
    """
    monkeypatch.setattr(loops, "_has_own_node", lambda *_: True)


@st.composite
def cases(draw):
    kind, layout = draw(st.sampled_from(sorted(MODULES))), draw(st.sampled_from(LAYOUTS))
    layers = draw(st.integers(1, 3))
    options = {
        "num_layers": layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.4])) if layers > 1 else 0.0,
    }
    if kind == "LSTM":
        options["proj_size"] = draw(st.sampled_from([0, 2]))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    if layout == "packed":
        lengths.sort(reverse=True)
    return kind, options, layout, lengths, draw(st.booleans()), draw(st.booleans())


def inputs_for(module, layout, lengths):
    """Return an input of a layout, the tensor of it that is differentiated by, and N if any."""
    torch.manual_seed(1)
    T, N = lengths[0], len(lengths)
    if layout == "[T, d]":
        x = torch.randn(T, D_IN, requires_grad=True)
        return x, x, ()
    if layout == "[T, N, d]":
        x = torch.randn(*((N, T) if module.batch_first else (T, N)), D_IN, requires_grad=True)
        return x, x, (N,)
    sequences = [torch.randn(length, D_IN) for length in lengths]
    packed = pack_sequence(sequences, enforce_sorted=layout == "packed")
    data = packed.data.requires_grad_()
    return packed, data, (N,)


def first_states(module, batch):
    count = module.num_layers * (2 if module.bidirectional else 1)
    torch.manual_seed(2)
    h = torch.randn(count, *batch, module.proj_size or D, requires_grad=True)
    if not isinstance(module, nn.LSTM):
        return h, [h]
    c = torch.randn(count, *batch, D, requires_grad=True)
    return (h, c), [h, c]


def flat(output):
    """Return all tensors of a recurrent module's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, PackedSequence):
        return [output.data]
    return [tensor for part in output for tensor in flat(part)]


def values_and_gradients(module, arguments, by):
    torch.manual_seed(3)  # of dropout
    outputs = flat(module(*arguments))
    torch.manual_seed(4)
    loss = sum((z.sin() * torch.randn_like(z)).sum() for z in outputs)
    return outputs, torch.autograd.grad(loss, by)


def assert_same(ours, theirs, tolerance):
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        assert torch.allclose(own, other, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("float64")
@given(cases())
@settings(max_examples=40, deadline=None)
def test_a_loop_has_torchs_values_and_gradients(case):
    kind, options, layout, lengths, with_states, training = case
    torch.manual_seed(0)
    module = MODULES[kind](D_IN, D, **options).train(training)
    x, leaf, batch = inputs_for(module, layout, lengths)
    states, leaves = first_states(module, batch)
    arguments = (x, states) if with_states else (x,)
    by = [leaf, *(leaves if with_states else ()), *module.parameters()]
    theirs, their_gradients = values_and_gradients(module, arguments, by)
    with pytest.MonkeyPatch.context() as patch, unrolled(module.modules()):
        patch.setattr(loops, "_has_own_node", lambda *_: True)
        ours, our_gradients = values_and_gradients(module, arguments, by)
    assert_same(ours, theirs, ROUND_OFF)
    assert_same(our_gradients, their_gradients, ROUND_OFF)
    assert [z.stride() for z in ours] == [z.stride() for z in theirs]


@pytest.mark.usefixtures("float64", "everywhere")
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (5,)], ids=["[d]", "[N, d]"])
@pytest.mark.parametrize("with_states", [False, True])
def test_a_cell_has_torchs_values_and_gradients(kind, bias, batch, with_states):
    torch.manual_seed(0)
    cell = CELLS[kind](D_IN, D, bias=bias)
    x, h, c = (torch.randn(*batch, d, requires_grad=True) for d in (D_IN, D, D))
    states, leaves = ((h, c), [h, c]) if kind == "LSTM" else (h, [h])
    arguments = (x, states) if with_states else (x,)
    by = [x, *(leaves if with_states else ()), *cell.parameters()]
    theirs, their_gradients = values_and_gradients(cell, arguments, by)
    with unrolled([cell]):
        ours, our_gradients = values_and_gradients(cell, arguments, by)
    assert_same(ours, theirs, ROUND_OFF)
    assert_same(our_gradients, their_gradients, ROUND_OFF)


# What is in the graph ------------------------------------------------------------------------


def names_in_graph(tensor):
    return {node.name() for node in graph_parents([get_gradient_edge(tensor)], {})}


def assert_all_products_found(module, outputs, tolerance):
    """Compare Σ g aᵀ and Σ g of the products in the graph with autograd's gradients."""
    torch.manual_seed(4)
    loss = sum((z.sin() * torch.randn_like(z)).sum() for z in outputs)
    matrices = [p for p in module.parameters() if p.ndim == 2]
    found = matrix_uses(graph_parents([get_gradient_edge(loss)], {}), matrices)
    assert found.keys() == set(matrices)
    biases = set()
    for p, uses in found.items():
        (expected,) = torch.autograd.grad(loss, [p], retain_graph=True)
        grads = torch.autograd.grad(loss, [use.edge for use in uses], retain_graph=True)
        explained = sum(g.mT @ use.input for g, use in zip(grads, uses, strict=True))
        assert {use.roles for use in uses} == {"oi"}
        assert torch.allclose(explained, expected, rtol=tolerance, atol=tolerance)
        (bias,) = {use.bias for use in uses}
        if bias is not None:
            biases.add(bias)
            (expected,) = torch.autograd.grad(loss, [bias], retain_graph=True)
            total = sum(g.sum(dim=0) for g in grads)
            assert torch.allclose(total, expected, rtol=tolerance, atol=tolerance)
    assert biases == {p for p in module.parameters() if p.ndim == 1}


@pytest.mark.usefixtures("float64", "everywhere")
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_matrix_is_found_in_a_loop(kind, layout):
    torch.manual_seed(0)
    options = {"proj_size": 2} if kind == "LSTM" else {}
    module = MODULES[kind](D_IN, D, num_layers=2, bidirectional=True, **options)
    lengths = [4, 2, 1] if layout != "packed, not sorted" else [1, 4, 2]
    x, *_ = inputs_for(module, layout, lengths)
    with unrolled([module]):
        assert_all_products_found(module, flat(module(x)), ROUND_OFF)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "proj_size"), [*((kind, 0) for kind in MODULES), ("LSTM", 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_matrix_is_found_on_this_device(kind, layout, proj_size):
    """Also where torch's own function is trusted to be a loop."""
    torch.manual_seed(0)
    options = {"proj_size": proj_size} if proj_size else {}
    module = MODULES[kind](D_IN, D, num_layers=2, **options)
    x, *_ = inputs_for(module, layout, [4, 2, 1] if layout != "packed, not sorted" else [1, 4, 2])
    with unrolled([module]):
        assert_all_products_found(module, flat(module(x)), SINGLE_ROUND_OFF)


@pytest.mark.parametrize("kind", MODULES)
def test_every_matrix_is_found_under_autocast(kind):
    torch.manual_seed(0)
    module = MODULES[kind](D_IN, D, num_layers=2)
    with unrolled([module]), torch.autocast("cpu", torch.bfloat16):
        loss = module(torch.randn(6, 5, D_IN))[0].float().sum()
    parents = graph_parents([get_gradient_edge(loss)], {})
    matrices = {p for p in module.parameters() if p.ndim == 2}
    found = matrix_uses(parents, matrices)
    assert found.keys() == matrices
    biases = {use.bias for uses in found.values() for use in uses}
    assert biases == {p for p in module.parameters() if p.ndim == 1}


@pytest.mark.parametrize("kind", CELLS)
def test_every_matrix_of_a_cell_is_found_on_this_device(kind):
    torch.manual_seed(0)
    cell = CELLS[kind](D_IN, D)
    with unrolled([cell]):
        state = cell(torch.randn(5, D_IN))
        outputs = flat(cell(torch.randn(5, D_IN), state))
    assert_all_products_found(cell, outputs, SINGLE_ROUND_OFF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True}])
def test_the_fused_lstm_has_the_same_dropout_layout_and_dtype(dtype, options):
    torch.manual_seed(0)
    module = nn.LSTM(D_IN, D, num_layers=3, dropout=0.4, **options)
    x = torch.randn(6, 5, D_IN)

    def run():
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return flat(module(x))

    theirs = run()
    with unrolled([module]):
        ours = run()
    # In bfloat16, three layers of 6 steps with about 10 roundings each of values below 1.
    assert_same(ours, theirs, SINGLE_ROUND_OFF if dtype == torch.float32 else 3 * 2**-8)
    assert [z.stride() for z in ours] == [z.stride() for z in theirs]


# In the user's loop --------------------------------------------------------------------------

LAYERS = [*default_layers(), nn.LSTM]
X = torch.linspace(-1, 1, 90).reshape(6, 5, D_IN).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2])


class Network(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(D_IN, D), nn.Linear(D, 3)
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            return self.head(checkpoint(self.lstm, x, use_reentrant=False)[0][-1])
        return self.head(self.lstm(x)[0][-1])


def loss_of(model):
    return F.cross_entropy(model(X), LABELS)


def is_fused(loss):
    return "MkldnnRnnLayerBackward0" in names_in_graph(loss)


@pytest.fixture
def fused_here():
    if not is_fused(loss_of(Network())):
        pytest.skip("this torch has no fused LSTM on the CPU")


@pytest.mark.usefixtures("fused_here")
def test_the_optimizer_unrolls_where_factors_are_due():
    model, plain = Network(), Network()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS, factor_update_interval=3)
    seen = []
    for _ in range(4):
        plain.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        loss, expected = loss_of(model), loss_of(plain)
        seen.append(is_fused(loss))
        with torch.no_grad():  # an evaluation is the user's own
            assert torch.equal(loss_of(model), loss_of(plain))
        assert_same([loss], [expected], SINGLE_ROUND_OFF)
        loss.backward()
        gradients = torch.autograd.grad(expected, list(plain.parameters()))
        assert_same([p.grad for p in model.parameters()], gradients, SINGLE_ROUND_OFF)
        optimizer.step()
    assert seen == [False, False, True, False]  # in the second step the new layers are looked at


OPTIMIZERS = {
    "stated loss": {"loss_func": nn.CrossEntropyLoss()},
    "auto": {"lr": "auto", "factor_update_interval": 2},
    "ekfac": {"preconditioner": "ekfac"},
}


@pytest.mark.usefixtures("fused_here")
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_with_other_settings_unroll_too(options):
    model = Network()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS, **options)
    losses, seen = [], []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        seen.append(is_fused(loss))
        losses.append(loss.item())
        optimizer.step()
    assert not seen[0]
    assert any(seen) or "factor_update_interval" not in options
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("fused_here")
def test_activation_checkpointing_sees_the_same_graph_again():
    model, plain = Network(checkpointed=True), Network()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS)
    loss = loss_of(model)
    loss.backward()
    loss_of(plain).backward()
    gradients = [p.grad for p in plain.parameters()]
    assert_same([p.grad for p in model.parameters()], gradients, SINGLE_ROUND_OFF)
    optimizer.step()


class Twice(nn.LSTM):
    def forward(self, x, hx=None):
        y, hx = super().forward(x, hx)
        return 2 * y, hx


@pytest.mark.usefixtures("fused_here")
def test_what_is_left_alone():
    x = X.clone()
    patched, frozen, own = (nn.LSTM(D_IN, D) for _ in range(3))
    patched.forward = own.forward
    frozen.requires_grad_(False)
    modules = [Twice(D_IN, D), patched, frozen]
    with unrolled(modules):
        for module in modules:
            assert is_fused(module(x.requires_grad_())[0].sum())
        module = nn.LSTM(D_IN, D)
    assert is_fused(module(x)[0].sum())


class Same(nn.LSTM):
    """A subclass that does not compute anything else."""


@pytest.mark.usefixtures("fused_here")
def test_a_subclass_with_torchs_forward_pass_is_unrolled():
    module = Same(D_IN, D)
    with unrolled([module]):
        assert not is_fused(module(input=X)[0].sum())


@pytest.mark.usefixtures("fused_here")
@pytest.mark.parametrize("x", [X, X[:, 0], pack_sequence([X[:, 0], X[:3, 1]])], ids=LAYOUTS[:3])
def test_other_hooks_get_and_give_plain_tensors(x):
    module, seen = nn.LSTM(D_IN, D), []
    with unrolled([module]):
        module.register_forward_hook(lambda _, args, output: seen.extend(flat((args, output))))
        module(x)
    assert {type(tensor) for tensor in seen} == {torch.Tensor}


@pytest.mark.usefixtures("fused_here")
def test_nothing_is_left_after_an_exception():
    model = Network()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS, factor_update_interval=3)
    with pytest.raises(RuntimeError, match="input_size"):
        model(X[..., :2])
    with pytest.raises(RuntimeError, match="sequence length"), unrolled([model.lstm]):
        model.lstm(X[:0])
    for _ in range(2):  # in the second step the new layers are looked at
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
    assert is_fused(loss_of(model))
    assert not model.lstm._forward_pre_hooks  # which a hook that is not removed is in


class Outputs(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_copies_pickles_and_scripts_know_nothing_of_it():
    model = Network()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS)
    loss_of(model).backward()
    assert len(model.lstm._forward_pre_hooks) == 2
    assert not copy.deepcopy(model).lstm._forward_pre_hooks
    assert b"kfacopt" not in pickle.dumps(model.lstm)
    file = io.BytesIO()
    torch.save(model.lstm, file)
    assert b"kfacopt" not in file.getvalue()
    scripted = torch.jit.script(Outputs(copy.deepcopy(model.lstm)))
    assert torch.equal(scripted(X), nn.LSTM.forward(model.lstm, X)[0])
    optimizer.step()
    del optimizer
    assert is_fused(loss_of(model)) == is_fused(loss_of(Network()))
    assert not model.lstm._forward_pre_hooks
