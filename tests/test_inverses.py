"""Inverses by conjugate gradients and by the Neumann series, against dense solves in float64."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator
from scipy.sparse.linalg import cg as scipy_cg
from torch import nn

from kfacopt import (
    CGConvergenceWarning,
    CGInverseLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    NeumannConvergenceWarning,
    NeumannInverseLinearOperator,
    NotPositiveDefiniteError,
)
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.structured import DenseLinearOperator

SIZE = 30
COLUMNS = 4
DEFAULT_TOL = 1e-5
EXACT = 1e-10  # relative error of a solution solved to a tolerance of 1e-12
ILL_CONDITION = 1e6

pytestmark = pytest.mark.usefixtures("float64")


def spd(size: int = SIZE, condition: float = 1e2) -> torch.Tensor:
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    return basis * torch.logspace(0, np.log10(condition), size) @ basis.T


class CountingOperator(DenseLinearOperator):
    """Records how many columns each product had."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.columns = []

    def _matmat_tensor(self, X):
        self.columns.append(X.shape[1])
        return super()._matmat_tensor(X)


# Conjugate gradients ------------------------------------------------------------------------------


def test_default_tolerance_is_kept_by_the_true_residual():
    A, B = spd(condition=ILL_CONDITION), torch.randn(SIZE, COLUMNS) * torch.logspace(-8, 8, COLUMNS)
    inverse = CGInverseLinearOperator(A)
    assert inverse.last_solve is None
    X = inverse @ B
    residuals = (B - A @ X).norm(dim=0)
    assert (residuals <= DEFAULT_TOL * B.norm(dim=0)).all()
    report = inverse.last_solve
    assert torch.allclose(report.residual_norms, residuals, rtol=1e-3)
    assert torch.allclose(report.tolerances, DEFAULT_TOL * B.norm(dim=0))
    assert report.converged.all()
    assert (report.iterations > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solution(dtype):
    A, B = spd(), torch.randn(SIZE, COLUMNS)
    inverse = CGInverseLinearOperator(A.to(dtype))
    eps = torch.finfo(dtype).eps
    inverse.set_cg_hyperparameters(tol=100 * eps)
    exact = torch.linalg.solve(A, B)
    error = ((inverse @ B.to(dtype)) - exact).norm() / exact.norm()
    assert error < 100 * eps * 1e2  # the tolerance times the condition number


def test_iterates_are_scipys():
    A, b = spd(condition=10).numpy(), np.random.default_rng(0).standard_normal(SIZE)
    ours, theirs = [], []
    inverse = CGInverseLinearOperator(A)
    preconditioner = np.diag(1 / np.diag(A))
    start = np.ones(SIZE)
    inverse.set_cg_hyperparameters(x0=start, M=preconditioner, callback=ours.append)
    x = inverse @ b
    expected, _ = scipy_cg(
        A, b, x0=start, atol=0.0, M=preconditioner, callback=lambda xk: theirs.append(xk.copy())
    )
    assert len(ours) == len(theirs) == inverse.last_solve.iterations.item()
    assert all(type(xk) is np.ndarray and xk.shape == (SIZE,) for xk in ours)
    np.testing.assert_allclose(ours, theirs, atol=1e-8)
    np.testing.assert_allclose(x, expected, atol=1e-8)


def test_callback_gets_what_is_multiplied():
    inverse = CGInverseLinearOperator(spd())
    seen = []
    inverse.set_cg_hyperparameters(callback=seen.append)
    X = inverse @ torch.randn(SIZE, COLUMNS)
    assert seen[-1].shape == (SIZE, COLUMNS)
    assert torch.equal(seen[-1], X)
    assert len({id(x) for x in seen}) == len(seen) == inverse.last_solve.iterations.max()
    inverse @ torch.randn(SIZE)
    assert seen[-1].shape == (SIZE,)


def test_columns_share_products_and_leave_when_converged():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    A = CountingOperator(values.diag())
    # Right-hand sides with 1, 2, 5 and no eigenvectors need as many iterations.
    B = torch.zeros(5, 4)
    B[0, 0], B[:2, 1], B[:, 2] = 1.0, 1.0, 1.0
    inverse = CGInverseLinearOperator(A)
    inverse.set_cg_hyperparameters(tol=1e-12)
    X = inverse @ B
    assert torch.allclose(X, B / values[:, None])
    assert inverse.last_solve.iterations.tolist() == [1, 2, 5, 0]
    assert A.columns == [3, 2, 1, 1, 1, 3]  # the last one recomputes the residuals


def test_columns_do_not_influence_each_other():
    inverse, B = CGInverseLinearOperator(spd(condition=10)), torch.randn(SIZE, COLUMNS)
    together = inverse @ B
    alone = torch.stack([inverse @ b for b in B.T], dim=1)
    assert torch.allclose(together, alone, rtol=1e-6)


def test_zero_right_hand_side():
    inverse = CGInverseLinearOperator(spd())
    inverse.set_cg_hyperparameters(x0=torch.ones(SIZE))
    assert torch.equal(inverse @ torch.zeros(SIZE), torch.zeros(SIZE))
    assert inverse.last_solve.converged.all()
    X = inverse @ torch.stack([torch.zeros(SIZE), torch.ones(SIZE)], dim=1)
    assert torch.equal(X[:, 0], torch.zeros(SIZE))
    assert X.isfinite().all()
    assert X[:, 1].norm() > 0


def test_start():
    A, B = spd(), torch.randn(SIZE, COLUMNS)
    inverse = CGInverseLinearOperator(A)
    X = torch.linalg.solve(A, B)
    for x0 in (X, X.numpy(), X.float()):
        inverse.set_cg_hyperparameters(x0=x0)
        assert torch.allclose(inverse @ B, X, rtol=1e-4)
        assert inverse.last_solve.iterations.max() == 0
    inverse.set_cg_hyperparameters(x0=X[:, 0])
    inverse @ B
    assert inverse.last_solve.iterations[0] == 0
    assert (inverse.last_solve.iterations[1:] > 0).all()
    inverse.set_cg_hyperparameters(x0=X[:, :2])
    with pytest.raises(ValueError, match="x0 has 2 columns, the right-hand side has 4"):
        inverse @ B
    for bad in (X[1:], torch.ones(1, SIZE, 1), np.ones(SIZE + 1)):
        with pytest.raises(ValueError, match="x0 must have the shape"):
            inverse.set_cg_hyperparameters(x0=bad)
    with pytest.raises(ValueError, match="x0 must be real"):
        inverse.set_cg_hyperparameters(x0=1j * X)
    with pytest.raises(ValueError, match="x0: A does not act on lists"):
        inverse.set_cg_hyperparameters(x0=[X])


def test_drift_of_the_recurrence_is_corrected():
    A, b = spd(), torch.randn(SIZE)
    inverse = CGInverseLinearOperator(A)
    # From so far away, round-off is larger than the tolerance: only a restart can meet it.
    inverse.set_cg_hyperparameters(x0=1e14 * torch.randn(SIZE))
    x = inverse @ b
    assert inverse.last_solve.converged.all()
    assert (b - A @ x).norm() <= DEFAULT_TOL * b.norm()


@pytest.mark.parametrize(
    "form",
    [
        lambda M: M,
        lambda M: M.numpy(),
        lambda M: csr_array(M.numpy()),
        lambda M: aslinearoperator(M.numpy()),
        DenseLinearOperator,
    ],
    ids=["tensor", "array", "sparse", "SciPy", "ours"],
)
def test_preconditioner(form):
    A, b = spd(condition=ILL_CONDITION), torch.randn(SIZE)
    inverse = CGInverseLinearOperator(A)
    inverse.set_cg_hyperparameters(M=form(torch.linalg.inv(A)))
    x = inverse @ b
    assert inverse.last_solve.iterations.item() == 1
    assert (b - A @ x).norm() <= DEFAULT_TOL * b.norm()


def test_absolute_tolerance():
    A, b = spd(), torch.randn(SIZE)
    inverse = CGInverseLinearOperator(A)
    inverse.set_cg_hyperparameters(tol=0.0, atol=0.3)
    x = inverse @ b
    assert 0.3e-3 < (b - A @ x).norm() <= 0.3
    inverse.set_cg_hyperparameters()  # back to the defaults
    assert (b - A @ (inverse @ b)).norm() <= DEFAULT_TOL * b.norm()


def test_maxiter_is_told():
    A, B = spd(condition=ILL_CONDITION), torch.randn(SIZE, COLUMNS)
    B[:, 0] = 0
    inverse = CGInverseLinearOperator(A)
    inverse.set_cg_hyperparameters(maxiter=3)
    with pytest.warns(CGConvergenceWarning, match=r"3 of 4 columns .* after maxiter=3 iterations"):
        X = inverse @ B
    assert inverse.last_solve.iterations.tolist() == [0, 3, 3, 3]
    assert inverse.last_solve.converged.tolist() == [True, False, False, False]
    assert torch.allclose(inverse.last_solve.residual_norms, (B - A @ X).norm(dim=0))


def test_tolerance_beyond_the_dtype_is_told():
    A, b = spd().float(), torch.randn(SIZE).float()
    inverse = CGInverseLinearOperator(A)
    inverse.set_cg_hyperparameters(tol=0.0)
    with pytest.warns(CGConvergenceWarning, match="rounding in torch.float32"):
        x = inverse @ b
    assert x.isfinite().all()


INDEFINITE = {
    "indefinite": torch.tensor([1.0, -2.0, 3.0]).diag(),
    "negative": -torch.eye(3),
    "zero": torch.zeros(3, 3),
}


@pytest.mark.parametrize("matrix", INDEFINITE.values(), ids=INDEFINITE)
def test_not_positive_definite(matrix):
    inverse = CGInverseLinearOperator(matrix.double())
    with pytest.raises(NotPositiveDefiniteError, match=r"A is not positive definite.*damping"):
        inverse @ torch.ones(3)
    damped = DenseLinearOperator(matrix.double())
    damped = damped + 2.5 * IdentityLinearOperator(damped)
    x = CGInverseLinearOperator(damped) @ torch.ones(3)
    assert torch.allclose(damped @ x, torch.ones(3), rtol=1e-4)


def test_bad_preconditioners():
    inverse = CGInverseLinearOperator(spd())
    inverse.set_cg_hyperparameters(M=-torch.eye(SIZE))
    with pytest.raises(NotPositiveDefiniteError, match="M is not positive definite"):
        inverse @ torch.ones(SIZE)
    with pytest.raises(ValueError, match="M must have A's shape"):
        inverse.set_cg_hyperparameters(M=torch.eye(SIZE + 1))
    with pytest.raises(ValueError, match="M must be real"):
        inverse.set_cg_hyperparameters(M=aslinearoperator(np.eye(SIZE, dtype=complex)))


def test_not_finite():
    inverse = CGInverseLinearOperator(spd())
    with pytest.raises(ValueError, match="NaN or infinite"):
        inverse @ torch.full((SIZE,), torch.nan)
    broken = CGInverseLinearOperator(torch.full((2, 2), torch.nan))
    with pytest.raises(FloatingPointError, match=r"A: .* is NaN"):
        broken @ torch.ones(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1.0}, "tol must be finite and at least 0, got -1.0"),
        ({"tol": float("nan")}, "tol must be finite"),
        ({"atol": -1.0}, "atol must be finite"),
        ({"maxiter": 0}, "maxiter must be an integer of at least 1"),
        ({"maxiter": 2.5}, "maxiter must be an integer"),
        ({"maxiter": True}, "maxiter must be an integer .* got True"),
        ({"tol": "a"}, "tol must be finite and at least 0, got 'a'"),
        ({"tol": None}, "tol must be finite and at least 0, got None"),
        ({"atol": True}, "atol must be finite"),
        ({"x0": "a"}, "x0 must be an array of numbers or a tensor, got 'a'"),
        ({"callback": 3}, "callback must be a function or None, got 3"),
    ],
    ids=str,
)
def test_cg_hyperparameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        CGInverseLinearOperator(spd()).set_cg_hyperparameters(**options)


