"""K-FAC, EKFAC and the Fisher by samples, of losses that have no name, against dense matrices."""

import pytest
import torch
from kfac_cases import to_dense
from torch import nn
from torch.nn import functional as F

from kfacopt import (
    EFLinearOperator,
    EKFACLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
)
from kfacopt.likelihoods import UnsupportedLossError

pytestmark = pytest.mark.usefixtures("float64")

ROUND_OFF = 1e-10
SIGMAS = 6.0
SEEDS, SAMPLES = 60, 8


def log_cosh(z, y):
    return (z - y).cosh().log().mean()


def squares(z, y):
    return ((z - y) ** 2).mean()


def coupled_squares(z, y):
    return ((z - y) ** 2 + (z - y).sum(-1, keepdim=True) ** 2).mean()


def cross_entropy(z, y):
    return -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()


def contrastive(z, y):
    scores = z @ z.T + torch.full((len(z),), -10.0).diag()
    return -scores.log_softmax(-1).roll(1, 0).diagonal().mean()


def network(*shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(*shape, 4)


def params_of(model):
    return list(model.parameters())


def dense_fisher(model, loss, X, y):
    """Return Jᵀ H⁺ J from autograd's J and H, with z of a whole batch in one piece."""
    params = params_of(model)
    z = model(X)
    rows = [torch.autograd.grad(x, params, retain_graph=True) for x in z.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    H = torch.autograd.functional.hessian(lambda at: loss(at, y), z.detach())
    values, vectors = torch.linalg.eigh(H.reshape(z.numel(), z.numel()))
    root = J.T @ vectors * values.clamp(min=0).sqrt()
    return root @ root.T


def uniform(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def within_parameters(model):
    owners = torch.cat([torch.full((p.numel(),), k) for k, p in enumerate(params_of(model))])
    return (owners[:, None] == owners[None, :]).double()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


ONE_DATUM = {
    "log-cosh": (log_cosh, uniform(1, 3)),
    "cross entropy": (cross_entropy, torch.tensor([1])),
    "coupled squares": (coupled_squares, uniform(1, 3)),
    "huber": (nn.HuberLoss(), uniform(1, 3)),
    "poisson": (nn.PoissonNLLLoss(), uniform(1, 3)),
    "distance": (lambda z, y: (z - y).norm(dim=-1).mean(), uniform(1, 3)),
    "cosine, indefinite": (lambda z, y: 1 - F.cosine_similarity(z, y).mean(), uniform(1, 3)),
    "gaussian, indefinite": (
        lambda z, y: (z[:, 2] + (z[:, :2] - y[:, :2]).square().sum(1) * (-z[:, 2]).exp()).mean(),
        uniform(1, 3),
    ),
}


@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", ONE_DATUM)
def test_a_deep_linear_net_on_one_datum_is_exact(name, operator):
    loss, y = ONE_DATUM[name]
    model, X = network(1)
    K = operator(model, loss, params_of(model), [(X, y)], fisher_type="type-2")
    expected = dense_fisher(model, loss, X, y) * within_parameters(model)
    assert relative(to_dense(K), expected) < ROUND_OFF
    if "indefinite" not in name:
        ggn = to_dense(GGNLinearOperator(model, loss, params_of(model), [(X, y)]))
        assert relative(to_dense(K), ggn * within_parameters(model)) < ROUND_OFF


@pytest.mark.parametrize("loss", [squares, coupled_squares], ids=["diagonal", "blocks"])
@pytest.mark.parametrize("average", ["batch", None])
@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
def test_several_batches_of_equal_curvature_are_exact(loss, average, operator):
    """Means count by their batches' sizes, sums add up."""
    model, X = network(7)
    data = [(x, torch.randn(len(x), 3)) for x in X.split((4, 3))]

    def summed(z, y):
        return loss(z, y) * len(z)

    used = loss if average else summed
    K = operator(model, used, params_of(model), data, fisher_type="type-2", loss_average=average)
    joint = (X, torch.cat([y for _, y in data]))
    ggn = GGNLinearOperator(model, used, params_of(model), [joint])
    assert relative(to_dense(K), to_dense(ggn) * within_parameters(model)) < ROUND_OFF
    gradients, value = K.gradient_and_loss()
    expected = torch.autograd.grad(used(model(X), joint[1]), params_of(model))
    assert torch.allclose(value, used(model(X), joint[1]))
    assert all(torch.allclose(g, e) for g, e in zip(gradients, expected, strict=True))


TWINS = {
    "squares": (squares, nn.MSELoss, lambda z: torch.randn_like(z)),
    "cross entropy": (cross_entropy, nn.CrossEntropyLoss, lambda z: torch.randint(3, z.shape[:1])),
}


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("name", TWINS)
def test_losses_by_hand_have_the_factors_of_their_named_twins(name, fisher_type):
    by_hand, named, targets = TWINS[name]
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(X, targets(model(X))) for X in (torch.randn(4, 4), torch.randn(3, 4))]
    samples = 3 if fisher_type == "mc" else 1
    for kind in (KFACLinearOperator, EKFACLinearOperator):
        options = {"fisher_type": fisher_type, "mc_samples": samples}
        own, twin = (
            to_dense(kind(model, loss, params_of(model), data, **options))
            for loss in (by_hand, named())
        )
        assert relative(own, twin) < ROUND_OFF
    if fisher_type == "mc":
        own, twin = (
            to_dense(FisherMCLinearOperator(model, loss, params_of(model), data[:1], mc_samples=3))
            for loss in (by_hand, named())
        )
        assert relative(own, twin) < ROUND_OFF


SAMPLED = {
    "log-cosh": (log_cosh, (5,)),
    "cross entropy of positions": (
        lambda z, y: cross_entropy(z, (y[..., 0] > 0.5).long()),
        (3, 2),
    ),
    "coupled squares": (coupled_squares, (5,)),
    "contrastive": (contrastive, (4,)),
    "rows along axis 1": (
        lambda z, y: coupled_squares(z.movedim(1, -1), y.movedim(1, -1)) + z[:, 0].exp().mean(),
        (3, 2),
    ),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_the_sampled_fisher_is_unbiased(name):
    loss, shape = SAMPLED[name]
    model, X = network(*shape)
    data = [(X, torch.rand(*shape, 3))]
    samples = torch.stack(
        [
            to_dense(
                FisherMCLinearOperator(
                    *(model, loss, params_of(model), data),
                    check_deterministic=False,
                    seed=s,
                    mc_samples=SAMPLES,
                )
            )
            for s in range(SEEDS)
        ]
    )
    expected = dense_fisher(model, loss, *data[0])
    allowed = SIGMAS * samples.std(0) / SEEDS**0.5 + ROUND_OFF
    assert bool(((samples.mean(0) - expected).abs() <= allowed).all())
    largest = expected.diagonal().argmax()
    assert allowed[largest, largest] < 0.9 * expected[largest, largest]
    if name != "contrastive":  # the others are convex
        ggn = to_dense(GGNLinearOperator(model, loss, params_of(model), data))
        assert relative(expected, ggn) < ROUND_OFF


def test_the_sampled_fisher_of_several_batches():
    model, X = network(6)
    data = [(x, torch.rand(len(x), 3)) for x in X.split((4, 2))]
    for reduction in ("mean", "sum"):
        loss = nn.HuberLoss(reduction=reduction)
        ggn = to_dense(GGNLinearOperator(model, loss, params_of(model), data))
        F_mc = FisherMCLinearOperator(model, loss, params_of(model), data, mc_samples=1000)
        assert relative(to_dense(F_mc), ggn) < 0.2  # 1,000 samples: 7 %
        assert torch.equal(to_dense(F_mc), to_dense(F_mc))
    with pytest.raises(ValueError, match="it must have an attribute `reduction`"):
        to_dense(FisherMCLinearOperator(model, log_cosh, params_of(model), data))


def test_the_empirical_fisher_of_any_loss():
    model, X = network(1)
    data = [(X, torch.rand(1, 3))]
    K = KFACLinearOperator(model, nn.L1Loss(), params_of(model), data, fisher_type="empirical")
    EF = to_dense(EFLinearOperator(model, nn.L1Loss(), params_of(model), data))
    assert relative(to_dense(K), EF * within_parameters(model)) < ROUND_OFF


def test_batches_without_curvature_add_nothing():
    """Of Huber's loss, where all residuals are large."""
    model, X = network(6)
    data = [(X[:3], model(X[:3]).detach() + 0.1), (X[3:], torch.full((3, 3), 100.0))]
    loss = nn.HuberLoss()
    params = params_of(model)
    one, both = (
        KFACLinearOperator(model, loss, params, batches, fisher_type="type-2")
        for batches in (data[:1], data)
    )
    ratio = both.factors("0").grad_output_factor / one.factors("0").grad_output_factor
    assert torch.allclose(ratio, torch.full_like(ratio, 0.5))
    half = FisherMCLinearOperator(model, loss, params, data)
    assert torch.allclose(
        2 * to_dense(half), to_dense(FisherMCLinearOperator(model, loss, params, data[:1]))
    )
    for kind in (KFACLinearOperator, FisherMCLinearOperator):
        with pytest.raises(UnsupportedLossError, match="HuberLoss has no curvature"):
            to_dense(kind(model, loss, params, data[1:]))


def wide(z, y):
    return z.flatten(1).norm(dim=1).mean()


REFUSED = {
    "no second derivative": (nn.MultiMarginLoss(), (5,), "MultiMarginLoss .*second derivative"),
    "wide": (wide, (2, 12), r"wide has no exact curvature .* 24 Lanczos steps"),
    "l1": (nn.L1Loss(), (5,), "L1Loss has no curvature"),
    "concave": (lambda z, y: -z.square().mean(), (5,), "no curvature"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_by_name(name):
    loss, shape, message = REFUSED[name]
    model, X = network(*shape)
    y = torch.randint(3, shape) if "Multi" in message else torch.rand(*shape, 3)
    for kind in (KFACLinearOperator, EKFACLinearOperator, FisherMCLinearOperator):
        operator = kind(model, loss, params_of(model), [(X, y)])
        with pytest.raises(UnsupportedLossError, match=message):
            operator @ torch.ones(operator.shape[1])


def test_what_is_no_loss_is_refused():
    model, X = network(5)
    data, params = [(X, torch.rand(5, 3))], params_of(model)
    for kind in (KFACLinearOperator, FisherMCLinearOperator):
        with pytest.raises(ValueError, match="must be a function"):
            kind(model, nn.HuberLoss, params, data)
        with pytest.raises(ValueError, match="reduction must be"):
            kind(model, nn.HuberLoss(reduction="none"), params, data)
        with pytest.raises(ValueError, match="must return a scalar"):
            to_dense(kind(model, lambda z, y: z - y, params, data))
        with pytest.raises(ValueError, match="does not depend on the predictions"):
            to_dense(kind(model, lambda z, y: y.sum(), params, data))
    with pytest.raises(ValueError, match="loss_average must be None exactly"):
        KFACLinearOperator(model, nn.HuberLoss(reduction="sum"), params, data)


@pytest.mark.parametrize("loss", [log_cosh, nn.HuberLoss()], ids=["log-cosh", "huber"])
def test_low_precision_models(loss):
    """The loss sees what it sees in training."""
    model, X = network(5)
    y = torch.rand(5, 3)
    args = params_of(model), [(X, y)]
    exact = to_dense(KFACLinearOperator(model, loss, *args, fisher_type="type-2"))
    model, X, y = model.bfloat16(), X.bfloat16(), y.bfloat16()
    K = KFACLinearOperator(model, loss, params_of(model), [(X, y)], fisher_type="type-2")
    found = K @ torch.eye(K.shape[1], dtype=torch.bfloat16)
    assert relative(found.double(), exact) < 0.05  # some units of bfloat16
