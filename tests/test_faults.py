"""What goes wrong in real training, and what is expected then; docs/faults.md has the table."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kfacopt import GGNLinearOperator, KFACLinearOperator, KFACOptimizer, KFACWarning
from kfacopt.linalg import kronecker
from kfacopt.linalg.kronecker import DecompositionError
from kfacopt.optim.steps.update import are_finite

pytestmark = pytest.mark.usefixtures("float64")

ROUND_OFFS = 10  # of the few dozen operations in matrices of side 4 and 5
TOLERANCE = 1e-12
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
EVERY_STEP = {"factor_update_interval": 1, "inverse_update_interval": 1}
KINDS = [{"preconditioner": "kfac"}, {"preconditioner": "ekfac"}]
FISHERS = ["mc", "type-2", "empirical"]


def network(bias=True):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3, bias=bias)]
    return nn.Sequential(*layers)


def step(model, optimizer, x=X, y=LABELS):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def snapshot(model, optimizer):
    return copy.deepcopy([list(model.parameters()), optimizer.state_dict()])


def assert_same(one, two):
    """Compare nested containers bit by bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert_same(value, two[key])
    elif isinstance(one, list):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


# NaN and inf --------------------------------------------------------------------------------------


def in_loss(model, bad):
    (F.cross_entropy(model(X), LABELS) * bad).backward()


def in_inputs(model, bad):
    x = X.clone()
    x[0, 0] = bad
    F.cross_entropy(model(x), LABELS).backward()


def in_one_gradient(model, bad):
    F.cross_entropy(model(X), LABELS).backward()
    model[3].weight.grad[0, 0] = bad


def in_a_fallback_gradient(model, bad):
    F.cross_entropy(model(X), LABELS).backward()
    model[2].bias.grad[0] = bad


PLACES = [in_loss, in_inputs, in_one_gradient, in_a_fallback_gradient]


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["preconditioner"])
@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", PLACES, ids=[p.__name__ for p in PLACES])
def test_a_step_with_gradients_that_are_not_finite_leaves_no_trace(
    place, bad, fisher_type, options
):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type, **EVERY_STEP, **options)
    step(model, optimizer)
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    place(model, bad)
    with pytest.warns(KFACWarning, match=r"the step is skipped: .*(0\.weight|3\.weight|2\.bias)"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.statistics()["skipped_steps"] == 1
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    step(model, optimizer)
    step(twin, twin_optimizer)
    assert_same(list(model.parameters()), list(twin.parameters()))


def test_gradients_whose_sum_overflows_are_finite():
    large = torch.full((4,), torch.finfo(torch.float32).max, dtype=torch.float32)
    assert are_finite([large, torch.full((3,), 60000.0, dtype=torch.float16)])
    assert are_finite([torch.zeros(0), large.double(), torch.ones(2, dtype=torch.complex64)])
    assert not are_finite([large, torch.tensor([1.0, math.nan]).half()])
    assert not are_finite([large, torch.tensor([math.inf, -math.inf])])


def test_a_first_step_that_is_skipped():
    model, other = network(), network()
    optimizer = KFACOptimizer(model.parameters())
    in_inputs(model, math.nan)
    with pytest.warns(KFACWarning, match="the step is skipped"):
        optimizer.step()
    step(model, optimizer)
    step(other, KFACOptimizer(other.parameters()))
    assert_same(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["preconditioner"])
def test_finite_gradients_with_statistics_that_overflow(options):
    """In float32 a·aᵀ overflows where the gradient g·aᵀ does not: the step goes on without."""
    model = network().float()
    optimizer = KFACOptimizer(model.parameters(), fisher_type="type-2", **EVERY_STEP, **options)
    step(model, optimizer, X.float())
    before = [f.clone() for f in optimizer.factors("0")]
    step(model, optimizer, X.float() * 1e20)
    for factor, old in zip(optimizer.factors("0"), before, strict=True):
        assert torch.equal(factor, old)
    statistics = optimizer.statistics()
    assert statistics["0/skipped_factor_updates"] == 1
    assert statistics["0/factor_age"] == 1
    assert statistics["3/skipped_factor_updates"] == 0
    assert statistics["skipped_steps"] == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["preconditioner"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher_type", FISHERS)
def test_an_empty_batch_leaves_the_factors_alone(fisher_type, reduction, options):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type, **EVERY_STEP, **options)
    step(model, optimizer)
    before = [f.clone() for f in optimizer.factors("0")]
    optimizer.zero_grad()
    F.cross_entropy(model(X[:0]), LABELS[:0], reduction=reduction).backward()
    optimizer.step()
    for factor, old in zip(optimizer.factors("0"), before, strict=True):
        assert torch.equal(factor, old)
    step(model, optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_a_smaller_last_batch_counts_by_its_terms(fisher_type):
    """Factors of batches of 4 and 2 are those of the 6 data, with no decay and a mean loss."""
    model = network()
    optimizer = KFACOptimizer(
        model.parameters(), lr=0.0, fisher_type=fisher_type, ema_decay=1 - 1e-15, **EVERY_STEP
    )
    for part in (slice(0, 4), slice(4, 6)):
        step(model, optimizer, X[part], LABELS[part])
    kfac = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [*model[0].parameters(), *model[3].parameters()],
        [(X, LABELS)],
        fisher_type=fisher_type,
        separate_weight_and_bias=False,
    )
    for name in ("0", "3"):
        for factor, expected in zip(optimizer.factors(name), kfac.factors(name), strict=True):
            assert torch.allclose(factor, expected, atol=TOLERANCE)


# Gradients and factors that vanish ----------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["preconditioner"])
def test_zero_gradients_move_nothing(options):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), momentum=0.0, **EVERY_STEP, **options)
    step(model, optimizer)
    before = copy.deepcopy(list(model[0].parameters()))
    optimizer.zero_grad()
    (F.cross_entropy(model(X), LABELS) * 0.0).backward()
    optimizer.step()
    assert_same(list(model[0].parameters()), before)
    assert optimizer.statistics()["kl_clip_scale"] == 1.0


