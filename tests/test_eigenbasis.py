"""Eigenbases that follow a factor, eigenvalues that follow the bases, and products of factors."""

import numpy as np
import pytest
import torch

from kfacopt.linalg import eigenbasis
from kfacopt.linalg.eigenbasis import (
    off_diagonal_share,
    rotated_eigenvalues,
)
from kfacopt.linalg.eigenspaces import levels_of
from kfacopt.linalg.kronecker import DecompositionError, KroneckerProduct

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
SHARE = 0.01
SIDE = 12


def refreshed_basis(A, basis, tolerance, levels=None):
    """The basis alone; an earlier one had as levels those of the earlier factor, or none close."""
    if basis is not None and levels is None:
        levels = (levels_of(torch.arange(A.shape[-1]).expand(A.shape[:2]) + 1.0, A.dtype),)
    return eigenbasis.refreshed_basis(A, basis, levels or (), tolerance)[0]


def factor(seed=0, side=SIDE, blocks=2, rank=None):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(blocks, side, rank or side, generator=generator)
    spectrum = torch.logspace(0, -3, rank or side)
    return (root * spectrum) @ root.mT


def orthonormal(side=SIDE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(2, side, side, generator=generator))[0]


def test_the_first_basis_is_that_of_the_eigenvectors():
    A = factor()
    Q = refreshed_basis(A, None, SHARE)
    assert torch.allclose(Q.mT @ Q, torch.eye(SIDE).expand(2, -1, -1), atol=TOLERANCE)
    assert (off_diagonal_share(Q.mT @ A @ Q) < TOLERANCE).all()


def test_a_basis_that_still_fits_is_left_alone():
    A = factor()
    Q = refreshed_basis(A, None, SHARE)
    nearby = A + 1e-3 * A.norm() * orthonormal()[:, :1].mT @ orthonormal()[:, :1]
    assert 0 < off_diagonal_share(Q.mT @ nearby @ Q).max() < SHARE
    assert refreshed_basis(nearby, Q, SHARE) is Q


def test_a_basis_that_does_not_fit_is_made_anew():
    A, Q = factor(1), refreshed_basis(factor(0), None, SHARE)
    assert off_diagonal_share(Q.mT @ A @ Q).max() > 0.3
    assert torch.equal(refreshed_basis(A, Q, SHARE), refreshed_basis(A, None, SHARE))


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_without_full_rank(rank):
    A, Q = factor(1, rank=rank), refreshed_basis(factor(0), None, SHARE)
    Q = refreshed_basis(A, Q, SHARE)
    assert torch.allclose(Q.mT @ Q, torch.eye(SIDE).expand(2, -1, -1), atol=TOLERANCE)
    assert (off_diagonal_share(Q.mT @ A @ Q) <= SHARE).all()
    zero = torch.zeros_like(A)
    assert refreshed_basis(zero, Q, SHARE) is Q


def test_whether_a_basis_fits_does_not_depend_on_how_it_lies_in_an_eigenspace():
    """There A must be a multiple of I, which it is in every basis or in none."""
    for extra, stays in ((0.0, True), (0.5, False)):
        A, levels = eigenbasis.refreshed_basis(factor(rank=3), None, (), SHARE)
        null = A[..., : SIDE - 3]  # eigenvalues rise
        spread = torch.diag(torch.linspace(0, extra, SIDE - 3))
        later = factor(rank=3) + null @ spread @ null.mT
        turn = torch.linalg.qr(torch.randn(2, SIDE - 3, SIDE - 3))[0]
        for Q in (A, torch.cat([null @ turn, A[..., SIDE - 3 :]], -1)):
            assert (refreshed_basis(later, Q, SHARE, levels) is Q) == stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_off_diagonal_share_is_exact_where_it_is_small(dtype, size):
    """Also where squares of the entries have no place in the dtype."""
    for share in (0.0, 1e-6, 1e-4, 0.5):
        matrix = torch.tensor([[[3.0, share], [share, 4.0]]], dtype=torch.float64)
        expected = (2 * share**2 / (25 + 2 * share**2)) ** 0.5
        found = off_diagonal_share((size * matrix).to(dtype)).item()
        assert found == pytest.approx(expected, rel=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["exact", "factored"])
