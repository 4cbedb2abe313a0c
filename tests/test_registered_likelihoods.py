"""Losses whose likelihood a user states: seen in the loop and by the operators, else unchanged."""

import functools
import pickle
from dataclasses import dataclass

import pytest
import torch
from kfac_cases import to_dense
from torch import Generator, Tensor, nn

import kfacopt
from kfacopt import EKFACLinearOperator, FisherMCLinearOperator, KFACLinearOperator, KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
SIGMAS = 6.0
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
Y = torch.linspace(-3, 3, 18, dtype=torch.float64).reshape(6, 3).cos()


@dataclass(frozen=True, eq=False)
class StudentT(kfacopt.Elementwise):
    degrees: float = 5.0

    def second_derivative(self, output):
        return torch.full_like(output, (self.degrees + 1) / (self.degrees + 3))


@kfacopt.register_likelihood(lambda z, y, nu=5.0, reduction="mean": StudentT(reduction, degrees=nu))
def student_t(z, y, nu=5.0, reduction="mean"):
    """Student's t."""
    loss = (nu + 1) / 2 * ((z - y) ** 2 / nu).log1p()
    return loss.mean() if reduction == "mean" else loss.sum()


@dataclass(frozen=True, eq=False)
class VonMises(kfacopt.Elementwise):
    concentration: float = 2.0

    def second_derivative(self, output):
        kappa = output.new_full((), self.concentration)
        ratio = torch.special.i1(kappa) / torch.special.i0(kappa)
        return torch.full_like(output, self.concentration * float(ratio))

    def draw_gradient(self, output, generator):
        angles = torch.linspace(-torch.pi, torch.pi, 4001, dtype=output.dtype)[:-1]
        density = (self.concentration * angles.cos()).exp()
        drawn = torch.multinomial(density, output.numel(), True, generator=generator)
        return -self.concentration * angles[drawn].sin().reshape(output.shape)


@kfacopt.register_likelihood(lambda z, y: VonMises("sum"))
def von_mises(z, y):
    return -2.0 * (z - y).cos().sum()


@dataclass(frozen=True, eq=False)
class LogCosh(kfacopt.Elementwise):
    target: Tensor | None = None

    def second_derivative(self, output):
        return 1 - (output - self.target).tanh() ** 2


@kfacopt.register_likelihood(lambda module, z, y: LogCosh("mean", target=y.detach()))
class LogCoshLoss(nn.Module):
    def forward(self, z, y):
        return (z - y).cosh().log().mean()


class Shifted(LogCoshLoss):
    def forward(self, z, y):
        return (z - y - 1).cosh().log().mean()


def log_cosh(z, y):
    return (z - y).cosh().log().mean()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class WithLoss(nn.Module):
    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x, y):
        return self.loss(self.net(x), y)


def grad_output_factor(loss, fisher_type="type-2", inside=False, **options):
    """Return the factor of the last layer after one step, and of how many objectives it is told."""
    model = mlp()
    net = WithLoss(model, loss) if inside else model
    defaults = {"lr": 0.0, "factor_update_interval": 1, "ema_decay": 0.0}
    optimizer = KFACOptimizer(net.parameters(), fisher_type=fisher_type, **defaults, **options)
    (net(X, Y) if inside else loss(model(X), Y)).backward()
    optimizer.step()
    return optimizer.factors("net.2" if inside else "2").grad_output_factor


USES = {
    "function": lambda z, y: student_t(z, y),
    "keywords": lambda z, y: student_t(z=z, y=y),
    "options": lambda z, y: student_t(z, y, 5.0) * 1.0,
    "sum": lambda z, y: student_t(z, y, reduction="sum") / 18,
    "of an output's part": lambda z, y: student_t(z[:, :], y),
}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("use", USES)
def test_the_optimizer_sees_the_fisher_that_was_stated(use, inside):
    """(ν + 1) / (ν + 3) / 3 for each of three outputs; the Hessian differs from row to row."""
    G = grad_output_factor(USES[use], inside=inside)
    assert torch.allclose(G, 6 / 8 / 3 * torch.eye(3), atol=TOLERANCE)


def test_another_fisher_than_the_hessian():
    stated = grad_output_factor(von_mises)
    ratio = float(torch.special.i1(torch.tensor(2.0)) / torch.special.i0(torch.tensor(2.0)))
    assert torch.allclose(stated, 6 * 2 * ratio * torch.eye(3), atol=TOLERANCE)
    found = grad_output_factor(lambda z, y: -2.0 * (z - y).cos().sum())
    z = mlp()(X).detach()
    h = (2 * (z - Y).cos()).clamp(min=0).sum(0)
    assert torch.allclose(found.diagonal(), h, atol=TOLERANCE)