INVERSES = [CGInverseLinearOperator, NeumannInverseLinearOperator]


@pytest.mark.parametrize("inverse_class", INVERSES)
def test_operands_of_inverses(inverse_class):
    with pytest.raises(ValueError, match="A must be square"):
        inverse_class(torch.ones(2, 3))
    with pytest.raises(ValueError, match="A must be real"):
        inverse_class(aslinearoperator(np.eye(3, dtype=complex)))
    with pytest.raises(ValueError, match="A must be real"):
        inverse_class(np.eye(3, dtype=complex))
    with pytest.raises(ValueError, match="must be real"):
        inverse_class(torch.eye(3, dtype=torch.complex128))
    with pytest.raises(TypeError, match="A must be a linear operator"):
        inverse_class("matrix")
    for A in (np.eye(3, dtype=np.float32), np.eye(3, dtype=int), aslinearoperator(np.eye(3))):
        assert inverse_class(A).torch_dtype == torch.float64
        assert inverse_class(A).device.type == "cpu"


def test_cg_is_its_own_adjoint():
    inverse = CGInverseLinearOperator(spd())
    assert inverse.T is inverse
    assert inverse.H is inverse


def damped_curvature(
    damping: float, hidden: tuple[int, ...] = (10,), layer: int | None = None
) -> tuple[LinearOperator, KFACLinearOperator]:
    """Return GGN + damping I and K-FAC of a network with inputs of very different scales."""
    torch.manual_seed(0)
    sizes = (8, *hidden, 3)
    modules = [m for d in pairwise(sizes) for m in (nn.Linear(*d), nn.Tanh())]
    model = nn.Sequential(*modules[:-1])
    X = torch.randn(300, 8) * torch.logspace(-1.5, 0.75, 8)
    params = list((model if layer is None else model[layer]).parameters())
    arguments = (model, nn.MSELoss(), params, [(X, torch.randn(300, 3))])
    ggn = GGNLinearOperator(*arguments)
    kfac = KFACLinearOperator(*arguments, fisher_type="type-2", separate_weight_and_bias=False)
    return ggn + damping * IdentityLinearOperator(ggn), kfac


