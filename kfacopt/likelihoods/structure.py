"""Find the positive part of H = ∂²L/∂z² by products with it; what was found is kept in `found`.

L is any differentiable function of tensors z. The cheapest structure that H has is taken:

    tensors that do not see each other   each on its own
    diagonal                             h = (H u) / u, the same for two random vectors u
    categorical                          H_r = w_r (diag(p) − p pᵀ) for each row r, any p
    blocks of few entries                C products give them; a root each
    wider blocks                         Krylov spaces: √H⁺ ε by Lanczos, all rows at once
    no positive part                     the empirical Fisher: Σ_n (∂L/∂z_n)(∂L/∂z_n)ᵀ

Rows see each other or not: with signs s that are constant on rows, s ⊙ H (s ⊙ u) = H u tells.
Products are compared to `_ROUND_OFFS` of the dtype; what a comparison misses is smaller than that.

References:
    Martens (2020), https://arxiv.org/abs/1412.1193, sections 6 and 9, for the GGN and the Fisher.
    Chow & Saad (2014), https://doi.org/10.1137/130920587, for √H ε by Lanczos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.categorical import CrossEntropy
from kfacopt.likelihoods.found import KrylovRows, RowGradients, RowHessians, SecondDerivative
from kfacopt.likelihoods.interface import widened
from kfacopt.likelihoods.layouts import Layout, RowKind
from kfacopt.likelihoods.parts import CurvaturePart
from kfacopt.likelihoods.probing import Probing, Product, separating_signs
from kfacopt.likelihoods.roots import KrylovSpace, lanczos_rows, positive_root
from kfacopt.likelihoods.softmax_fit import softmax_fit

# Blocks of at most this width are formed: of rows, and of all entries together.
MAX_BLOCK = 32
MAX_SINGLE_BLOCK = 128
# How many numbers the roots of drawn rows' blocks may take, R C³; 512 blocks of 20 are less.
MAX_ROOT_WORK = 2**22
# Lanczos steps, at least and at most, for many narrow rows, and for one vector that is drawn, which
# then is off by 2 % (Cox's likelihood) to 18 % (InfoNCE) of its size, and its mean square by 2 %;
# and how many entries its vectors may have.
KRYLOV_STEPS = (4, 24)
ROW_STEPS = 10
DRAWN_STEPS = 12
MAX_KRYLOV_ENTRIES = 2**25
# Tolerances above this one cannot tell a wide softmax from a diagonal.
_COARSE = 5e-3
# How many entries products for the columns of blocks have at once.
MAX_COLUMN_ENTRIES = 2**22
# Samples that stand for a root of a block that is too wide to have one.
KRYLOV_SAMPLES = 8


def find_parts(
    values: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    product: Product | None,
    samples: int = KRYLOV_SAMPLES,
    exact: bool = True,
    seed: int = 0,
) -> list[CurvaturePart]:
    """Return the positive part of H = ∂²L/∂z², in its cheapest structure.

    Args:
        values: z, tensors of any shapes whose first axes count data; `None` where unknown.
        gradients: ∂L/∂z.
        product: H v for a tensor v for each z, or for `[V, *z.shape]` V such products; `None` if
            there is no second derivative.
        samples: How many vectors are drawn where a block is too wide to be formed.
        exact: Whether blocks are formed however many rows there are; else where that is fast.
        seed: Seeds what is drawn here.

    Returns:
        Parts, which together have every tensor once.
    """
    eps = max(torch.finfo(g.dtype).eps for g in gradients)
    wide = [widened(g) for g in gradients]
    known = [None if z is None else widened(z) for z in values]
    dtypes = [g.dtype for g in gradients]

    def widened_product(vectors: list[Tensor]) -> list[Tensor]:
        assert product is not None
        narrow = [v.to(dtype) for v, dtype in zip(vectors, dtypes, strict=True)]
        return [widened(x) for x in product(narrow)]

    probing = Probing(known, wide, widened_product, eps, Generator().manual_seed(seed))
    everything = tuple(range(len(wide)))
    if product is None or not all(g.numel() for g in gradients):
        return _empirical(probing, everything)
    groups, *first = probing.groups()
    v = probing.probe(everything)
    second = (v, widened_product(v))
    looks = [_Look.of(probing, own, *first, *second) for own in groups]
    return [part for look in looks for part in look.parts(samples, exact)]


def _empirical(probing: Probing, members: Sequence[int], why: str = "") -> list[CurvaturePart]:
    """Return the empirical Fisher of each of some tensors."""
    parts, kind = [], f"empirical ({why})" if why else "empirical"
    for k in members:
        layout = Layout("datum", (probing.gradients[k].shape,))
        rows = layout.join([probing.gradients[k]])
        found = (RowGradients("sum", rows), rows, rows.new_ones(len(rows)))
        parts.append(CurvaturePart((k,), layout, *found, kind))
    return parts


@dataclass(frozen=True, eq=False)
class _Look:
    """Two products with H, at tensors z that see each other, or at one.

    Attributes:
        probing: Makes further products.
        members: The tensors.
        u: A vector.
        Hu: H u.
        v: Another vector.
        Hv: H v.
        round_off: What entries of products may be off by.
    """

    probing: Probing
    members: tuple[int, ...]
    u: list[Tensor]
    Hu: list[Tensor]
    v: list[Tensor]
    Hv: list[Tensor]
    round_off: float

    @classmethod
    def of(cls, probing: Probing, members: tuple[int, ...], *looks: Sequence[Tensor]) -> _Look:
        """Take the members' tensors from u, H u, v, H v of all tensors."""
        u, Hu, v, Hv = ([x[k] for k in members] for x in looks)
        return cls(probing, members, u, Hu, v, Hv, probing.round_off(*Hu, *Hv))

    @property
    def _shapes(self) -> tuple[torch.Size, ...]:
        return tuple(x.shape for x in self.u)

    def parts(self, samples: int, exact: bool) -> list[CurvaturePart]:
        """Return the curvature of the members; see `find_parts` for the arguments."""
        join = Layout("all", self._shapes).join
        u, Hu, v, Hv = (join(x) for x in (self.u, self.Hu, self.v, self.Hv))
        if not bool(Hu.isfinite().all() & Hv.isfinite().all()):
            return self._not_finite()
        pairs = [*zip(self.members * 2, [*self.Hu, *self.Hv], strict=True)]
        if all(self.probing.is_zero(*pair) for pair in pairs):
            return _empirical(self.probing, self.members)
        asymmetry = (v * Hu - u * Hv).sum().abs()
        bound = (v * Hu).abs().sum() + (u * Hv).abs().sum()
        if bool(asymmetry > self.probing.tolerance * bound):
            zero = all(self.probing.is_zero(*pair, asymmetric=True) for pair in pairs)
            why = "" if zero else "second derivative not symmetric"
            return _empirical(self.probing, self.members, why)
        diagonal = self._is_diagonal()
        # In low precision the two are close where each row has many entries of about one size.
        if diagonal and self.probing.tolerance < _COARSE:
            return self._diagonal()
        found = self._categorical(diagonal)
        if found is not None:
            return [found]
        return self._diagonal() if diagonal else [self._blocks(samples, exact)]

    def _is_diagonal(self) -> bool:
        for u, Hu, v, Hv in zip(self.u, self.Hu, self.v, self.Hv, strict=True):
            ratios = (Hu / u).reshape(-1, 1), (Hv / v).reshape(-1, 1)
            if not self.probing.close(*ratios, self.round_off):
                return False
        return True

    def _diagonal(self) -> list[CurvaturePart]:
        parts = []
        for k, u, Hu, v, Hv in zip(self.members, self.u, self.Hu, self.v, self.Hv, strict=True):
            h = (Hu / u + Hv / v) / 2
            if bool((h > 0).any()):
                parts.append(self._entries(k, h, "diagonal"))
            else:
                parts += _empirical(self.probing, (k,))
        return parts

    def _diagonal_misfit(self) -> Tensor:
        """Return Σ (H u − h u)² as `SoftmaxFit.misfit` has it, where h was not fitted to u."""
        u, Hu, v, Hv = self.u[0], self.Hu[0], self.v[0], self.Hv[0]
        return (Hu - Hv / v * u).square().sum()

    def _not_finite(self) -> list[CurvaturePart]:
        return [
            self._entries(k, torch.full_like(x, torch.nan), "not finite")
            for k, x in zip(self.members, self.u, strict=True)
        ]

    def _entries(self, k: int, h: Tensor, kind: str) -> CurvaturePart:
        likelihood = SecondDerivative("sum", values=h)
        return CurvaturePart(
            (k,), None, likelihood, self.probing.value(k), torch.ones_like(h), kind
        )

    def _categorical(self, diagonal: bool) -> CurvaturePart | None:
        """Return H if it is that of cross entropy along an axis, with any weight for each row.

        Args:
            diagonal: Whether it is close to a diagonal as well; then if it is closer to this.
        """
        if len(self.members) > 1:
            return None
        (k,) = self.members
        looks = [self.u[0], self.v[0]], [self.Hu[0], self.Hv[0]]
        fit = softmax_fit(self.probing, k, *looks)
        if fit is None or (diagonal and bool(fit.misfit >= self._diagonal_misfit())):
            return None
        z, likelihood = fit.logits, CrossEntropy("sum")
        if fit.axis != z.ndim - 1 or z.ndim <= 2:
            return CurvaturePart((k,), None, likelihood, z, fit.weights, "categorical")
        layout = Layout("last", (z.shape,))  # as F.cross_entropy sees z after a view
        found = (likelihood, layout.join([z]), fit.weights.reshape(-1))
        return CurvaturePart((k,), layout, *found, "categorical")

    def _blocks(self, samples: int, exact: bool) -> CurvaturePart:
        layout = self._rows()
        alone = layout.kind != "all"
        name = "blocks" if alone else "mixed rows"
        fewest, most = KRYLOV_STEPS
        size = sum(x.numel() for x in self.u)
        most = ROW_STEPS if alone and layout.width <= MAX_BLOCK else most if exact else DRAWN_STEPS
        steps = min(most, layout.width, MAX_KRYLOV_ENTRIES // max(size, 1))
        likelihood: RowHessians | KrylovRows
        fast = exact or not alone or size * layout.width**2 <= MAX_ROOT_WORK
        if fast and layout.width <= (MAX_BLOCK if alone else MAX_SINGLE_BLOCK):
            likelihood = self._formed(layout)
        elif steps >= fewest:
            likelihood = self._krylov(layout, steps, samples)
            name += f", {steps} Lanczos steps"
        else:
            return self._empirical_rows("too large")
        if likelihood.is_zero:
            return self._empirical_rows("")
        z = layout.join([self.probing.value(k) for k in self.members])
        return CurvaturePart(self.members, layout, likelihood, z, z.new_ones(len(z)), name)

    def _empirical_rows(self, why: str) -> CurvaturePart:
        """Return the empirical Fisher of data whose tensors see each other."""
        layout = Layout("datum", self._shapes)
        if not layout.fits():
            layout = Layout("all", self._shapes)
        rows = layout.join([self.probing.gradients[k] for k in self.members])
        found = (RowGradients("sum", rows), rows, rows.new_ones(len(rows)))
        kind = f"empirical ({why})" if why else "empirical"
        return CurvaturePart(self.members, layout, *found, kind)

    def _rows(self) -> Layout:
        """Return the smallest rows that do not see each other."""
        few = sum(x.numel() for x in self.u) * KRYLOV_STEPS[0] <= MAX_KRYLOV_ENTRIES
        kinds: tuple[RowKind, ...] = ("last", "channels", "datum")
        if all(len(shape) <= 2 for shape in self._shapes):
            kinds = ("last", "datum")
        for layout in (Layout(kind, self._shapes) for kind in kinds):
            usable = layout.fits() and (few or layout.width <= MAX_BLOCK)
            if usable and self._are_alone(layout):
                return layout
        return Layout("all", self._shapes)

    def _are_alone(self, layout: Layout) -> bool:
        rows, expected = layout.join(self.u), layout.join(self.Hu)
        signs = [
            torch.tensor(numbers, dtype=rows.dtype, device=rows.device).unsqueeze(-1)
            for numbers in separating_signs(len(rows))
        ]
        # The first pair of signs tells nearly all losses whose rows do see each other.
        for some in (signs[:1], signs[1:]):
            products = self._products(layout, [s * rows for s in some])
            for s, product in zip(some, products, strict=True):
                if not self.probing.close(s * product, expected, self.round_off):
                    return False
        return True

    def _products(self, layout: Layout, vectors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield H v in rows for v that are given in rows `[R, C]`, many at once where they fit."""
        size = max(sum(x.numel() for x in self.u), 1)
        at_once = max(1, MAX_COLUMN_ENTRIES // size)
        for start in range(0, len(vectors), at_once):
            splits = [layout.split(x) for x in vectors[start : start + at_once]]
            if len(splits) == 1:
                yield layout.join(self.probing.product_of(self.members, splits[0]))
                continue
            stacked = [torch.stack(list(column)) for column in zip(*splits, strict=True)]
            products = self.probing.product_of(self.members, stacked)
            yield from (layout.join([x[k] for x in products]) for k in range(len(splits)))

    def _formed(self, layout: Layout) -> RowHessians:
        R, C = layout.join(self.u).shape
        unit = torch.eye(C, dtype=self.u[0].dtype, device=self.u[0].device)
        blocks = torch.stack([*self._products(layout, [e.expand(R, C) for e in unit])], -1)
        return RowHessians("sum", positive_root((blocks + blocks.mT) / 2, self._noise(C)))

    def _noise(self, width: int) -> float:
        """Return the share of a block's largest eigenvalue that round-off makes of 0."""
        return min(4 * width * self.probing.eps, 0.01)

    def _krylov(self, layout: Layout, steps: int, samples: int) -> KrylovRows:
        def multiply(rows: Tensor) -> Tensor:
            return layout.join(self.probing.product_of(self.members, layout.split(rows)))

        like = layout.join(self.u)
        drawn: list[Tensor] = []
        spaces: list[KrylovSpace] = []
        for _ in range(samples):
            start = self.probing.signs(like.shape, like)
            V, T = lanczos_rows(multiply, start, steps)
            space = KrylovSpace.of(V, T, self.probing.tolerance)
            drawn.append(space.root_times_start(start))
            spaces = spaces or [space]
        return KrylovRows("sum", spaces[0], torch.stack(drawn))
