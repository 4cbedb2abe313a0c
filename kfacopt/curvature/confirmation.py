"""Which derivatives of a graph can be relied on; they are computed elsewhere.

Torch derives its own operations twice and in both modes. The backward pass of a custom function
(`torch.autograd.Function`, an extension in C++, TorchScript) is whatever its author wrote: its
result may be detached, or treat an intermediate result as a constant. Then a derivative through it
is 0 or wrong, without an error. What is found is compared with what a single backward pass gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfacopt.curvature.adjoint import random_like, wide
from kfacopt.curvature.batched_autograd import GradientGraph, if_possible
from kfacopt.curvature.linearization import Linearization, has_no_silent_part, in_float64
from kfacopt.curvature.verdicts import Functions

# Central differences are as good as their rounding and their third derivatives allow; below
# float64, steps are so long that they meet kinks.
_DIFFERENCE_DIGITS = {torch.float64: 0.4}
_FEWER_DIFFERENCE_DIGITS = 0.25
# Steps, as parts of the digits: 1/3 balances both errors; a smaller one meets fewer kinks.
_STEPS = (1 / 3, 1 / 2)
_ROUND_OFFS = 4
# Differences to both sides agree to this part where there is no kink.
_SIDES = 0.1
# So many vectors are tried in search of one that meets no kink, and so many data, one by one, of
# which some have to agree.
_TRIES = 3
_MAX_ROWS, _ENOUGH_ROWS = 8, 3


@dataclass(frozen=True)
class Comparison:
    """What differences of gradients say of parts of H v.

    Attributes:
        right: Whether some parts agree.
        wrong: Whether some do not, though the differences converge.
        unclear: Whether the differences of some do not converge, as at a kink.
    """

    right: bool
    wrong: bool
    unclear: bool

    @property
    def tells(self) -> bool:
        """Whether anything is not 0."""
        return self.right or self.wrong or self.unclear


def _compare_with_differences(
    gradient: Callable[[float], Sequence[Tensor]], product: Sequence[Tensor]
) -> Comparison:
    """Compare H v with central differences of a gradient along v.

    Args:
        gradient: Maps t to the gradient at x + t v, with v of about the size of x; as matrices,
            the rows of which are compared each by its own size: a small one hides behind no other.
        product: H v, as the gradient.
    """
    eps = torch.finfo(product[0].dtype).eps
    digits = _DIFFERENCE_DIGITS.get(product[0].dtype, _FEWER_DIFFERENCE_DIGITS)
    expected, middle = _Rows(product), _Rows(gradient(0.0))
    last = None
    right = torch.zeros_like(expected.norms(), dtype=torch.bool)
    tells, smooth = right, ~right
    for part in _STEPS:
        step = eps**part
        plus, minus = (_Rows(gradient(t)) for t in (step, -step))
        noise = _ROUND_OFFS * eps / step * plus.norms().norm()
        found = (plus - minus) / (2 * step)
        tells = tells | (found.norms() > noise) | (expected.norms() > noise)
        right = right | found.is_close_to(expected, eps**digits, noise)
        if bool((right | ~tells).all()):
            break
        sides = (plus - middle) / step, (middle - minus) / step
        smooth = smooth & sides[0].is_close_to(sides[1], _SIDES, noise)
        if last is not None:
            smooth = smooth & found.is_close_to(last, eps**digits, noise)
        last = found
    left = tells & ~right
    parts = tells & right, left & smooth, left & ~smooth
    return Comparison(*(bool(x.any()) for x in parts))


class _Rows:
    """The rows of matrices, in float64."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self._matrices = [wide(x).view(x.shape) for x in matrices if x.numel()]

    def __sub__(self, other: _Rows) -> _Rows:
        return _Rows([a - b for a, b in zip(self._matrices, other._matrices, strict=True)])

    def __truediv__(self, divisor: float) -> _Rows:
        return _Rows([x / divisor for x in self._matrices])

    def norms(self) -> Tensor:
        return torch.cat([x.norm(dim=1) for x in self._matrices])

    def is_close_to(self, other: _Rows, bound: float, noise: Tensor) -> Tensor:
        scale = torch.maximum(self.norms(), other.norms())
        return (self - other).norms() <= bound * scale + noise


