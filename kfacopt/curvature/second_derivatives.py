"""H v, the derivative of a gradient along many vectors; the gradient's scalar is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad

from kfacopt.curvature.adjoint import CONFIRMATION_DIGITS, Columns, random_like
from kfacopt.curvature.batched_autograd import GradientGraph, if_possible
from kfacopt.curvature.confirmation import (
    check_has_graph,
    check_model_twice_differentiable,
    check_twice_differentiable,
)
from kfacopt.curvature.linearization import Linearization
from kfacopt.curvature.verdicts import Functions, GraphVerdicts

# Of the largest part, what small parts may differ by: the round-off of sums that cancel.
_ROUND_OFFS = 16


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
        self._leaves = linearization.model.leaves
        z = linearization.output
        self._value = scalar(z)
        if z.requires_grad:
            check_has_graph(self._value)
        functions = Functions(self._value)
        careful = linearization.verdicts.careful or bool(functions.custom)
        self._signature = functions.signature
        self._verdicts = GraphVerdicts(linearization.model.confirmed, careful, None)
        check_model_twice_differentiable(linearization)
        check_twice_differentiable("loss_func", self._value, scalar, z)

    def __call__(self, V: Columns) -> Columns:
        """Return H v, for one `[K, *p.shape]` for each parameter."""
        if not self._value.requires_grad:
            return [torch.zeros_like(v) for v in V]
        if not self._linearization.prefers_double_backward(V[0].shape[0]):
            result = self._forward_mode(V)
            if result is not None:
                return result
        return self._double_backward(V)

    @cached_property
    def _gradient(self) -> GradientGraph:
        return GradientGraph(self._value, self._leaves)

    def _double_backward(self, V: Columns) -> Columns:
        return self._gradient.multiply(V, by=self._leaves)

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

        def derivatives(v: Columns) -> Columns | None:
            return linearization.forward_mode.derivatives(gradient, v)

        right = self._verdicts.ask(("H", self._signature), lambda: self._is_right(derivatives))
        return derivatives(V) if right else None

    def _is_right(self, derivatives: Callable[[Columns], Columns | None]) -> bool | None:
        v = random_like(self._leaves)
        found = derivatives(v)
        if found is None:
            return False
        expected = if_possible(lambda: self._double_backward(v))
        if expected is None:  # an operation has no double derivative
            return False
        pairs = [(x, b) for x, b in zip(found, expected, strict=True) if b.numel()]
        error = torch.stack([(a - b).abs().max() for a, b in pairs])
        scale = torch.stack([b.abs().max() for _, b in pairs])
        if bool((scale == 0).all()) and bool((error == 0).all()):  # here and now
            return None
        eps = torch.finfo(error.dtype).eps
        # each by its own size: one that is small hides behind no other
        bound = eps**CONFIRMATION_DIGITS * scale + _ROUND_OFFS * eps * scale.max()
        return bool((error <= bound).all())