def test_drawn_gradients_have_the_stated_second_moment():
    z, generator = torch.zeros(20_000), Generator().manual_seed(0)
    for likelihood in (StudentT("sum"), VonMises("sum")):
        squares = likelihood.sample_gradient(z, torch.ones_like(z), generator).square()
        allowed = SIGMAS * float(squares.std()) / len(z) ** 0.5
        assert abs(float(squares.mean() - likelihood.second_derivative(z)[0])) < allowed


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_a_class_with_its_true_second_derivative(inside):
    stated = grad_output_factor(LogCoshLoss(), inside=inside)
    found = grad_output_factor(log_cosh)
    assert torch.allclose(stated, found, atol=TOLERANCE)
    assert not torch.allclose(grad_output_factor(Shifted()), stated, rtol=1e-2)


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_other_fisher_types(fisher_type):
    """Of log-cosh they are what is found for it by hand: the same draws, the same gradients."""
    stated, found = (grad_output_factor(loss, fisher_type) for loss in (LogCoshLoss(), log_cosh))
    assert torch.allclose(stated, found, atol=TOLERANCE)


def test_self_tuning_steps():
    model = mlp()
    optimizer = KFACOptimizer(model.parameters(), lr="auto")
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = student_t(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


OPERATORS = (KFACLinearOperator, EKFACLinearOperator)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("average", ["batch", None])
def test_operators(operator, average):
    """On one linear layer, and a curvature that does not vary, both are exact."""
    model = nn.Linear(4, 3, bias=False)
    reduction = "mean" if average else "sum"
    loss = functools.partial(student_t, reduction=reduction)
    data = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    params = list(model.parameters())
    K = operator(model, loss, params, data, fisher_type="type-2", loss_average=average)
    expected = 6 / 8 * torch.kron(torch.eye(3), X.T @ X) / (18 if average else 1)
    assert torch.allclose(to_dense(K), expected, atol=TOLERANCE)


def test_operators_of_a_class():
    params = list((model := mlp()).parameters())
    for kind in (*OPERATORS, FisherMCLinearOperator):
        stated, found = (
            to_dense(kind(model, loss, params, [(X, Y)])) for loss in (LogCoshLoss(), log_cosh)
        )
        assert torch.allclose(stated, found, atol=TOLERANCE)


def test_the_sampled_fisher():
    model = nn.Linear(4, 3, bias=False)
    F = FisherMCLinearOperator(model, student_t, [model.weight], [(X, Y)], mc_samples=3000)
    expected = 6 / 8 * torch.kron(torch.eye(3), X.T @ X) / 18
    assert float((to_dense(F) - expected).norm() / expected.norm()) < 0.15  # 3,000 samples: 5 %


def test_targets_with_gradients_are_like_those_of_any_loss():
    """The likelihood is about the first argument alone."""

    def both(loss):
        return grad_output_factor(lambda z, y: loss(z, z.roll(1, 0)))

    assert torch.allclose(
        both(student_t), both(lambda z, y: 3 * ((z - y) ** 2 / 5).log1p().mean()), atol=TOLERANCE
    )


def test_without_an_optimizer_nothing_changes():
    assert student_t.__name__ == "student_t"
    assert student_t.__doc__ == "Student's t."
    assert pickle.loads(pickle.dumps(student_t)) is student_t
    z = X[:, :3].clone().requires_grad_()
    plain = student_t.__wrapped__
    assert torch.equal(student_t(z, Y, nu=3.0), plain(z, Y, nu=3.0))
    (found,), (expected,) = (torch.autograd.grad(f(z, Y), z) for f in (student_t, plain))
    assert torch.equal(found, expected)
    assert torch.equal(torch.func.vmap(student_t)(z, Y), torch.stack([*map(plain, z, Y)]))


def test_what_cannot_be_registered():
    rule = kfacopt.register_likelihood(lambda z, y: StudentT("mean"))
    with pytest.raises(TypeError, match=r"decorates a function or a class of nn\.Module"):
        rule(LogCosh)
    with pytest.raises(TypeError, match="decorates a function"):
        rule(LogCoshLoss())
    with pytest.raises(TypeError, match="has no argument for z"):
        rule(lambda: 0)
    averaged = kfacopt.register_likelihood(lambda z, y: StudentT("average"))(lambda z, y: z.sum())
    with pytest.raises(ValueError, match="reduction must be"):
        to_dense(KFACLinearOperator(model := mlp(), averaged, [*model.parameters()], [(X, Y)]))