# What K-FAC leaves out, the blocks between layers, is what keeps the whole network from more. (Nets
# of several hidden layers are another matter: there, plain CG profits from the cluster of
# eigenvalues at the damping, which the block-diagonal preconditioner tears apart.)
PRECONDITIONED = {
    "whole network": ({"damping": 1e-4}, 0.7),
    "first layer": ({"damping": 1e-4, "layer": 0}, 0.6),
    "last layer": ({"damping": 1e-3, "layer": 2}, 0.5),
}


@pytest.mark.parametrize(("options", "ratio"), PRECONDITIONED.values(), ids=PRECONDITIONED)
def test_kfac_as_preconditioner_cuts_the_iterations(options, ratio):
    damped, kfac = damped_curvature(**options)
    b = torch.randn(damped.shape[0], COLUMNS)
    inverse = CGInverseLinearOperator(damped)
    x = inverse @ b
    plain = inverse.last_solve.iterations
    inverse.set_cg_hyperparameters(M=kfac.inverse(options["damping"], method="exact"))
    preconditioned_x = inverse @ b
    assert (inverse.last_solve.iterations < ratio * plain).all()
    for solution in (x, preconditioned_x):
        assert ((b - damped @ solution).norm(dim=0) <= DEFAULT_TOL * b.norm(dim=0)).all()