DEGENERATE = {
    "one datum": (X[:1], LABELS[:1]),
    "same data": (X[:1].expand(6, -1), LABELS[:1].expand(6)),
    "zero inputs": (torch.zeros(6, 4, dtype=torch.float64), LABELS),
}


@pytest.mark.parametrize("options", [*KINDS, {"damping_method": "exact"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEGENERATE)
def test_rank_deficient_and_zero_factors(name, dtype, options):
    """The damping alone holds them: the step is that of the dense damped matrix."""
    x, y = DEGENERATE[name]
    model = network(bias=False).to(dtype)
    settings = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "ema_decay": 0.0, "damping": 1e-3}
    optimizer = KFACOptimizer(
        model.parameters(), fisher_type="type-2", **settings, **EVERY_STEP, **options
    )
    before = model[0].weight.detach().double().clone()
    step(model, optimizer, x.to(dtype), y)
    A, G = (f.double() for f in optimizer.factors("0"))
    gradient = model[0].weight.grad.double()
    assert torch.linalg.matrix_rank(A, rtol=1e-5) < 4
    if "damping_method" in options:
        F_damped = torch.kron(G, A) + 1e-3 * torch.eye(20)
        expected = torch.linalg.solve(F_damped, gradient.flatten()).reshape(5, 4)
        moved = before - model[0].weight.double()
        # Rounding of gradient, eigenvalues and bases is amplified by the condition; then the
        # weights are rounded. What is 0 in the expected step is so but for that.
        eps, condition = torch.finfo(dtype).eps, torch.linalg.cond(F_damped)
        bound = eps * (ROUND_OFFS * condition * expected.norm() + before.norm())
        assert (moved - expected).norm() <= bound
    assert bool(model[0].weight.isfinite().all())
    for _ in range(3):
        step(model, optimizer, x.to(dtype), y)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_are_finite_and_not_negative(dtype, bad):
    x = torch.linspace(0.1, 1.7, 50, dtype=dtype)
    rank_one = torch.outer(x, x)[None]
    values, basis = kronecker.eigendecomposition(rank_one)
    assert bool((values >= 0).all())
    assert torch.allclose(basis @ (values[..., None] * basis.mT), rank_one, atol=1e-5)
    skewed = rank_one + torch.triu(torch.ones(50, 50, dtype=dtype), 1)
    values, basis = kronecker.eigendecomposition(skewed)
    symmetric = (skewed + skewed.mT) / 2
    positive = torch.linalg.eigvalsh(symmetric.double()).clamp(min=0)
    assert torch.allclose(values.double(), positive, atol=1e-4)
    with pytest.raises(DecompositionError, match="NaN or infinite"):
        kronecker.eigendecomposition(torch.full((1, 2, 2), bad, dtype=dtype))


@pytest.mark.parametrize("scalar_side", ["input", "grad_output"])
def test_a_scalar_factor_makes_factored_damping_exact(scalar_side):
    matrix = torch.cov(torch.rand(3, 10))[None]
    scalar, damping = torch.full((1, 1, 1), 0.3), 1e-2
    sides = (matrix, scalar) if scalar_side == "input" else (scalar, matrix)
    inverse = kronecker.KroneckerProduct(*sides).inverse(damping, "factored")
    dense = torch.kron(inverse.grad_output_factor[0], inverse.input_factor[0])
    assert torch.allclose(dense, torch.linalg.inv(0.3 * matrix[0] + damping * torch.eye(3)))


def test_a_zero_factor_splits_the_damping_evenly():
    matrix, zero = torch.cov(torch.rand(3, 10))[None], torch.zeros(1, 2, 2)
    inverse = kronecker.KroneckerProduct(matrix, zero).inverse(1e-2, "factored")
    assert torch.allclose(inverse.input_factor[0], torch.eye(2) / 0.1)
    expected = torch.linalg.inv(matrix[0] + 0.1 * torch.eye(3))
    assert torch.allclose(inverse.grad_output_factor[0], expected)


def test_a_factor_that_needs_float64_is_inverted_in_float64():
    """1e6 + 1e-3 is 1e6 in float32: the damped factor is singular there, and is not in float64."""
    factor = torch.full((1, 2, 2), 1e6, dtype=torch.float32)
    damping = torch.tensor([1e-3])
    inverse = kronecker.damped_inverse(factor, damping.float())
    exact = torch.linalg.inv(factor.double() + 1e-3 * torch.eye(2))
    assert inverse.dtype == torch.float32
    assert torch.allclose(inverse.double(), exact, rtol=1e-5)


@pytest.mark.parametrize("options", [{"damping_method": "exact"}, *KINDS[1:]], ids=str)
def test_an_eigendecomposition_that_does_not_converge_is_retried_in_float64(monkeypatch, options):
    model, other = network().float(), network().float()
    eigh, tried = torch.linalg.eigh, []

    def failing(matrix, *args):
        tried.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix, *args)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    step(model, KFACOptimizer(model.parameters(), **options), X.float())
    monkeypatch.undo()
    assert set(tried) == {torch.float32, torch.float64}
    step(other, KFACOptimizer(other.parameters(), **options), X.float())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_decompositions_that_keep_failing_keep_the_inverse_are_counted_and_raise(monkeypatch):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), damping_method="exact", **EVERY_STEP)
    step(model, optimizer)

    def failing(matrix, *args):
        raise torch.linalg.LinAlgError("did not converge")

    kept = optimizer.state[model[3].weight]["inverse_eigenvalues"].clone()
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    for failures in (1, 2, 3):
        step(model, optimizer)
        statistics = optimizer.statistics()
        assert statistics["3/inverse_failures"] == statistics["3/inverse_age"] == failures
        assert torch.equal(optimizer.state[model[3].weight]["inverse_eigenvalues"], kept)
    with pytest.raises(DecompositionError, match=r"layer '0': .*4 failures in a row"):
        step(model, optimizer)
    monkeypatch.undo()
    step(model, optimizer)
    assert optimizer.statistics()["3/inverse_failures"] == 0


