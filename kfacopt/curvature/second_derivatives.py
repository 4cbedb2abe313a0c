"""H v, the derivative of a gradient along many vectors; the gradient's scalar is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from kfacopt.curvature.batched_autograd import batched_grad
from kfacopt.curvature.confirmation import (
    CONFIRMATION_DIGITS,
    Functions,
    agree_with_differences,
    check_has_graph,
    check_twice_differentiable,
    moved,
    random_like,
    refusal,
    root_mean_square,
    single_rows,
)
from kfacopt.curvature.linearization import Linearization

Columns = list[Tensor]


class SecondDerivative:
    """H v, the derivative of ∇_θ s(z) along v for z = f(X; θ).

    By double backward, on the graph of the gradient; or in forward mode over reverse mode, which
    shares the gradient's evaluation among many columns and is confirmed by double backward. Second
    derivatives through custom functions are confirmed by differences of gradients.

    Args:
        linearization: z and its derivative.
        scalar: s, maps z to a scalar; it may depend on θ in other ways.

    Raises:
        RuntimeError: If custom functions of the model or of s have wrong second derivatives.
    """

    def __init__(self, linearization: Linearization, scalar: Callable[[Tensor], Tensor]) -> None:
        self._linearization, self._scalar = linearization, scalar
        self._leaves, self._confirmed = linearization.model.leaves, linearization.model.confirmed
        z = linearization.output
        self._value = scalar(z)
        if z.requires_grad:
            check_has_graph(self._value)
        self._signature = Functions(self._value).signature
        self._gradient: list[tuple[int, Tensor]] | None = None
        _check_model(linearization)
        check_twice_differentiable("loss_func", self._value, scalar, z, self._confirmed)

    def __call__(self, V: Columns) -> Columns:
        """Return H v, for one `[K, *p.shape]` for each parameter."""
        if not self._value.requires_grad:
            return [torch.zeros_like(v) for v in V]
        if not self._linearization.prefers_double_backward(V[0].shape[0]):
            result = self._forward_mode(V)
            if result is not None:
                return result
        return self._double_backward(V)

    def _double_backward(self, V: Columns) -> Columns:
        if self._gradient is None:
            grads = torch.autograd.grad(
                self._value, self._leaves, create_graph=True, allow_unused=True
            )
            # the others are zero, or do not depend on the parameters
            self._gradient = [
                (i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad
            ]
        if not self._gradient:  # s is linear in the parameters
            return [torch.zeros_like(v) for v in V]
        gradient = [g for _, g in self._gradient]
        return batched_grad(gradient, self._leaves, [V[i] for i, _ in self._gradient])

    def _forward_mode(self, V: Columns) -> Columns | None:
        """Return H v, or `None` where forward mode is not at hand or wrong."""
        linearization, scalar = self._linearization, self._scalar
        model = linearization.model
        if not linearization.forward_mode.is_complete():
            return None
        if model.reached_by(scalar(linearization.output.detach())):  # s sees θ itself
            return None
        every = tuple(range(len(self._leaves)))
        gradient = grad(lambda *p: scalar(model.at(p, linearization.inputs)), argnums=every)

        return linearization.forward_mode.along(("H", self._signature), gradient, V, self._is_right)

    def _is_right(self, v: Columns, Hv: Columns) -> bool | None:
        try:
            expected = self._double_backward(v)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation has no double derivative
            return False
        pairs = [(x, b) for x, b in zip(Hv, expected, strict=True) if b.numel()]
        error = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
        scale = torch.stack([b.abs().max() for _, b in pairs]).max()
        if bool(scale == 0) and bool(error == 0):  # here and now
            return None
        return bool(error <= torch.finfo(error.dtype).eps ** CONFIRMATION_DIGITS * scale)


def _check_model(linearization: Linearization) -> None:
    """Raise if second derivatives through custom functions of the model are wrong.

    Those of functions of torch are taken to be right. What is compared are the derivatives of
    ⟨u, z⟩, u for a single datum, along a random vector: by double backward, and by differences.
    """
    functions, confirmed = linearization.functions, linearization.model.confirmed
    key = "second derivatives of model_func", functions.signature
    if functions.custom and key not in confirmed:
        precise = _in_float64(linearization)
        rows = single_rows(precise.output.detach())
        confirmed[key] = any(_is_twice_differentiable(precise, u) for u in rows)
    if not confirmed.get(key, True):
        raise refusal("model_func", functions)


def _in_float64(linearization: Linearization) -> Linearization:
    """Return the same in float64, where differences are sharp, if the model can."""
    model, X = linearization.model, linearization.inputs
    if model.module is None or not isinstance(X, Tensor):
        return linearization
    try:
        with linearization.forward_mode.once_more():
            twin = Linearization(model.in_float64(), X.double() if X.is_floating_point() else X)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model raises that is copied, or given float64
        return linearization
    same = twin.functions.custom == linearization.functions.custom
    return twin if same and twin.output.dtype == torch.float64 else linearization


def _is_twice_differentiable(linearization: Linearization, u: Tensor) -> bool:
    leaves = linearization.model.leaves
    v = [
        x * (root_mean_square(p) / root_mean_square(x))
        for x, p in zip(random_like(leaves), leaves, strict=True)
    ]
    pulled = torch.autograd.grad(
        linearization.output, leaves, u, create_graph=True, retain_graph=True, allow_unused=True
    )
    gradient = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]
    product = [torch.zeros_like(x) for x in v]
    if gradient:
        try:
            product = batched_grad([g for _, g in gradient], leaves, [v[i] for i, _ in gradient])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what once_differentiable leaves behind
            return False
    return _agrees_with_differences(linearization, lambda z: (z * u).sum(), v, product)


def _agrees_with_differences(
    linearization: Linearization, scalar: Callable[[Tensor], Tensor], v: Columns, Hv: Columns
) -> bool:
    """Tell whether H v, of s(z) by θ, is what differences of gradients give."""
    model = linearization.model
    leaves, direction = model.leaves, [x[0] for x in v]

    def gradient(step: float) -> list[Tensor]:
        with (
            linearization.forward_mode.once_more(),
            moved(leaves, direction, step),
            torch.enable_grad(),
        ):
            value = scalar(model(linearization.inputs))
            grads = torch.autograd.grad(value, leaves, materialize_grads=True)
        return list(grads)

    return agree_with_differences(gradient, Hv)
