"""Find the positive part of H = ∂²L/∂z² by products with it; what was found is kept in `found`.

L is any differentiable function of tensors z. The cheapest structure that H has is taken:

    tensors that do not see each other   each on its own
    diagonal                             h = (H u) / u, the same for two random vectors u
    categorical                          H_r = w_r (diag(p) − p pᵀ) for each row r, p = softmax(z_r)
    blocks of at most 32 entries         C products give them; an eigendecomposition each
    wider blocks                         Krylov spaces: √H⁺ ε by Lanczos, all rows at once
    no positive part                     the empirical Fisher: Σ_n (∂L/∂z_n)(∂L/∂z_n)ᵀ

Rows see each other or not: with signs s that are constant on rows, s ⊙ H (s ⊙ u) = H u tells.
Products are compared to `_ROUND_OFFS` of the dtype; what a comparison misses is smaller than that.

References:
    Martens (2020), https://arxiv.org/abs/1412.1193, sections 6 and 9, for the GGN and the Fisher.
    Chow & Saad (2014), https://doi.org/10.1137/130920587, for √H ε by Lanczos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.categorical import CrossEntropy
from kfacopt.likelihoods.found import KrylovRows, RowGradients, RowHessians, SecondDerivative
from kfacopt.likelihoods.interface import FisherType, Likelihood, widened
from kfacopt.likelihoods.layouts import Layout, RowKind

# Blocks of at most this width are formed.
MAX_BLOCK = 32
# Lanczos steps, and how many entries its vectors may have in all.
KRYLOV_STEPS = 24
MAX_KRYLOV_ENTRIES = 2**25
# How many entries products for the columns of blocks have at once.
MAX_COLUMN_ENTRIES = 2**22
# Samples that stand for a root of a block that is too wide to have one.
KRYLOV_SAMPLES = 8
# Among more tensors z nobody looks which of them see each other.
_MAX_TENSORS = 8

_ROUND_OFFS = 64

# H v for v, a tensor for each z; for `[V, *z.shape]` with a leading axis, where it is asked so.
Product = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True, eq=False)
class CurvaturePart:
    """The curvature of tensors z that see each other, or of one.

    Attributes:
        members: Which of the tensors z they are.
        layout: How they are rows; `None` for a tensor as it is.
        likelihood: Has the curvature.
        output: z in the layout.
        weights: ω of each term.
        kind: What was found, in a word or two.
    """

    members: tuple[int, ...]
    layout: Layout | None
    likelihood: Likelihood
    output: Tensor
    weights: Tensor
    kind: str

    @property
    def empirical(self) -> bool:
        """Whether this is the empirical Fisher, which is quadratic in the objective."""
        return isinstance(self.likelihood, RowGradients)

    def vectors(
        self, fisher_type: FisherType, samples: int, generator: Generator
    ) -> Iterator[list[Tensor]]:
        """Yield v with Σ v vᵀ = H⁺, or E[Σ v vᵀ] = H⁺, one tensor for each member.

        Args:
            fisher_type: Only `"mc"` draws, and not from the empirical Fisher.
            samples: How many are drawn.
            generator: Draws them, or signs.
        """
        one = (self.output, self.weights, generator)
        if fisher_type != "mc" or isinstance(self.likelihood, KrylovRows | RowGradients):
            yield from map(self._split, self.likelihood.hessian_root(*one))
            return
        for _ in range(samples):
            scaled = (self.output, self.weights / samples, generator)
            yield self._split(self.likelihood.sample_gradient(*scaled))

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return H⁺ v, one tensor for each member.

        Args:
            vectors: v, likewise.
        """
        v = vectors[0] if self.layout is None else self.layout.join(vectors)
        return self._split(self.likelihood.hessian_product(self.output, self.weights, v))

    def _split(self, rows: Tensor) -> list[Tensor]:
        return [rows] if self.layout is None else self.layout.split(rows)