def test_a_layer_whose_parameters_change_forgets_its_failures(monkeypatch):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), damping_method="exact", **EVERY_STEP)
    step(model, optimizer)

    def failing(matrix, *args):
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", failing)
        step(model, optimizer)
    assert "inverse_failures" in optimizer.state[model[3].weight]
    model[3].bias.requires_grad_(False)
    optimizer.zero_grad()
    assert "inverse_failures" not in optimizer.state[model[3].weight]
    assert optimizer.statistics()["0/inverse_failures"] == 1


def test_a_first_decomposition_that_fails_raises_at_once(monkeypatch):
    model = network()
    optimizer = KFACOptimizer(model.parameters())
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda m: (m, torch.ones(m.shape[:-2], dtype=torch.int32))
    )
    with pytest.raises(DecompositionError, match=r"layer '0': .*1 failures.*Raise damping"):
        step(model, optimizer)


# Size ---------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The number of bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else (result,)
        for t in tensors:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["preconditioner"])
@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_a_head_of_50_000_outputs_has_a_diagonal_side(fisher_type, options, caplog):
    outputs, width = 50_000, 16
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).float()
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type, **EVERY_STEP, **options)
    assert "layer '2': its grad_output factor is kept as a diagonal, 50000 > max" in caplog.text
    y = torch.randint(outputs, (6,))
    with LargestTensor() as largest:
        step(model, optimizer, X.float(), y)
    # the largest are of the weight's size, a dense factor would have 10 GB
    assert largest.bytes <= 4 * outputs * (width + 1) * 2
    assert optimizer.factors("2").grad_output_factor.shape == (outputs,)


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["preconditioner"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_vocabulary_of_50_000_has_a_diagonal_side_and_no_one_hots(kind, options, caplog):
    words, width = 50_000, 16
    model = nn.Sequential(kind(words, width), nn.Flatten(), nn.LazyLinear(3))
    tokens, y = torch.randint(words, (6, 20)), torch.randint(3, (6,))
    model.float()(tokens)
    layers = [nn.Linear, kind]
    optimizer = KFACOptimizer(model.parameters(), layers=layers, **EVERY_STEP, **options)
    assert "is kept as a diagonal" not in caplog.text  # it always is
    with LargestTensor() as largest:
        step(model, optimizer, tokens, y)
    assert optimizer.statistics()["fallback_parameters"] == 0.0
    assert largest.bytes <= 4 * words * width * 2
    assert optimizer.factors("0").input_factor.shape == (words,)
    assert optimizer.factors("0").grad_output_factor.shape == (width, width)


# Layers without statistics ------------------------------------------------------------------------


def test_frozen_layers_are_not_captured_and_have_no_state():
    model = network()
    model[0].requires_grad_(False)
    optimizer = KFACOptimizer(model.parameters())
    saved = []

    def keep(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    x = X.clone()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = F.cross_entropy(model(x), LABELS)
    assert x.data_ptr() not in saved
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None
    loss.backward()
    optimizer.step()
    assert model[0].weight not in optimizer.state
    assert model[0].bias not in optimizer.state
    model[3].requires_grad_(False)
    model[2].requires_grad_(False)
    F.cross_entropy(model(X), LABELS)  # all are frozen


def test_unused_layers_stay_as_they_are_and_are_no_fault():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = network(), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Spare()
    optimizer = KFACOptimizer(model.parameters(), weight_decay=0.1, **EVERY_STEP)
    before = copy.deepcopy(list(model.unused.parameters()))
    for _ in range(3):
        step(model, optimizer)
    assert_same(list(model.unused.parameters()), before)
    with pytest.raises(KeyError, match="no step yet"):
        optimizer.factors("unused")
    assert math.isnan(optimizer.statistics()["unused/condition"])


# Shared layers: the rule, beside the exact GGN ----------------------------------------------------


class Shared(nn.Module):
    """A linear network, whose second layer is called twice or shares its weight with a third."""

    def __init__(self, tied, parallel):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.tied, self.parallel = tied, parallel
        if tied:
            self.three = nn.Linear(3, 3, bias=False)
            self.three.weight = self.two.weight

    def forward(self, x):
        again = self.three if self.tied else self.two
        h = self.one(x)
        return torch.cat([self.two(h), again(x)], 1) if self.parallel else again(self.two(h))


@pytest.mark.parametrize("parallel", [False, True], ids=["in series", "side by side"])
@pytest.mark.parametrize("tied", [False, True], ids=["called twice", "tied weights"])
def test_uses_of_one_weight_are_further_positions(tied, parallel):
    """A averages a aᵀ and G sums g gᵀ over both uses (docs/faults.md): the GGN's block is exactly

    Σ over pairs of uses; with one datum and expand, (Σ_u g_u g_uᵀ) ⊗ (1/2 Σ_u a_u a_uᵀ) has neither
    the cross terms nor a coupling of g_u with a_u. Its trace is the exact one where the uses' |a|
    or |g| agree.
    """
    torch.manual_seed(0)
    model = Shared(tied, parallel)
    x = torch.rand(1, 3)
    y = torch.rand(1, 6 if parallel else 3)
    optimizer = KFACOptimizer(
        model.parameters(), lr=0.0, fisher_type="type-2", ema_decay=0.0, **EVERY_STEP
    )
    F.mse_loss(model(x), y, reduction="sum").backward()
    optimizer.step()
    A, G = optimizer.factors(model.two.weight)
    W1, W2 = model.one.weight.detach(), model.two.weight.detach()
    h = W1 @ x[0]
    inputs = [h, x[0]] if parallel else [h, W2 @ h]
    eye, zero = torch.eye(3), torch.zeros(3, 3)
    # Jacobians of the output by the output of each use, [outputs, 3]
    jacobians = [torch.cat([eye, zero]), torch.cat([zero, eye])] if parallel else [W2, eye]
    assert torch.allclose(A, sum(torch.outer(a, a) for a in inputs) / 2, atol=TOLERANCE)
    assert torch.allclose(G, 2 * sum(J.T @ J for J in jacobians), atol=TOLERANCE)
    # and the exact block, from the same pieces
    J = sum(torch.kron(J, a[None]) for J, a in zip(jacobians, inputs, strict=True))
    ggn = GGNLinearOperator(
        model, nn.MSELoss(reduction="sum"), [model.two.weight], [(x, y)], check_deterministic=False
    )
    exact = 2 * J.T @ J
    assert torch.allclose(ggn @ torch.eye(9), exact, atol=TOLERANCE)
    same_use = 2 * sum(
        torch.kron(J.T @ J, torch.outer(a, a)) for J, a in zip(jacobians, inputs, strict=True)
    )
    if parallel:  # no output sees two uses: no cross terms, and J_uᵀ J_u = I for both uses
        assert torch.allclose(exact, same_use, atol=TOLERANCE)
        assert torch.allclose(torch.kron(G, A), exact, atol=TOLERANCE)
    else:
        assert not torch.allclose(torch.kron(G, A), exact, rtol=0.1)


# Deletion and memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["preconditioner"])
def test_a_deleted_optimizer_is_gone_and_another_goes_on(options):
    model, plain = network(), network()
    optimizer = KFACOptimizer(model.parameters(), **EVERY_STEP, **options)
    step(model, optimizer)
    plain.load_state_dict(model.state_dict())
    held = F.cross_entropy(model(X), LABELS)  # its graph has hooks of the optimizer
    references = [weakref.ref(optimizer), weakref.ref(optimizer._watch)]
    del optimizer
    gc.collect()
    assert [r() for r in references] == [None, None]
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    held.backward()
    model.zero_grad()
    others = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for m, other in zip((model, plain), others, strict=True):
        step(m, other)
    assert_same(list(model.parameters()), list(plain.parameters()))
    again = KFACOptimizer(model.parameters())
    step(model, again)


def forward_only(model):
    model.eval()
    model(X)
    model.train()


def without_gradients(model):
    with torch.no_grad():
        model(X)


def without_a_step(model):
    F.cross_entropy(model(X), LABELS)


def differentiated_by_the_input(model):
    x = X.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), LABELS), x)