def test_singular_products_are_singular_whatever_rounding_made_of_them(dtype, method):
    """An eigenvalue that is 0 comes out as ± eps; the sign is the processor's."""
    eps, regular = torch.finfo(dtype).eps, factor(1, blocks=1)
    Q = orthonormal()[:1]
    for ulps in (-1.0, -0.5, 0.0, 0.5, 1.0):
        values = torch.linspace(1, 2, SIDE)
        values[0] = ulps * eps
        singular = ((Q * values) @ Q.mT).to(dtype)
        singular = (singular + singular.mT) / 2
        for sides in ((singular, regular.to(dtype)), (regular.to(dtype), singular)):
            product = KroneckerProduct(*sides)
            with pytest.raises(DecompositionError, match="singular"):
                product.inverse(0.0, method)
            assert product.logdet() == -torch.inf
            damped = product.inverse(1e-2, method)
            assert bool(damped.apply(torch.ones(1, SIDE, SIDE, dtype=dtype)).isfinite().all())
    alone = KroneckerProduct(torch.tensor([[1.0, 1e-20]]), torch.tensor([[1.0, 2.0]]))
    assert torch.isclose(alone.logdet(), torch.tensor([1.0, 1e-20, 2.0, 2e-20]).log().sum())


def test_diagonal_factors_have_no_basis_and_bad_ones_raise():
    assert refreshed_basis(torch.rand(2, 5), None, SHARE) is None
    bad = factor()
    bad[0, 0, 0] = torch.nan
    for basis in (None, orthonormal()):
        with pytest.raises(DecompositionError, match="NaN or infinite"):
            refreshed_basis(bad, basis, SHARE)


@pytest.mark.parametrize("change", ["both", "one", "none"])
@pytest.mark.parametrize("identity", [False, True])
def test_eigenvalues_become_the_diagonal_in_the_new_basis(change, identity):
    values = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    old = (orthonormal(4, 1), None if identity else orthonormal(5, 2))
    new_g = old[0] if change == "none" else orthonormal(4, 3)
    new_a = old[1] if identity or change != "both" else orthonormal(5, 4)
    rotated = rotated_eigenvalues(values, old, (new_g, new_a))
    eye = torch.eye(5)
    for b in range(2):
        Q, P = (
            torch.kron(g[b].contiguous(), (eye if a is None else a[b]).contiguous())
            for g, a in (old, (new_g, new_a))
        )
        matrix = Q @ torch.diag(values[b].flatten()) @ Q.T
        expected = (P.T @ matrix @ P).diagonal().reshape(4, 5)
        assert torch.allclose(rotated[b], expected, atol=TOLERANCE)
    if change == "none":
        assert torch.equal(rotated, values)


def test_a_reordered_basis_permutes_the_eigenvalues():
    values, Q = torch.rand(2, 4, 5), (orthonormal(4, 1), orthonormal(5, 2))
    order = torch.tensor([3, 1, 0, 2])
    rotated = rotated_eigenvalues(values, Q, (Q[0][..., order], Q[1]))
    assert torch.allclose(rotated, values[:, order], atol=TOLERANCE)


# Products of factors ------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(
    ("groups", "d_out", "widths"),
    [(1, 5, (4, 1)), (1, 600, (500, 1)), (1, 530, (501,)), (1, 1001, (261, 1)), (3, 300, (299, 1))],
)
def test_a_kronecker_product_times_columns_is_the_dense_one(groups, d_out, widths, diagonal):
    """Small parts are joined by a copy, large ones written side by side, odd widths cut in two."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d_in = sum(widths)
    G, A, X = draw(groups, d_out, d_out), draw(groups, d_in, d_in), draw(groups, d_out, d_in)
    G, A = G + G.mT, A + A.mT
    if diagonal:
        G = G.diagonal(dim1=-2, dim2=-1)
    with torch.no_grad():
        found = KroneckerProduct(G, A).apply_columns(X.split(widths, dim=-1))
    with_graph = KroneckerProduct(G, A).apply_columns([x.requires_grad_() for x in found])
    assert all(x.requires_grad for x in with_graph)
    found = [x.detach() for x in found]
    expected = np.stack(
        [
            (np.diag(g) if diagonal else g) @ x @ a
            for g, x, a in zip(G.numpy(), X.numpy(), A.numpy(), strict=True)
        ]
    )
    assert [x.shape[-1] for x in found] == [*widths]
    assert all(x.is_contiguous() for x in found)
    np.testing.assert_allclose(torch.cat(found, dim=-1).numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(KroneckerProduct(G, A).apply(X), expected, rtol=1e-9, atol=1e-9)
