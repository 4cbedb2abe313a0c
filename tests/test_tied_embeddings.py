"""An embedding tied to a head: its parts, their one Kronecker product, operators and optimizer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_products import INVERTED
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacopt import (
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFACOptimizer,
    default_layers,
)
from kfacopt.kfac.layers.tied import one_product

pytestmark = pytest.mark.usefixtures("float64")

V, WIDTH = 7, 3
LAYERS = [*default_layers(), nn.Embedding]
# Sums of less than 1000 terms of order 1 in another order, and quotients of them.
TOLERANCE = 1e-11


class Modules(nn.Module):
    """Two modules share W, as in GPT-2."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, WIDTH, **options)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, V, bias=options.get("padding_idx") is not None)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.between(self.embedding(tokens)))

    def between(self, e):
        return self.hidden(e).tanh()


class ModuleAndFunction(Modules):
    """An embedding's weight is multiplied."""

    def __init__(self, **options):
        super().__init__(**options)
        self.head = None

    def forward(self, tokens):
        return F.linear(self.between(self.embedding(tokens)), self.embedding.weight)


class FunctionAndModule(Modules):
    """A linear layer's weight is looked up."""

    def __init__(self, **options):
        super().__init__(**options)
        self.embedding, self.padding = None, options.get("padding_idx")

    def forward(self, tokens):
        e = F.embedding(tokens, self.head.weight, padding_idx=self.padding)
        return self.head(self.between(e))


class Functions(nn.Module):
    """Nothing but functions and a parameter."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden = nn.Parameter(torch.randn(V, WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.padding = options.get("padding_idx")

    def forward(self, tokens):
        e = F.embedding(tokens, self.table, padding_idx=self.padding)
        return self.hidden(e).tanh() @ self.table.T


class OnTheLeft(Functions):
    """The head is W h."""

    def forward(self, tokens):
        h = self.hidden(F.embedding(tokens, self.table, padding_idx=self.padding)).tanh()
        return (self.table @ h.mT).mT


class InACheckpoint(Functions):
    """What the lookup and the product have kept is computed once more."""

    def forward(self, tokens):
        return checkpoint(super().forward, tokens, use_reentrant=False)


MODELS = {
    "modules": Modules,
    "module and function": ModuleAndFunction,
    "function and module": FunctionAndModule,
    "functions": Functions,
}


def weight_of(model):
    return next(p for p in model.parameters() if p.shape == (V, WIDTH))


def batch(rows=5, length=4):
    torch.manual_seed(1)
    return torch.randint(V, (rows, length)), torch.randint(V, (rows, length))


def loss_of(model, tokens, labels):
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


class Flat(nn.Module):
    """Returns rows of predictions, as the operators' losses need them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).flatten(0, 1)


# The one product ---------------------------------------------------------------------------------


def positive(size, diagonal):
    x = torch.randn(1, size, size + 1)
    return x.square().sum(2) if diagonal else x @ x.mT


def dense(side):
    return side[0].diag() if side.ndim == 2 else side[0]


def partial_traces(matrix, rows, columns):
    split = matrix.reshape(rows, columns, rows, columns)
    return torch.einsum("icjc->ij", split), torch.einsum("rirj->ij", split)


@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_product_has_the_trace_and_both_partial_traces(rows, columns, wide, broad, seed):
    torch.manual_seed(seed)
    A, own = positive(columns, broad), positive(columns, broad)
    G, p = positive(rows, wide), positive(rows, True)
    C, R = one_product((A, G), (p, own))
    found = torch.kron(dense(R), dense(C))
    both = torch.kron(dense(G), dense(A)) + torch.kron(dense(p), dense(own))
    expected = partial_traces(both, rows, columns)
    for side, other in zip(partial_traces(found, rows, columns), expected, strict=True):
        torch.testing.assert_close(side, other)
    assert R.shape == G.shape
    assert C.shape == A.shape
    for side in (dense(R), dense(C)):
        assert torch.equal(side, side.mT)
        spectrum = torch.linalg.eigvalsh(side)
        assert float(spectrum.min()) >= -TOLERANCE * float(spectrum.max())
    torch.testing.assert_close(dense(C).trace(), dense(A).trace())