def joint_vectors(
    parts: Sequence[CurvaturePart],
    count: int,
    fisher_type: FisherType,
    samples: int,
    generator: Generator,
) -> Iterator[list[Tensor | None]]:
    """Yield v of parts that do not see each other, side by side: their signs are independent.

    Args:
        parts: The parts.
        count: How many tensors z there are.
        fisher_type: Only `"mc"` draws.
        samples: How many vectors are drawn.
        generator: Draws them, or signs.
    """
    sources = [part.vectors(fisher_type, samples, generator) for part in parts]
    for row in zip_longest(*sources):
        joint: list[Tensor | None] = [None] * count
        for part, own in zip(parts, row, strict=True):
            for member, vector in zip(part.members, own or (), strict=bool(own)):
                joint[member] = vector
        yield joint


@dataclass(frozen=True, eq=False)
class _Search:
    """The search for the structure of H.

    Attributes:
        values: z, widened, without a graph; `None` where it is unknown.
        gradients: ∂L/∂z, likewise.
        product: H v, widened.
        eps: Of the dtype that products are computed in.
        samples: How many vectors Lanczos makes.
        draws: Draws what is multiplied with H.
    """

    values: Sequence[Tensor | None]
    gradients: Sequence[Tensor]
    product: Product
    eps: float
    samples: int
    draws: Generator

    @property
    def _tolerance(self) -> float:
        return min(_ROUND_OFFS * math.exp(0.75 * math.log(self.eps)), 0.1)

    def probe(self, members: Sequence[int]) -> list[Tensor]:
        """Draw u, with entries of random sign between 1/2 and 3/2; 0 for other tensors."""
        drawn = [torch.zeros_like(g) for g in self.gradients]
        for k in members:
            uniform = torch.rand(drawn[k].shape, generator=self.draws, dtype=torch.float64)
            sign = torch.rand(drawn[k].shape, generator=self.draws) < 0.5
            drawn[k] = torch.where(sign, -0.5 - uniform, 0.5 + uniform).to(drawn[k])
        return drawn

    def signs(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return 1 - 2 * torch.randint(2, tuple(shape), generator=self.draws).to(like)

    def slack(self, members: Sequence[int]) -> float:
        """Return round-off of products that gradients of this size have."""
        largest = max(
            (float(self.gradients[k].abs().amax()) for k in members if self.gradients[k].numel()),
            default=0.0,
        )
        return _ROUND_OFFS * self.eps * largest

    def close(self, one: Tensor, other: Tensor, slack: float) -> bool:
        """Tell whether rows `[R, C]` are equal to round-off."""
        scale = torch.maximum(one.abs(), other.abs()).amax(-1, keepdim=True)
        return bool(((one - other).abs() <= self._tolerance * scale + slack).all())

    def groups(self) -> tuple[list[tuple[int, ...]], list[Tensor], list[Tensor]]:
        """Return which tensors see each other, a vector u and H u, for all of them at once."""
        everything = range(len(self.gradients))
        if len(everything) > 1 and len(everything) <= _MAX_TENSORS:
            return self._groups_of_few()
        u = self.probe(everything)
        Hu = self.product(u)
        if len(everything) == 1:
            return [(0,)], u, Hu
        signs = [self.signs((), g) for g in self.gradients]
        again = self.product([s * x for s, x in zip(signs, u, strict=True)])
        slack = self.slack(everything)
        alone = all(
            self.close((s * x).reshape(1, -1), y.reshape(1, -1), slack)
            for s, x, y in zip(signs, again, Hu, strict=True)
        )
        return ([(k,) for k in everything] if alone else [tuple(everything)]), u, Hu

    def _groups_of_few(self) -> tuple[list[tuple[int, ...]], list[Tensor], list[Tensor]]:
        everything = range(len(self.gradients))
        us = [self.probe([k]) for k in everything]
        products = [self.product(u) for u in us]
        group_of = list(everything)
        for k in everything:
            for i in everything:
                largest = max((float(products[k][j].abs().amax()) for j in (i, k)), default=0.0)
                seen = float(products[k][i].abs().amax()) > self._tolerance * largest
                if i != k and seen and float(products[k][i].abs().amax()) > self.slack([i, k]):
                    old, new = group_of[i], group_of[k]
                    group_of = [new if group == old else group for group in group_of]
        groups = [tuple(k for k in everything if group_of[k] == g) for g in dict.fromkeys(group_of)]
        total = [torch.stack([p[i] for p in products]).sum(0) for i in everything]
        return groups, [us[k][k] for k in everything], total

    # One group -----------------------------------------------------------------------------------

    def parts(
        self,
        members: tuple[int, ...],
        u: Sequence[Tensor],
        Hu: Sequence[Tensor],
        v: Sequence[Tensor],
        Hv: Sequence[Tensor],
    ) -> list[CurvaturePart]:
        """Return the curvature of tensors that see each other, or of one.

        Args:
            members: The tensors.
            u: A vector, of all tensors.
            Hu: H u.
            v: Another vector.
            Hv: H v.
        """
        pick = [[x[k] for k in members] for x in (u, Hu, v, Hv)]
        slack = self.slack(members)
        entries = Layout("all", tuple(self.gradients[k].shape for k in members))
        flat = [entries.join(x) for x in pick]
        if not bool(flat[1].isfinite().all() & flat[3].isfinite().all()):
            return self._not_finite(members)
        if not bool((flat[1].abs() > slack).any() | (flat[3].abs() > slack).any()):
            return self._empirical(members)
        asymmetry = (flat[2] * flat[1] - flat[0] * flat[3]).sum().abs()
        bound = (flat[2] * flat[1]).abs().sum() + (flat[0] * flat[3]).abs().sum()
        if bool(asymmetry > self._tolerance * bound + slack):
            return self._empirical(members, "no true second derivative")
        if self._is_diagonal(pick, slack):
            return self._diagonal(members, pick)
        found = self._categorical(members, pick, slack) if len(members) == 1 else None
        return [found] if found is not None else self._blocks(members, pick[0], pick[1], slack)

    def _is_diagonal(self, pick: Sequence[Sequence[Tensor]], slack: float) -> bool:
        for u, Hu, v, Hv in zip(*pick, strict=True):
            first, second = (
                (y / x).reshape(len(y) if y.ndim > 1 else 1, -1) for x, y in ((u, Hu), (v, Hv))
            )
            if not self.close(first, second, 2 * slack):
                return False
        return True

    def _diagonal(
        self, members: tuple[int, ...], pick: Sequence[Sequence[Tensor]]
    ) -> list[CurvaturePart]:
        parts = []
        for k, u, Hu, v, Hv in zip(members, *pick, strict=True):
            h = (Hu / u + Hv / v) / 2
            if not bool((h > 0).any()):
                parts += self._empirical((k,))
                continue
            z = self._value(k)
            likelihood = SecondDerivative("sum", values=h)
            parts.append(CurvaturePart((k,), None, likelihood, z, torch.ones_like(z), "diagonal"))
        return parts

    def _not_finite(self, members: Sequence[int]) -> list[CurvaturePart]:
        parts = []
        for k in members:
            h = torch.full_like(self.gradients[k], torch.nan)
            args = (SecondDerivative("sum", values=h), self._value(k), torch.ones_like(h))
            parts.append(CurvaturePart((k,), None, *args, "not finite"))
        return parts

    def _value(self, k: int) -> Tensor:
        value = self.values[k]
        return torch.zeros_like(self.gradients[k]) if value is None else value

    def _categorical(
        self, members: tuple[int, ...], pick: Sequence[Sequence[Tensor]], slack: float
    ) -> CurvaturePart | None:
        """Return H if it is that of cross entropy along an axis, with any weight for each row."""
        z = self.values[members[0]]
        if z is None or z.ndim == 0:
            return None
        (u,), (Hu,), (v,), (Hv,) = pick
        for axis in dict.fromkeys((z.ndim - 1, min(1, z.ndim - 1))):
            p = z.softmax(axis)

            def model(x: Tensor, p: Tensor = p, axis: int = axis) -> Tensor:
                return p * (x - (p * x).sum(axis, keepdim=True))

            pairs = [(model(u), Hu), (model(v), Hv)]
            square = torch.stack([(m * m).sum(axis, keepdim=True) for m, _ in pairs]).sum(0)
            inner = torch.stack([(m * h).sum(axis, keepdim=True) for m, h in pairs]).sum(0)
            tiny = torch.finfo(z.dtype).tiny
            w = torch.where(square > tiny, inner / square.clamp(min=tiny), torch.zeros_like(inner))
            floor = slack + _ROUND_OFFS * self.eps * float(w.abs().median())
            fits = all(
                self.close(_as_rows(w * m, axis), _as_rows(h, axis), floor) for m, h in pairs
            )
            if not fits:
                continue
            weights = w.squeeze(axis).abs()
            if axis == z.ndim - 1 and z.ndim > 2:  # as F.cross_entropy sees it after a view
                layout = Layout("last", (z.shape,))
                rows = (CrossEntropy("sum"), layout.join([z]), weights.reshape(-1))
                return CurvaturePart(members, layout, *rows, "categorical")
            return CurvaturePart(members, None, CrossEntropy("sum"), z, weights, "categorical")
        return None

    def _blocks(
        self, members: tuple[int, ...], u: Sequence[Tensor], Hu: Sequence[Tensor], slack: float
    ) -> list[CurvaturePart]:
        shapes = tuple(self.gradients[k].shape for k in members)
        kinds: tuple[RowKind, ...] = ("last", "datum")
        for kind in kinds:
            layout = Layout(kind, shapes)
            if layout.fits() and self._rows_are_alone(members, layout, u, Hu, slack):
                break
        else:
            layout = Layout("all", shapes)
        name = "blocks" if layout.kind != "all" else "mixed rows"
        size = sum(shape.numel() for shape in shapes)
        steps = min(KRYLOV_STEPS, layout.width, MAX_KRYLOV_ENTRIES // max(size, 1))
        if layout.width <= MAX_BLOCK:
            likelihood = self._formed_blocks(members, layout)
        elif steps >= 4:
            likelihood = self._krylov(members, layout, steps)
            name += f", {steps} Lanczos steps"
        else:
            return self._empirical(members, "too large")
        if not bool((likelihood.roots != 0).any()):
            return self._empirical(members)
        z = layout.join([self._value(k) for k in members])
        return [CurvaturePart(members, layout, likelihood, z, z.new_ones(len(z)), name)]

    def _rows_are_alone(
        self,
        members: tuple[int, ...],
        layout: Layout,
        u: Sequence[Tensor],
        Hu: Sequence[Tensor],
        slack: float,
    ) -> bool:
        rows = layout.join(u)
        if len(rows) == 1:
            return True
        expected = layout.join(Hu)
        for _ in range(1 if len(rows) >= 16 else 5):  # a pair of rows hides from one look in two
            s = self.signs((len(rows), 1), rows)
            found = s * layout.join(self._product_of(members, layout.split(s * rows)))
            if not self.close(found, expected, slack):
                return False
        return True

    def _product_of(self, members: tuple[int, ...], vectors: Sequence[Tensor]) -> list[Tensor]:
        lead = vectors[0].ndim - self.gradients[members[0]].ndim
        shape = vectors[0].shape[:lead]
        full = [g.new_zeros(*shape, *g.shape) for g in self.gradients]
        for k, vector in zip(members, vectors, strict=True):
            full[k] = vector
        products = self.product(full)
        return [products[k] for k in members]

    def _formed_blocks(self, members: tuple[int, ...], layout: Layout) -> RowHessians:
        R, C = layout.join([self.gradients[k] for k in members]).shape
        unit = torch.eye(C, dtype=self.gradients[0].dtype, device=self.gradients[0].device)
        found = []
        for chunk in unit.split(max(1, MAX_COLUMN_ENTRIES // max(R * C, 1))):
            splits = [layout.split(e.expand(R, C)) for e in chunk]
            stacked = [torch.stack(list(column)) for column in zip(*splits, strict=True)]
            products = self._product_of(members, stacked)
            found += [layout.join([x[c] for x in products]) for c in range(len(chunk))]
        blocks = torch.stack(found, -1)
        return RowHessians("sum", _positive_root((blocks + blocks.mT) / 2))

    def _krylov(self, members: tuple[int, ...], layout: Layout, steps: int) -> KrylovRows:
        shape = layout.join([self.gradients[k] for k in members])

        def multiply(rows: Tensor) -> Tensor:
            return layout.join(self._product_of(members, layout.split(rows)))

        samples: list[Tensor] = []
        roots: list[Tensor] = []
        for _ in range(self.samples):
            start = self.signs(shape.shape, shape)
            V, T = lanczos_rows(multiply, start, steps)
            values, Q = torch.linalg.eigh(T)
            values = values * (values > self._tolerance * values.abs().amax(-1, keepdim=True))
            norm = start.norm(dim=-1)
            small = Q * (values.clamp(min=0).sqrt() * Q[:, 0] * norm[:, None]).unsqueeze(-2)
            samples.append(torch.einsum("krc,rk->rc", V, small.sum(-1)))
            if not roots:
                roots.append(torch.einsum("krc,rkj,rj->rcj", V, Q, values.clamp(min=0).sqrt()))
        return KrylovRows("sum", roots[0], torch.stack(samples))

    def _empirical(self, members: Sequence[int], why: str = "") -> list[CurvaturePart]:
        parts = []
        name = f"empirical ({why})" if why else "empirical"
        for k in members:
            layout = Layout("datum", (self.gradients[k].shape,))
            rows = layout.join([self.gradients[k]])
            args = (RowGradients("sum", rows), rows, rows.new_ones(len(rows)), name)
            parts.append(CurvaturePart((k,), layout, *args))
        return parts


def _as_rows(x: Tensor, axis: int) -> Tensor:
    """Bring an axis to the end, and all others to one."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def _positive_root(blocks: Tensor) -> Tensor:
    """Return B with B Bᵀ the positive part of symmetric blocks `[R, C, C]`; NaN stays NaN.

    By Cholesky's method, to round-off, where a block has no negative part; it is much faster.
    """
    if not bool(blocks.isfinite().all()):
        return torch.full_like(blocks, torch.nan)
    size = blocks.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
    shift = size * (blocks.shape[-1] * 4 * torch.finfo(blocks.dtype).eps)
    shift = shift + torch.finfo(blocks.dtype).tiny
    shifted = blocks + torch.diag_embed(shift.expand(blocks.shape[:-1]))
    roots: Tensor
    roots, failed = torch.linalg.cholesky_ex(shifted)
    rest = failed > 0
    if bool(rest.any()):
        values, vectors = torch.linalg.eigh(blocks[rest])
        roots[rest] = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return roots


def lanczos_rows(
    multiply: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Run Lanczos' method for many symmetric blocks at once, with full orthogonalisation.

    Args:
        multiply: H x for x `[R, C]`, each row with a block of its own.
        start: The first vectors `[R, C]`.
        steps: K.

    Returns:
        V `[K, R, C]`, orthonormal for each row, and T = Vᵀ H V `[R, K, K]`. Where a row's Krylov
        space ends, the rest of its V and T is 0.
    """
    tiny = torch.finfo(start.dtype).eps * 16
    v = start / start.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(start.dtype).tiny)
    V = [v]
    T = start.new_zeros(len(start), steps, steps)
    for k in range(steps):
        w = multiply(V[k])
        size = w.norm(dim=-1)
        for _ in range(2):
            for j, q in enumerate(V):
                share = (q * w).sum(-1)
                w = w - share.unsqueeze(-1) * q
                if j == k:
                    T[:, k, k] += share
        beta = w.norm(dim=-1)
        beta = torch.where(beta > tiny * size, beta, torch.zeros_like(beta))
        if k + 1 == steps:
            break
        T[:, k, k + 1] = T[:, k + 1, k] = beta
        safe = torch.where(beta > 0, beta, torch.ones_like(beta))
        V.append(torch.where(beta.unsqueeze(-1) > 0, w / safe.unsqueeze(-1), torch.zeros_like(w)))
    return torch.stack(V), T


def find_parts(
    values: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    product: Product | None,
    samples: int = KRYLOV_SAMPLES,
) -> list[CurvaturePart]:
    """Return the positive part of H = ∂²L/∂z², in its cheapest structure.

    Args:
        values: z, tensors of any shapes whose first axes count data; `None` where unknown.
        gradients: ∂L/∂z.
        product: H v for a tensor v for each z, or for `[V, *z.shape]` V such products; `None` if
            there is no second derivative.
        samples: How many vectors are drawn where a block is too wide to be formed.

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

    search = _Search(known, wide, widened_product, eps, samples, Generator().manual_seed(0))
    everything = tuple(range(len(wide)))
    if product is None or not all(g.numel() for g in gradients):
        return search._empirical(everything)
    groups, u, Hu = search.groups()
    v = search.probe(everything)
    Hv = widened_product(v)
    return [part for own in groups for part in search.parts(own, u, Hu, v, Hv)]
