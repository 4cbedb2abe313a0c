"""Scale and shift of normalisations: the exact diagonal of the GGN, of any network."""

import copy
import itertools

import pytest
import torch
from dense_curvature import ggn as dense_ggn
from kfac_cases import Mean, to_dense
from torch import nn
from torch.nn import functional as F

from kfacopt import EKFACLinearOperator, KFACLinearOperator, KFACOptimizer, default_layers

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


class Middle(nn.Module):
    """[N, ...] -> [N, 3], not linear, datum by datum."""

    def __init__(self, size):
        super().__init__()
        self.head = nn.Linear(size, 3)

    def forward(self, x):
        return self.head(torch.tanh(x.flatten(1)) ** 2)


class Twice(nn.Module):
    """One normalisation for [N, 5] and for [N, 2, 5]."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(5), nn.Linear(5, 10)

    def forward(self, x):
        hidden = self.inner(torch.tanh(self.norm(x))).unflatten(1, (2, 5))
        return self.norm(hidden).sum(1)


CASES = {
    # name: (what comes first, the shape of a datum)
    "layer-norm": (lambda: nn.LayerNorm(5), (5,)),
    "layer-norm-positions": (lambda: nn.LayerNorm(5), (4, 5)),
    "layer-norm-two-axes": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(5, bias=False), (2, 5)),
    "rms-norm": (lambda: nn.RMSNorm(5), (2, 4, 5)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "group-norm-no-positions": (lambda: nn.GroupNorm(2, 4), (4,)),
    "batch-norm": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch-norm-positions": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch-norm-2d": (lambda: nn.BatchNorm2d(3), (3, 2, 4)),
    "batch-norm-3d": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 2)),
    "batch-norm-evaluating": (lambda: nn.BatchNorm1d(4).eval(), (4, 3)),
    "batch-norm-without-moments": (
        lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
        (4,),
    ),
    "instance-norm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 3)),
    "instance-norm-2d": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 2, 4)),
    "instance-norm-3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 3, 2)),
    "instance-norm-with-moments": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (3, 2, 4),
    ),
    "instance-norm-evaluating": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
        (4, 3),
    ),
    "behind-a-convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.BatchNorm1d(4), nn.Tanh()),
        (2, 4),
    ),
    "used-twice": (Twice, (5,)),
}


def trained_norm(model):
    """Give normalisations parameters and moments that are no ones and zeros."""
    for module in model.modules():
        if isinstance(module, NORMS):
            for p in module.parameters():
                nn.init.uniform_(p, 0.5, 2.0)
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    nn.init.uniform_(buffer, 0.5, 2.0)
    return model


def case(name, count=7):
    make, shape = CASES[name]
    first, X = trained_norm(make()), torch.randn(count, *shape)
    size = copy.deepcopy(first)(X)[0].numel()
    model = nn.Sequential(first, Middle(size))
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    return model, [p for m in norms for p in m.parameters()], X, torch.randint(3, (count,))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", CASES)
def test_type_2_is_the_exact_diagonal_of_any_net(name, kind, approx):
    model, params, X, y = case(name)
    loss = nn.CrossEntropyLoss()
    options = {"fisher_type": "type-2", "kfac_approx": approx}
    operator = kind(model, loss, params, [(X, y)], **options)
    diagonal = dense_ggn(model, loss, params, [(X, y)]).diagonal()
    expected = diagonal.diag()
    torch.testing.assert_close(to_dense(operator), expected, rtol=TOLERANCE, atol=TOLERANCE)
    for method in ("exact",) if kind is EKFACLinearOperator else ("exact", "factored"):
        inverse = to_dense(operator.inverse(1e-2, method=method))
        damped = (1 / (diagonal + 1e-2)).diag()
        torch.testing.assert_close(inverse, damped, rtol=TOLERANCE, atol=TOLERANCE)


def test_batches_do_not_matter_where_they_are_not_what_is_normalised():
    model, params, X, y = case("layer-norm-positions")
    loss, options = nn.CrossEntropyLoss(), {"fisher_type": "type-2"}
    whole = KFACLinearOperator(model, loss, params, [(X, y)], **options)
    parts = KFACLinearOperator(model, loss, params, [(X[:2], y[:2]), (X[2:], y[2:])], **options)
    torch.testing.assert_close(to_dense(parts), to_dense(whole), rtol=TOLERANCE, atol=TOLERANCE)


def test_each_parameter_is_a_layer_with_its_diagonal():
    model, params, X, y = case("layer-norm-two-axes")
    kfac = KFACLinearOperator(model, nn.CrossEntropyLoss(), params, [(X, y)], fisher_type="type-2")
    assert kfac.layer_names == ["0.weight", "0.bias"]
    A, G = kfac.factors(model[0].weight)
    assert torch.equal(A, torch.ones(20, 1))
    torch.testing.assert_close(G[:, 0], to_dense(kfac).diagonal()[:20])
    with pytest.raises(KeyError, match=r"layers: \['0\.weight', '0\.bias'\]"):
        kfac.factors("0")


class UsedOtherwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.first(x) + F.linear(x.tanh(), 2 * self.first.weight))


def test_what_is_used_otherwise_before_a_normalisation_is_seen():
    model, X = UsedOtherwise(), torch.randn(5, 4)
    data, loss = [(X, torch.rand(5, 4))], nn.MSELoss()
    kfac = KFACLinearOperator(model, loss, list(model.parameters()), data)
    with pytest.raises(NotImplementedError, match=r"uses 'first\.weight' other than"):
        kfac.trace()


# The optimizer -----------------------------------------------------------------------------------


LAYERS = [*default_layers(), *NORMS]


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["rms-norm", "batch-norm-2d", "used-twice"])
def test_a_step_divides_by_the_damped_diagonal(name, preconditioner):
    model, params, X, y = case(name)
    loss, damping = nn.CrossEntropyLoss(), 1e-2
    diagonal = dense_ggn(model, loss, params, [(X, y)]).diagonal()
    gradient = torch.autograd.grad(loss(model(X), y), params)
    pieces = diagonal.split([p.numel() for p in params])
    expected = [
        (p - g / (d.reshape(p.shape) + damping)).detach()
        for p, g, d in zip(params, gradient, pieces, strict=True)
    ]
    optimizer = KFACOptimizer(
        model.parameters(),
        lr=1.0,
        momentum=0.0,
        damping=damping,
        kl_clip=None,
        fisher_type="type-2",
        preconditioner=preconditioner,
        layers=LAYERS,
    )
    loss(model(X), y).backward()
    optimizer.step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=TOLERANCE, atol=TOLERANCE)
    damped = pieces[0] + damping
    condition = next(v for k, v in optimizer.statistics().items() if k.endswith("weight/condition"))
    assert condition == pytest.approx(float(damped.max() / damped.min()), rel=TOLERANCE)


def test_part_of_a_batch_is_normalised_by_the_whole_of_it():
    """Each step's G is that of one of the six pairs of four data, in the statistics of all four."""
    model, params, X, y = case("batch-norm", count=4)
    loss, norm = nn.CrossEntropyLoss(reduction="sum"), model[0]
    x_hat = F.batch_norm(X, None, None, training=True)
    options = {"fisher_type": "empirical", "factor_batch_fraction": 0.5, "ema_decay": 0.0}
    optimizer = KFACOptimizer(
        params, lr=0.0, factor_update_interval=1, layers=NORMS, **options, model=model
    )
    z = norm(X)
    (g,) = torch.autograd.grad(loss(model[1](z), y), z)
    squares = (g * x_hat).detach().square()
    pairs = {2 * squares[list(pair)].sum(0) for pair in itertools.combinations(range(4), 2)}
    seen = set()
    for _ in range(40):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
        G = optimizer.factors(norm.weight).grad_output_factor[:, 0]
        fits = [i for i, known in enumerate(pairs) if torch.allclose(G, known, rtol=TOLERANCE)]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == 6


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, stride=2),
        nn.GroupNorm(2, 4),
        nn.Flatten(2),
        nn.LayerNorm(4),
        Mean(),
        nn.Linear(4, 6),
        nn.RMSNorm(6),
        nn.Linear(6, 3),
    )