@pytest.mark.parametrize("present", ["head", "embedding", "head without gradients", "neither"])
def test_the_product_is_exact_where_one_use_has_terms_alone(present):
    torch.manual_seed(0)
    A, own, G, p = (positive(d, x) for d, x in ((3, 0), (3, 0), (5, 0), (5, 1)))
    if present == "embedding":
        A, G = torch.zeros_like(A), torch.zeros_like(G)
    else:
        p, own = torch.zeros_like(p), torch.zeros_like(own)
    if present == "neither":
        A = torch.zeros_like(A)
    if present in ("head without gradients", "neither"):
        G = torch.zeros_like(G)
    C, R = one_product((A, G), (p, own))
    both = torch.kron(dense(G), dense(A)) + torch.kron(dense(p), dense(own))
    torch.testing.assert_close(torch.kron(dense(R), dense(C)), both)


def test_the_product_is_exact_where_the_parts_have_a_side_in_common():
    torch.manual_seed(0)
    A, own, p = positive(3, False), positive(3, False), positive(5, True)
    C, R = one_product((A, 2 * p), (p, own))
    torch.testing.assert_close(
        torch.kron(dense(R), dense(C)), torch.kron(dense(p), dense(2 * A + own))
    )


def test_a_factor_on_the_objective_is_that_of_the_rows_alone():
    torch.manual_seed(0)
    A, own, G, p = (positive(d, x) for d, x in ((3, 0), (3, 0), (5, 0), (5, 1)))
    C, R = one_product((A, G), (p, own))
    C_scaled, R_scaled = one_product((A, 9 * G), (p, 9 * own))
    torch.testing.assert_close(C, C_scaled)
    torch.testing.assert_close(9 * R, R_scaled)


# The parts ---------------------------------------------------------------------------------------


def dense_parts(model, tokens, padding=None):
    """Return A_h, G_h, p and G_e by autograd alone, for the mean cross entropy of all positions."""
    W = weight_of(model)
    e = W.detach()[tokens].requires_grad_()
    h = model.hidden(e).tanh()
    z = F.linear(h, W.detach(), getattr(getattr(model, "head", None), "bias", None)).flatten(0, 1)
    probabilities = z.detach().softmax(1)
    rows = h.detach().flatten(0, 1)
    count = len(rows)
    A = rows.T @ rows / count
    looked_up = tokens[tokens != padding] if padding is not None else tokens.flatten()
    p = torch.bincount(looked_up, minlength=V).double() / len(looked_up)
    G, own = torch.zeros(V, V), torch.zeros(WIDTH, WIDTH)
    for n, q in enumerate(probabilities):
        hessian = (q.diag() - torch.outer(q, q)) / count
        G += hessian
        jacobian = torch.stack([torch.autograd.grad(x, e, retain_graph=True)[0] for x in z[n]])
        # positions do not see each other
        if padding is not None:  # W has no derivative there
            jacobian[:, tokens == padding] = 0.0
        own += torch.einsum("inxd,ij,jnxf->df", jacobian, hessian, jacobian)
    return A, G, p, own


def expected_sides(model, tokens, padding=None):
    A, G, p, own = dense_parts(model, tokens, padding)
    total = A.trace() * G.trace() + p.sum() * own.trace()
    R = A.trace() * G + own.trace() * p.diag()
    C = G.trace() * A + p.sum() * own
    return R, C, total


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("name", ["modules", "module and function", "functions"])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "all parameters"])
def test_the_operator_has_the_product_of_dense_parts(name, padding, batches, alone):
    model, (tokens, labels) = MODELS[name](padding_idx=padding), batch(6)
    W, parts = weight_of(model), zip(tokens.chunk(batches), labels.chunk(batches), strict=True)
    params = [W] + [p for p in model.parameters() if p is not W and not alone]
    data = [(x, y.flatten()) for x, y in parts]
    K = KFACLinearOperator(
        Flat(model),
        nn.CrossEntropyLoss(),
        params,
        data,
        fisher_type="type-2",
        batch_size_fn=lambda x: x.numel(),
    )
    R, C, total = expected_sides(model, tokens, padding)
    found = (K @ torch.eye(K.shape[0]))[: V * WIDTH, : V * WIDTH]
    torch.testing.assert_close(found, torch.kron(R, C) / total, rtol=TOLERANCE, atol=TOLERANCE)
    factors = K.factors(W)
    assert factors.input_factor.shape == (WIDTH, WIDTH)
    assert factors.grad_output_factor.shape == (V, V)