def _verdict_of(comparisons: Iterable[Comparison], enough: int) -> bool | None:
    """Return whether H v is right, or `None` if nothing tells it.

    What says nothing confirms nothing, one contradiction refutes. What differs at a kink says
    nothing, but if there is nothing else, second derivatives are not relied on.

    Args:
        comparisons: Are made as they are needed.
        enough: How many of them have to agree.
    """
    agreeing, unclear = 0, False
    for comparison in comparisons:
        if comparison.wrong:
            return False
        agreeing += comparison.right
        unclear |= comparison.unclear
        if agreeing == enough and not comparison.unclear:
            return True
    return bool(agreeing) if agreeing or unclear else None


def _single_rows(x: Tensor) -> Iterator[Tensor]:
    """Yield random vectors of the shape of `x`, each for one entry of its first axis alone.

    A kink (of a ReLU, say) is met by few data, whatever their number is.
    """
    if not x.ndim or not x.numel():
        yield random_like([x])[0][0]
        return
    # the ends and the middle first
    number = min(len(x), _MAX_ROWS)
    places = [round(i * (len(x) - 1) / max(number - 1, 1)) for i in range(number)]
    for n in sorted(set(places), key=lambda n: (n not in (0, len(x) - 1, places[number // 2]), n)):
        v = torch.zeros_like(x, requires_grad=False)
        v[n] = random_like([v[n]], seed=n)[0][0] * x[n].numel() ** 0.5
        yield v


def _root_mean_square(*tensors: Tensor) -> float:
    """Return the size of tensors' entries; 1 for zeros."""
    entries = torch.cat([wide(x) for x in tensors])
    size = float(entries.square().mean().sqrt()) if entries.numel() else 0.0
    return size if size > 0 else 1.0


@contextmanager
def _moved(leaves: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Iterator[None]:
    """Move tensors within the context, whoever refers to them, by exchanging their memory."""
    before = [p.data for p in leaves]
    try:
        for p, v in zip(leaves, direction, strict=True):
            p.data = p.data + step * v
        yield
    finally:
        for p, data in zip(leaves, before, strict=True):
            p.data = data


def check_twice_differentiable(
    name: str, value: Tensor, function: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Raise if second derivatives of a function, through custom functions, are wrong.

    Args:
        name: The argument that it came from.
        value: A scalar with its graph.
        function: Maps x to it.
        x: A tensor on the way.
    """
    if not Functions(value).custom:
        return
    x = x.detach().requires_grad_()
    value = function(x)  # without what comes before x

    def gradient_at(shift: Tensor) -> Tensor:
        at = (x + shift).detach().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]

    check_gradient(name, value, x, [x], gradient_at)


def check_has_graph(loss: Tensor) -> None:
    """Raise if a loss is a constant to backward passes."""
    if not loss.requires_grad:
        raise RuntimeError(
            "loss_func: its value has no graph, so that it has no derivatives by the predictions. "
            "Compute it with torch's operations, without torch.no_grad(), detach(), item() or "
            "NumPy."
        )


def check_gradient(
    name: str,
    value: Tensor,
    x: Tensor,
    by: Sequence[Tensor] | Sequence[GradientEdge],
    gradient_at: Callable[[Tensor], Tensor],
) -> None:
    """Raise if derivatives of a gradient, through custom functions, are wrong.

    Nobody knows what else a loss depends on: what is found holds for this graph.

    Args:
        name: The argument that they came from.
        value: A scalar with its graph.
        x: What it is differentiated by.
        by: Its place in the graph, alone.
        gradient_at: Maps a shift of x to the gradient there.
    """
    functions = Functions(value)
    if not functions.custom or not x.numel():
        return
    x = x.detach()
    (gradient,) = torch.autograd.grad(value, by, create_graph=True, materialize_grads=True)

    def comparisons() -> Iterator[Comparison]:
        # along all data, and then along single ones
        along_all = (random_like([x], seed)[0][0] for seed in range(_TRIES))
        for v in chain(along_all, _single_rows(x)):
            comparison = _compare_gradient(x, by, gradient, gradient_at, v)
            yield comparison
            if not comparison.tells:
                return

    if _verdict_of(comparisons(), enough=1) is False:
        raise _refusal(name, functions)


def _compare_gradient(
    x: Tensor,
    by: Sequence[Tensor] | Sequence[GradientEdge],
    gradient: Tensor,
    gradient_at: Callable[[Tensor], Tensor],
    v: Tensor,
) -> Comparison:
    """Compare derivatives of a gradient along v, each datum's part by itself."""
    v = v * (_root_mean_square(x) / _root_mean_square(v[v != 0]))
    product = torch.zeros_like(x)
    if gradient.requires_grad:
        options = {"retain_graph": True, "materialize_grads": True}
        found = if_possible(lambda: torch.autograd.grad([gradient], by, [v], **options))
        if found is None:  # what once_differentiable leaves behind
            return Comparison(right=False, wrong=True, unclear=False)
        (product,) = found
    rows = (len(x), -1) if x.ndim else (1, 1)
    return _compare_with_differences(
        lambda step: [gradient_at(step * v).reshape(rows)], [product.reshape(rows)]
    )


def _refusal(name: str, functions: Functions) -> RuntimeError:
    """Return the error for second derivatives that are not to be had."""
    return RuntimeError(
        f"{name}: the backward pass of {functions} is not differentiable, or not the derivative of "
        "its forward pass, so that second derivatives through it are wrong. Write it with torch's "
        "operations on ctx.saved_tensors that hold the function's inputs or outputs, without "
        "once_differentiable, detach() or NumPy; or use torch's operations in its place."
    )


def check_model_twice_differentiable(linearization: Linearization) -> None:
    """Raise if second derivatives through custom functions of the model are wrong.

    Those of functions of torch are taken to be right.
    """
    functions = linearization.functions
    if not functions.custom:
        return
    key = "second derivatives of model_func", functions.signature

    def judge() -> bool | None:
        return _verdict_of(*_comparisons(in_float64(linearization)))

    if linearization.verdicts.ask(key, judge, lambda: has_no_silent_part(linearization)) is False:
        raise _refusal("model_func", functions)


def _comparisons(linearization: Linearization) -> tuple[Iterator[Comparison], int]:
    """Return comparisons of H v, and how many have to agree.

    In float64, differences are sharp enough for all data at once; a kink is met seldom.
    """
    z, leaves = linearization.output.detach(), linearization.model.leaves

    def all_data() -> Iterator[Comparison]:
        for seed in range(_TRIES):
            u = random_like([z], seed=1 + seed)[0][0]
            yield (comparison := _compare(linearization, u, random_like(leaves, seed)))
            if not comparison.tells:
                return
        yield from single()

    def single() -> Iterator[Comparison]:
        for u in _single_rows(z):
            yield _compare(linearization, u, random_like(leaves))

    return (all_data(), 1) if z.dtype == torch.float64 else (single(), _ENOUGH_ROWS)


def _compare(linearization: Linearization, u: Tensor, v: Sequence[Tensor]) -> Comparison:
    """Compare derivatives of ⟨u, z⟩ along v: by double backward, and by differences."""
    leaves = linearization.model.leaves
    v = [x * (_root_mean_square(p) / _root_mean_square(x)) for x, p in zip(v, leaves, strict=True)]
    graph = GradientGraph(linearization.output, leaves, u)
    product = if_possible(lambda: graph.multiply(v, by=leaves))
    if product is None:  # what once_differentiable leaves behind
        return Comparison(right=False, wrong=True, unclear=False)
    direction, once_more = [x[0] for x in v], linearization.forward_mode.once_more

    def gradient(step: float) -> list[Tensor]:
        with once_more(), _moved(leaves, direction, step), torch.enable_grad():
            value = (linearization.model(linearization.inputs) * u).sum()
            grads = torch.autograd.grad(value, leaves, materialize_grads=True)
        return [g.reshape(1, -1) for g in grads]

    # each parameter's part by itself
    return _compare_with_differences(gradient, [x.reshape(1, -1) for x in product])