def test_kfac_solves_a_linear_model_in_one_iteration():
    damped, kfac = damped_curvature(1e-4, hidden=())
    inverse = CGInverseLinearOperator(damped)
    inverse.set_cg_hyperparameters(M=kfac.inverse(1e-4, method="exact"))
    inverse @ torch.randn(damped.shape[0], COLUMNS)
    assert inverse.last_solve.iterations.tolist() == [1] * COLUMNS


def test_cg_with_parameter_lists():
    damped, kfac = damped_curvature(1e-2)
    inverse = CGInverseLinearOperator(damped)
    b = [torch.randn(shape) for shape in damped.in_shapes]
    x = inverse @ b
    assert [t.shape for t in x] == [t.shape for t in b]
    for residual, right in zip(damped @ x, b, strict=True):
        assert torch.allclose(residual, right, atol=1e-3)
    inverse.set_cg_hyperparameters(x0=x, M=kfac.inverse(1e-2))
    inverse @ b
    assert inverse.last_solve.iterations.item() == 0
    with pytest.raises(ValueError, match=r"x0\[0\] must have the shape"):
        inverse.set_cg_hyperparameters(x0=[torch.ones(3), *x[1:]])


def test_a_singular_system_without_a_solution_says_so():
    inverse = CGInverseLinearOperator(torch.tensor([1.0, 2.0, 0.0]).diag())
    with pytest.raises(
        (FloatingPointError, NotPositiveDefiniteError), match=r"(singular|positive).*damping"
    ):
        inverse @ torch.ones(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ulps", [-1.0, 0.0, 1.0])
def test_singular_systems_with_a_solution_are_solved_or_told(dtype, ulps):
    """Once all is round-off, the sign of pᵀ A p is a matter of chance, and no error."""
    eps = torch.finfo(dtype).eps
    for seed in range(4):
        torch.manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(SIZE, SIZE)).Q
        null = torch.full((SIZE // 2,), ulps * eps)
        values = torch.cat([null, torch.linspace(0.1, 1, SIZE // 2)])
        A = ((basis * values) @ basis.T).to(dtype)
        b = A.double() @ torch.randn(SIZE, COLUMNS)
        inverse = CGInverseLinearOperator(A)
        inverse @ b.to(dtype)
        assert inverse.last_solve.converged.all()
        inverse.set_cg_hyperparameters(tol=eps / 4)  # beyond what rounding allows
        with pytest.warns(CGConvergenceWarning, match="did not converge"):
            x = inverse @ b.to(dtype)
        residuals = (A.double() @ x.double() - b).norm(dim=0)
        # a residual is off by a few eps ‖x‖, and iterations end within a factor of it
        assert (residuals <= 100 * eps * (x.norm(dim=0) + b.norm(dim=0))).all()


# Neumann series -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_terms", [0, 1, 7])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_neumann_series_is_the_documented_sum(num_terms, scale):
    A = spd(condition=1.5) + 0.05 * torch.randn(SIZE, SIZE)
    # Where it stops early, it is not near the solution.
    inverse = NeumannInverseLinearOperator(A, num_terms, scale, check_nan=num_terms == 0)
    factor = torch.eye(SIZE) - scale * A
    series = scale * sum(torch.linalg.matrix_power(factor, k) for k in range(num_terms + 1))
    assert torch.allclose(inverse @ torch.eye(SIZE), series)
    assert torch.allclose(inverse.T @ torch.eye(SIZE), series.T)


def test_neumann_series_converges_to_the_inverse():
    A = spd(condition=5.0)
    inverse = NeumannInverseLinearOperator(A, num_terms=400, scale=0.3)
    exact = torch.linalg.inv(A)
    assert (inverse @ torch.eye(SIZE) - exact).norm() < EXACT * exact.norm()
    # With the default number of terms, the error along an eigenvector is (1 - scale λ)^101.
    inverse.set_neumann_hyperparameters(scale=0.02)
    with pytest.warns(NeumannConvergenceWarning):
        product = inverse @ torch.eye(SIZE)
    error = torch.linalg.matrix_norm(exact - product, 2)
    assert torch.isclose(error, torch.tensor(0.98**101), rtol=1e-6)


DIVERGENT_TERMS = {"finite": 20, "overflowing": 2000}


@pytest.mark.parametrize("num_terms", DIVERGENT_TERMS.values(), ids=DIVERGENT_TERMS)
def test_neumann_divergence_names_the_knob(num_terms):
    A, x = spd(condition=5.0), torch.ones(SIZE)  # eigenvalues up to 5 > 2 / scale
    inverse = NeumannInverseLinearOperator(A, num_terms=num_terms)
    with pytest.raises(ValueError, match=r"diverges.*decrease scale=1"):
        inverse @ x
    inverse.set_neumann_hyperparameters(num_terms=num_terms, check_nan=False)
    assert (inverse @ x).isfinite().all() == (num_terms == DIVERGENT_TERMS["finite"])


def test_neumann_does_not_call_a_null_space_divergence():
    A = torch.tensor([1.0, 0.0]).diag()
    inverse = NeumannInverseLinearOperator(A, num_terms=9)
    with pytest.warns(NeumannConvergenceWarning, match=r"in 1 of 1 columns: .*add damping"):
        product = inverse @ torch.ones(2)
    assert torch.allclose(product, torch.tensor([1.0, 10.0]))
    assert torch.equal(inverse @ torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("largest", [2.0, 2.0001, 2.5])
@pytest.mark.parametrize("num_terms", [100, 101])
def test_neumann_divergence_beside_a_part_that_converges(largest, num_terms):
    """The norm of a column hides a part that does not shrink behind one that did."""
    values = torch.cat([torch.linspace(0.5, 1.4, SIZE - 1), torch.tensor([largest])])
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE)).Q
    for A in (torch.tensor([0.5, largest]).diag(), basis * values @ basis.T):
        inverse = NeumannInverseLinearOperator(A, num_terms=num_terms)
        with pytest.raises(ValueError, match=r"diverges.*decrease scale=1"):
            inverse @ torch.ones(len(A))
        inverse.set_neumann_hyperparameters(num_terms, scale=0.9 * 2 / largest)
        error = inverse @ torch.ones(len(A)) - torch.linalg.solve(A, torch.ones(len(A)))
        assert error.abs().max() < 1e-3


def test_neumann_series_that_converge_slowly_are_summed_and_told():
    A = torch.tensor([1.0, 0.01]).diag()
    with pytest.warns(NeumannConvergenceWarning, match=r"0.99 times the one before.*36% are miss"):
        product = NeumannInverseLinearOperator(A) @ torch.ones(2)
    assert torch.allclose(product, torch.tensor([1.0, (1 - 0.99**101) / 0.01]))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_terms", [10, 100, 400])
@pytest.mark.parametrize("largest", [2.5, 2.7, 3.0, 3.4, 1e4, -0.25, -1e4])
def test_neumann_divergence_in_every_dtype(dtype, num_terms, largest):
    """Squares of terms overflow long before the terms; halves overflow at once."""
    A = torch.tensor([1.0, largest], dtype=dtype).diag()
    inverse = NeumannInverseLinearOperator(A, num_terms)
    columns = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]], dtype=dtype)
    assert torch.equal(inverse @ columns[:, [0, 2]], columns[:, [0, 2]])
    for x in (columns[:, 1], columns, 1e-4 * columns):
        with pytest.raises(ValueError, match="diverges"):
            inverse @ x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_neumann_sums_in_half_precision_keep_small_terms(dtype):
    """The error is that of the products and of the result, not that of a thousand sums."""
    values = torch.tensor([1.0, 0.5, 0.0625, 1.9375])  # exact in both dtypes
    inverse = NeumannInverseLinearOperator(values.to(dtype).diag(), 1000)
    # Products err by eps λ |t_k|, which costs the sum eps Σ |t_k|; the result is rounded once.
    bound = torch.finfo(dtype).eps * (values / (1 - (1 - values).abs()) + 1)
    for size in (1.0, 2.0**-10):
        x = inverse @ torch.full((4,), size, dtype=dtype)
        assert x.dtype == dtype
        assert ((x.double() / size * values - 1).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_neumann_judges_what_stands_above_its_round_off(dtype):
    """A part of 8 % of the right-hand side is nine tenths of the solution that is missing."""
    A, b = torch.tensor([1e-3, 1.0], dtype=dtype).diag(), torch.tensor([0.08, 1.0], dtype=dtype)
    with pytest.warns(NeumannConvergenceWarning, match="are missing"):
        NeumannInverseLinearOperator(A) @ b


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_neumann_takes_round_off_in_a_null_space_for_what_it_is(dtype):
    """A is singular, b in its range: the sum is near the solution there, whatever rounding adds."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator)).Q
        values = torch.cat([torch.linspace(0.2, 1.4, 8), torch.zeros(12)]).double()
        A = basis * values @ basis.T
        b = A @ torch.randn(20, dtype=torch.float64, generator=generator)
        NeumannInverseLinearOperator(A.to(dtype)) @ b.to(dtype)  # warnings are errors


def test_neumann_results_beyond_the_dtype_are_named():
    A = torch.tensor([1.0, 2.0**-10], dtype=torch.float16).diag()
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        NeumannInverseLinearOperator(A, 8000) @ torch.full((2,), 100.0, dtype=torch.float16)


@pytest.mark.parametrize("unit", [1e-36, 1e-20, 1.0, 1e20, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_neumann_judges_in_any_unit(dtype, unit):
    x = torch.full((2,), unit, dtype=dtype)
    outcomes = {1.9: None, 0.5: None, 0.01: "36% are missing", 0.0: "99% are missing"}
    for value, message in outcomes.items():
        inverse = NeumannInverseLinearOperator(torch.tensor([1.0, value], dtype=dtype).diag())
        if message is None:
            inverse @ x
        else:
            with pytest.warns(NeumannConvergenceWarning, match=message):
                inverse @ x
    for value in (2.1, -0.1):
        with pytest.raises(ValueError, match="diverges"):
            NeumannInverseLinearOperator(torch.tensor([1.0, value], dtype=dtype).diag()) @ x


def test_neumann_tells_how_many_columns_are_far():
    A = torch.tensor([1.0, 0.01, 0.5]).diag()
    columns = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1e-1, 0.0]])
    inverse = NeumannInverseLinearOperator(A)
    with pytest.warns(NeumannConvergenceWarning, match="in 2 of 4 columns: .*add damping"):
        inverse @ columns.T
    # A small part of the right-hand side can be a large one of the solution.
    small = torch.tensor([1.0, 1e-4, 0.0])
    inverse = NeumannInverseLinearOperator(torch.tensor([1.0, 1e-4, 1.0]).diag())
    with pytest.warns(NeumannConvergenceWarning, match="are missing"):
        inverse @ small


FAR_SPECTRA = {
    "small": torch.logspace(-3, 0, SIZE, dtype=torch.float64),
    "near 2": 2 - torch.logspace(-3, 0, SIZE, dtype=torch.float64),
    "both": torch.cat([t := torch.logspace(-2.5, 0, SIZE // 2, dtype=torch.float64), 2 - t]),
    "tiny": torch.logspace(-6, 0, SIZE, dtype=torch.float64),
    "fine": torch.linspace(0.1, 1.9, SIZE, dtype=torch.float64),
}


@pytest.mark.parametrize("values", FAR_SPECTRA.values(), ids=FAR_SPECTRA)
@pytest.mark.parametrize("num_terms", [3, 30, 300, 3000])
def test_a_neumann_series_that_is_far_from_the_solution_warns(values, num_terms):
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE)).Q
    A, b = basis * values @ basis.T, torch.randn(SIZE)
    x = torch.linalg.solve(A, b)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = (NeumannInverseLinearOperator(A, num_terms) @ b - x).norm() / x.norm()
    # What is told is a lower bound: within a factor of three, nothing is overlooked.
    if caught:
        assert error > 0.1
        assert caught[0].category is NeumannConvergenceWarning
    else:
        assert error < 0.3


def test_neumann_takes_systems_that_are_singular_but_solvable():
    """Round-off beside the range neither grows to a warning nor to an error."""
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE)).Q
    values = torch.cat([torch.zeros(SIZE // 2), torch.linspace(0.5, 1.5, SIZE // 2)])
    for dtype in (torch.float32, torch.float64):
        A = (basis * values @ basis.T).to(dtype)
        b = A.double() @ torch.randn(SIZE, COLUMNS)
        x = NeumannInverseLinearOperator(A) @ b.to(dtype)
        exact = torch.linalg.pinv(A.double(), rtol=1e-3) @ b
        assert (x - exact).norm() < 1e3 * torch.finfo(dtype).eps * exact.norm()


def test_neumann_scales():
    A, x = spd(condition=5.0), torch.ones(SIZE)
    exact = torch.linalg.solve(A, x)
    negative = NeumannInverseLinearOperator(-A, num_terms=200, scale=-0.3)
    assert torch.allclose(negative @ x, -exact)
    for scale, outcome in ((1e-5, "raise scale=1e-05"), (1e-300, "raise scale=1e-300")):
        with pytest.warns(NeumannConvergenceWarning, match=outcome):
            NeumannInverseLinearOperator(A, scale=scale) @ x
    for scale in (-0.3, 1e5, 1e300):
        with pytest.raises(ValueError, match="diverges"):
            NeumannInverseLinearOperator(A, scale=scale) @ x


def test_neumann_names_operands_that_are_not_finite():
    inverse = NeumannInverseLinearOperator(torch.eye(2))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="x has NaN or infinite entries"):
            inverse @ torch.tensor([1.0, bad])
    inverse.set_neumann_hyperparameters(check_nan=False)
    assert (inverse @ torch.tensor([1.0, torch.nan])).isnan()[1]
    empty = torch.ones(2, 0)
    assert torch.equal(NeumannInverseLinearOperator(torch.eye(2)) @ empty, empty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_terms": -1}, "num_terms must be an integer of at least 0, got -1"),
        ({"num_terms": 1.5}, "num_terms must be an integer"),
        ({"scale": 0.0}, "scale must be a finite number other than 0"),
        ({"scale": float("inf")}, "scale must be a finite number"),
        ({"scale": "1"}, "scale must be a finite number"),
        ({"num_terms": True}, "num_terms must be an integer"),
        ({"check_nan": "no"}, "check_nan must be True or False, got 'no'"),
    ],
    ids=str,
)
def test_neumann_hyperparameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        NeumannInverseLinearOperator(spd(), **options)
    with pytest.raises(ValueError, match=message):
        NeumannInverseLinearOperator(spd()).set_neumann_hyperparameters(**options)