@pytest.mark.parametrize("kind", [OnTheLeft, InACheckpoint])
def test_other_products_are_uses_of_the_head(kind):
    """In the operator's block, and in the optimizer's third step."""
    found, (tokens, labels) = [], batch()
    for model in (kind(padding_idx=2), Functions(padding_idx=2)):
        data = [(tokens, labels.flatten())]
        options = {"fisher_type": "type-2", "batch_size_fn": torch.numel}
        K = KFACLinearOperator(
            Flat(model), nn.CrossEntropyLoss(), [*model.parameters()], data, **options
        )
        block = K @ torch.eye(K.shape[0])
        optimizer = KFACOptimizer(
            model.parameters(), layers=LAYERS, fisher_type="type-2", factor_update_interval=1
        )
        train(model, optimizer, 3)
        assert optimizer.describe().preconditioned_share == 1.0
        found.append([block, *(p.detach() for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=INVERTED, atol=INVERTED)


def test_a_linear_layer_that_is_looked_up_is_refused_by_name():
    model, (tokens, labels) = FunctionAndModule(), batch()
    data = [(tokens, labels.flatten())]
    options = {"batch_size_fn": torch.numel}
    params = [model.head.weight]
    K = KFACLinearOperator(Flat(model), nn.CrossEntropyLoss(), params, data, **options)
    with pytest.raises(NotImplementedError, match=r"model_func uses 'model\.head\.weight' other"):
        K.trace()


@pytest.mark.parametrize("name", MODELS)
def test_ekfac_refuses_it_by_name(name):
    model, (tokens, labels) = MODELS[name](), batch()
    data, W = [(tokens, labels.flatten())], weight_of(model)
    with pytest.raises(NotImplementedError, match=r"is an embedding tied to a head|other than by"):
        EKFACLinearOperator(Flat(model), nn.CrossEntropyLoss(), [W], data).trace()


class Lookup(nn.Module):
    """A table that is looked up alone, by a function."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(V, WIDTH))

    def forward(self, tokens):
        return F.embedding(tokens, self.table, padding_idx=1)


@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
def test_a_functional_lookup_alone_is_the_exact_block(operator):
    model, tokens = Lookup(), torch.randint(V, (12,))
    data = [(tokens, torch.randn(12, WIDTH))]
    params, loss = [model.table], nn.MSELoss()
    K = operator(model, loss, params, data, fisher_type="type-2")
    ggn = GGNLinearOperator(model, loss, params, data)
    identity = torch.eye(V * WIDTH)
    torch.testing.assert_close(K @ identity, ggn @ identity, rtol=TOLERANCE, atol=TOLERANCE)


# The optimizer -----------------------------------------------------------------------------------


def train(model, optimizer, steps, data=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, *(data or batch()))
        loss.backward()
        optimizer.step()
    return loss.item()


def curvature_of(optimizer, W):
    names = optimizer._connection.names  # a description has names, and a shared weight several
    return next(p for p in optimizer.describe().parameters if p.parameter == names[id(W)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("halves", [1, 2])
def test_a_step_is_the_inverse_of_the_product_times_the_gradient(name, halves):
    model, (tokens, labels) = MODELS[name](padding_idx=2), batch(6)
    W, damping = weight_of(model), 1e-2
    optimizer = KFACOptimizer(
        model.parameters(),
        lr=1.0,
        momentum=0.0,
        damping=damping,
        ema_decay=0.0,
        kl_clip=None,
        fisher_type="type-2",
        factor_update_interval=1,
        inverse_update_interval=1,
        layers=LAYERS,
    )
    train(model, optimizer, 1, (tokens, labels))  # AdamW's
    R, C, total = expected_sides(model, tokens, 2)
    before = W.detach().clone()
    optimizer.zero_grad()
    for x, y in zip(tokens.chunk(halves), labels.chunk(halves), strict=True):
        (loss_of(model, x, y) / halves).backward()
    optimizer.step()
    pi = (C.trace() / WIDTH / (R.trace() / total / V)).sqrt()
    left = R / total + damping**0.5 / pi * torch.eye(V)
    right = C + damping**0.5 * pi * torch.eye(WIDTH)
    step = torch.linalg.inv(left) @ W.grad @ torch.linalg.inv(right)
    torch.testing.assert_close(before - W.detach(), step, rtol=TOLERANCE, atol=TOLERANCE)
    assert curvature_of(optimizer, W).curvature == f"Kronecker {V} × {WIDTH}"


OPTIONS = {
    "kfac": {},
    "exact": {"damping_method": "exact"},
    "reduce": {"kfac_approx": "reduce"},
    "empirical": {"fisher_type": "empirical"},
    "part": {"factor_batch_fraction": 0.5},
    "auto": {"lr": "auto"},
    "stated": {"loss_func": nn.CrossEntropyLoss()},
    "bfloat16-factors": {"factor_dtype": torch.bfloat16},
    "rows diagonal": {"max_factor_dim": 5},
    "both diagonal": {"max_factor_dim": 2},
    "separate": {"separate_weight_and_bias": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["modules", "module and function"])
def test_training_and_resuming(name, option):
    model, (tokens, labels) = Flat(MODELS[name]()), batch()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS, **OPTIONS[option])

    def run(net, own, steps):
        for _ in range(steps):
            own.zero_grad()
            loss = F.cross_entropy(net(tokens), labels.flatten())
            loss.backward()
            own.step()
        return loss.item()

    first, last = run(model, optimizer, 1), run(model, optimizer, 12)
    assert last < 0.95 * first
    assert optimizer.statistics()["fallback_parameters"] == 0.0
    twin = copy.deepcopy(model)
    resumed = KFACOptimizer(twin.parameters(), layers=LAYERS, **OPTIONS[option])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    both = copy.deepcopy((model, optimizer))
    assert run(model, optimizer, 12) == run(twin, resumed, 12) == run(*both, 12)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:KFACOptimizer. layer .* the loss depends on its parameters")
def test_by_default_it_is_adamws(name):
    model = MODELS[name]()
    optimizer = KFACOptimizer(model.parameters())
    train(model, optimizer, 3)
    row = curvature_of(optimizer, weight_of(model))
    assert not row.preconditioned
    if "module" in name.split()[0]:
        assert row.curvature == "AdamW: nn.Embedding is not among layers="


def test_a_state_of_other_settings_does_not_make_it_a_layer():
    model, other = Modules(), Modules()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS)
    train(model, optimizer, 2)
    resumed = KFACOptimizer(other.parameters(), layers=LAYERS, preconditioner="ekfac")
    resumed.load_state_dict(optimizer.state_dict())
    train(other, resumed, 2)
    assert not curvature_of(resumed, weight_of(other)).preconditioned


def test_the_bias_of_a_layer_that_becomes_another_is_told_of_once_in_the_log(caplog):
    model = FunctionAndModule(padding_idx=2)
    options = {"layers": LAYERS, "separate_weight_and_bias": True}
    optimizer = KFACOptimizer(model.parameters(), **options)
    with caplog.at_level("INFO", "kfacopt"):
        train(model, optimizer, 3)
    assert "layer 'head' is new since the forward pass" in caplog.text
    assert optimizer.statistics()["fallback_parameters"] == 0.0


def test_a_large_vocabulary_has_no_matrix_of_its_square():
    torch.manual_seed(0)
    model = Modules()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS, max_factor_dim=V - 1)
    train(model, optimizer, 2)
    factors = optimizer.factors(weight_of(model))
    assert factors.grad_output_factor.shape == (V,)
    assert factors.input_factor.shape == (WIDTH, WIDTH)
    text = curvature_of(optimizer, weight_of(model)).curvature
    assert text == f"Kronecker {V} (diagonal) × {WIDTH}"


@pytest.mark.parametrize("name", MODELS)
def test_ekfac_leaves_it_to_adamw(name):
    model = MODELS[name]()
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS, preconditioner="ekfac")
    if name in ("module and function", "function and module"):
        with pytest.warns(UserWarning, match="the loss depends on its parameters in other ways"):
            train(model, optimizer, 1)
    train(model, optimizer, 3)
    assert not curvature_of(optimizer, weight_of(model)).preconditioned


def test_a_functional_lookup_is_a_layer_where_embeddings_are():
    for layers, preconditioned in ((LAYERS, True), (None, False)):
        model = nn.Sequential(Lookup(), nn.Linear(WIDTH, V))
        optimizer = KFACOptimizer(model.parameters(), layers=layers)
        train(model, optimizer, 3)
        assert curvature_of(optimizer, model[0].table).preconditioned is preconditioned