def transformed(model):
    params = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.functional_call(model, params, (X,))
    torch.func.vmap(model)(X)


def looked_at_by_an_operator(model):
    data = [(X, LABELS)]
    options = {"check_deterministic": False}
    params = list(model.parameters())
    GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data, **options) @ torch.ones(53)


FORWARDS = {
    forward_only: 100,
    without_gradients: 100,
    without_a_step: 100,
    differentiated_by_the_input: 50,
    transformed: 50,
    looked_at_by_an_operator: 20,
}


def has_memory(tensor):
    try:
        return tensor.device.type == "cpu"
    except RuntimeError:  # torch 2.6 keeps tensors without a device
        return False


def tensor_bytes():
    gc.collect()
    traced = ("FakeTensor", "FunctionalTensor")  # the compiler's, of other tests
    tensors = [
        o
        for o in gc.get_objects()
        if issubclass(type(o), torch.Tensor) and type(o).__name__ not in traced
    ]
    tensors = [t for t in tensors if has_memory(t)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


@pytest.mark.parametrize("forward", FORWARDS, ids=[f.__name__ for f in FORWARDS])
def test_forwards_that_are_no_steps_leave_no_trace_and_no_memory(forward):
    model, alone, fisher_type = network(), network(), "mc"  # whose labels are a trace, too
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type, **EVERY_STEP)
    alone_optimizer = KFACOptimizer(alone.parameters(), fisher_type=fisher_type, **EVERY_STEP)
    for m, o in ((model, optimizer), (alone, alone_optimizer)):
        step(m, o)
        o.zero_grad()
    forward(model)
    before, count = tensor_bytes(), FORWARDS[forward]
    for _ in range(count):
        forward(model)
    assert tensor_bytes() == before
    for m, o in ((model, optimizer), (alone, alone_optimizer)):
        step(m, o)
    assert_same(snapshot(model, optimizer), snapshot(alone, alone_optimizer))