OPTIONS = {
    "kfac": {},
    "exact": {"damping_method": "exact"},
    "ekfac": {"preconditioner": "ekfac"},
    "empirical": {"fisher_type": "empirical"},
    "part": {"factor_batch_fraction": 0.5, "factor_update_interval": 1},
    "auto": {"lr": "auto"},
    "bfloat16-factors": {"factor_dtype": torch.bfloat16},
    "separate": {"separate_weight_and_bias": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_resuming(name):
    model, X, y = network(), torch.randn(24, 2, 4, 4), torch.randint(3, (24,))
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS, **OPTIONS[name])

    def train(net, own, steps):
        for _ in range(steps):
            own.zero_grad()
            loss = F.cross_entropy(net(X), y)
            loss.backward()
            own.step()
        return loss.item()

    first = train(model, optimizer, 1)
    assert train(model, optimizer, 10) < 0.95 * first
    statistics = optimizer.statistics()
    assert statistics["fallback_parameters"] == 0.0
    assert {"1.weight/condition", "1.bias/condition", "6.weight/condition"} <= statistics.keys()
    twin = copy.deepcopy(model)
    resumed = KFACOptimizer(twin.parameters(), layers=LAYERS, **OPTIONS[name])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 3) == train(twin, resumed, 3)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_model_in_bfloat16_has_factors_in_float32():
    model, X, y = network().bfloat16(), torch.randn(8, 2, 4, 4), torch.randint(3, (8,))
    optimizer = KFACOptimizer(model.parameters(), layers=LAYERS)
    F.cross_entropy(model(X.bfloat16()), y).backward()
    optimizer.step()
    assert optimizer.factors("9.weight").grad_output_factor.dtype == torch.float32
    assert optimizer.statistics()["fallback_parameters"] == 0.0


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_an_instance_without_its_axis_takes_the_same_steps(preconditioner):
    X, results = torch.randn(2, 3, 4), []
    for x in (X, X.unsqueeze(0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.InstanceNorm2d(2, affine=True), nn.Flatten(0), nn.Linear(24, 3))
        options = {"preconditioner": preconditioner, "fisher_type": "empirical"}
        layers = [nn.InstanceNorm2d]
        optimizer = KFACOptimizer(model.parameters(), layers=layers, **options)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(x), torch.ones(3)).backward()
            optimizer.step()
        assert optimizer.statistics()["fallback_parameters"] == 2.0  # the linear layer's
        results.append(list(model.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_one_datum_without_its_axis_takes_the_same_steps(preconditioner):
    X, results = torch.randn(5), []
    for x in (X, X.unsqueeze(0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))
        options = {"preconditioner": preconditioner, "factor_batch_fraction": 0.5}
        optimizer = KFACOptimizer(
            model.parameters(), layers=LAYERS, fisher_type="empirical", **options
        )
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(x).flatten(), torch.ones(3)).backward()
            optimizer.step()
        results.append(list(model.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
