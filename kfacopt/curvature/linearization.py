"""Products with the Jacobian of one batch's outputs, and by which way; not the ways themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.argument_checks import checked_output
from kfacopt.curvature.adjoint import AdjointTest, pull_back, random_like
from kfacopt.curvature.batched_autograd import GradientGraph, if_possible
from kfacopt.curvature.data_gradients import DataGradients, GradientPlan, watch_linear_layers
from kfacopt.curvature.forward_mode import ForwardMode
from kfacopt.curvature.jacobian_rows import JacobianRows
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.curvature.verdicts import Functions, GraphVerdicts, counts_everywhere
from kfacopt.data import random_state

# From this many columns on, the forward pass that forward mode repeats is cheap beside the rest.
_FORWARD_MODE_COLUMNS = 8

# From this ratio of saved activations to parameters on, second derivatives take double backward.
_ACTIVATIONS_PER_PARAMETER = 2


_CONSTANT = (
    "model_func: its predictions have no graph, so that their derivatives by params are 0. Does it "
    "use torch.no_grad(), detach(), NumPy, or torch.autograd.grad without create_graph=True? Does "
    "it use other tensors than params?"
)


class Linearization:
    """The derivative J of z = f(X; θ) by θ, at the current θ.

    The graph of the forward pass is kept, and that of the backward pass once `jvp` needs it.
    J v is taken in one of two ways:

    - as the derivative of u ↦ Jᵀ u, which is linear in u, on those graphs: nothing that does not
      depend on v is computed again; one column costs two products per layer, as Jᵀ u does;
    - in forward mode, one forward pass for all columns together. It is preferred for many
      columns, and for convolutions, whose double derivative computes by-products
      (`_convolution_double_backward` forms all of its outputs, asked for or not).

    Either is confirmed before the first vectors are multiplied through a graph of some functions,
    by ⟨u, J v⟩ = ⟨Jᵀ u, v⟩ for random u and v, where Jᵀ u is a plain backward pass. How long that
    holds is said in `verdicts`.
    Forward mode does not see `torch.no_grad()`, custom functions may not be twice differentiable,
    and torch has rules that are wrong without an error. Where neither holds, the rows of J are
    computed by as many backward passes.

    Where J itself is small beside the graphs, it can be kept in their place, as rows of
    `DataGradients`: J v and Jᵀ u then cost half as much, or less where weights are shared.

    Args:
        model: f and θ.
        X: The inputs of one batch.
        watch: Whether the batch may be asked for `plan` or `keep_rows`.
        graph_bytes: How many bytes the graph saves, where that is known and it will be kept.

    Attributes:
        model: f and θ.
        inputs: X.
        output: z, with its graph.
        forward_mode: Derivatives along vectors, where f can be evaluated at other tensors than θ.
    """

    def __init__(
        self, model: ParametrizedModel, X: Any, watch: bool = False, graph_bytes: int = 0
    ) -> None:
        self.model, self.inputs = model, X
        # A dropout that is active must drop what it dropped in the forward pass.
        state = random_state()
        with watch_linear_layers(model.module if watch else None, model.leaves) as calls:
            before = model.switches
            self.output = checked_output(model(X))
            self._switched = model.switches != before
        if not self.output.requires_grad and self.output.numel():
            model.confirmed.warn_once(("constant", 0), _CONSTANT)
        self._pullback: tuple[Tensor, GradientGraph] | None = None  # u, and Jᵀ u
        self.forward_mode = ForwardMode(model, X, state)
        self._single_rows = JacobianRows(self.output, model.leaves)
        self._calls = calls
        self._rows: DataGradients | None = None
        self._columns, self._enough = 0, math.inf
        convolutions = nn.modules.conv._ConvNd
        modules = chain.from_iterable(m.modules() for m in model.modules())
        # Double backward forms products of the size of θ for every column, forward mode passes over
        # the activations in many small operations: each pays where that size is the smaller one.
        # Measured on sequences: 0.7 to 0.9 times the time of forward mode.
        own_bytes = sum(p.numel() * p.element_size() for p in model.leaves)
        self._wide_activations = graph_bytes > _ACTIVATIONS_PER_PARAMETER * own_bytes
        self._convolves = any(isinstance(m, convolutions) for m in modules)

    def plan(self) -> GradientPlan | None:
        """Return how gradients of single data are to be kept, or `None` if there are no data."""
        single = not isinstance(self.inputs, Tensor) or not self.inputs.ndim or not self.output.ndim
        if single or not self.forward_mode.can_substitute or len(self.inputs) != len(self.output):
            return None
        if not self.output.requires_grad or not self.output.numel():
            return None
        return GradientPlan(self.model, self.inputs, self.output, self._calls)

    def keep_rows(self, max_bytes: int, chunk_size: int) -> int:
        """Keep J in place of graphs, once as many columns were multiplied as it has rows a datum.

        That many products are what it takes to compute J, so that never more than about twice the
        cost of the cheapest way is paid, however many products follow.

        Args:
            max_bytes: How large J may be.
            chunk_size: How many of its rows for each datum are computed at once.

        Returns:
            How many bytes J will take; 0 if it will not be kept.
        """
        plan = self.plan()
        if plan is None or plan.num_bytes(rows := self.output[0].numel()) > max_bytes:
            return 0
        self._plan, self._enough, self._chunk_size = plan, rows, chunk_size
        return plan.num_bytes(rows)

    def _has_rows(self, columns: int) -> bool:
        """Count columns that are to be multiplied; tell if rows are kept, or make them if due."""
        self._columns += columns
        if self._rows is None and self._columns > self._enough:
            N, C = len(self.output), self.output[0].numel()
            one_hot = torch.eye(C, dtype=self.output.dtype, device=self.output.device)
            self._rows = self._plan.gradients(
                one_hot.unsqueeze(1).expand(C, N, C), self._chunk_size
            )
            self._enough = math.inf
            if self._rows is not None:  # free the graphs
                self._pullback, self._calls = None, []
                self.output = self.output.detach()
                self._single_rows = JacobianRows(self.output, self.model.leaves)
            del self._plan
        return self._rows is not None

    def jvp(self, V: Sequence[Tensor]) -> Tensor:
        """Return J v `[K, *z.shape]` for K vectors, one `[K, *p.shape]` for each parameter."""
        if self._has_rows(V[0].shape[0]):
            assert self._rows is not None
            return self._rows.project(list(V)).reshape(-1, *self.output.shape)
        wide = self._convolves or V[0].shape[0] >= _FORWARD_MODE_COLUMNS
        ways = [self._by_forward_mode, self._by_double_backward]
        for way in ways if wide else reversed(ways):
            verdict = self._is_confirmed(way.__name__)
            # `None`: J has entries that are NaN, as has the product; or it is 0
            if verdict or (verdict is None and way == self._by_double_backward):
                result = way(V)
                if result is not None:
                    return result
        if self._is_confirmed(self._by_rows.__name__) is False:
            raise RuntimeError(
                f"model_func: the backward pass of {self.functions} is not linear in the "
                "gradient that it is given (does it clip, round or draw random numbers?), so "
                "that there is no Jacobian; use a function in its place that has one."
            )
        self.model.confirmed.warn_once(
            ("said of rows", self.functions.signature),
            f"model_func: {self.functions} can be differentiated once only, by backward passes. "
            "Products with the Jacobian are right, but take a backward pass for each prediction; "
            "with operations of torch in its place they take two.",
        )
        return self._by_rows(V)

    def _by_forward_mode(self, V: Sequence[Tensor]) -> Tensor | None:
        """Return J v, or `None` where it cannot be computed in this way."""
        if not self.forward_mode.is_complete():
            return None
        result = self.forward_mode.derivatives(lambda *p: (self.model.at(p, self.inputs),), V)
        return None if result is None else result[0]

    def _by_double_backward(self, V: Sequence[Tensor]) -> Tensor | None:
        """Return J v, or `None` where it cannot be computed in this way."""
        if not self.output.requires_grad:
            return self.output.new_zeros(V[0].shape[0], *self.output.shape)

        def derivative() -> Tensor:
            if self._pullback is None:
                u = torch.zeros_like(self.output, requires_grad=True)
                self._pullback = u, GradientGraph(self.output, self.model.leaves, u)
            u, gradient = self._pullback
            return gradient.multiply(V, by=[u])[0]

        return if_possible(derivative)  # an operation may have no double derivative

    def _by_rows(self, V: Sequence[Tensor]) -> Tensor:
        """Return J v, by a backward pass for each row of J."""
        return self._single_rows.multiply(V)

    def _is_confirmed(self, way: str) -> bool | None:
        """Tell whether J v is right; `None` if it is not known."""
        key = way, self.functions.signature
        return self.verdicts.ask(key, lambda: _judge(self, way), lambda: has_no_silent_part(self))

    @cached_property
    def verdicts(self) -> GraphVerdicts:
        """What is known about derivatives of this graph."""
        careful = self._switched or bool(self.functions.custom)
        roots = self.model.roots() if careful else None
        return GraphVerdicts(self.model.confirmed, careful, roots)

    @cached_property
    def functions(self) -> Functions:
        """The functions that make z out of θ."""
        return Functions(self.output)

    def vjp(self, U: Tensor) -> list[Tensor]:
        """Return Jᵀ u, one `[K, *p.shape]` for each parameter, for `U` `[K, *z.shape]`."""
        if self._has_rows(U.shape[0]):
            assert self._rows is not None
            rows = U.reshape(U.shape[0], len(self.output), -1).to(self.model.leaves[0].dtype)
            return self._rows.combine(rows, self.model.leaves)
        return pull_back(self.output, self.model.leaves, U)

    def prefers_double_backward(self, columns: int) -> bool:
        """Tell whether second derivatives cost less by double backward."""
        few = columns < _FORWARD_MODE_COLUMNS
        return few or (self._wide_activations and not self._convolves)


def in_float64(linearization: Linearization) -> Linearization:
    """Return the same in float64, where comparisons are sharp, if the model can; or itself."""
    model, X = linearization.model, linearization.inputs
    if model.module is None or not isinstance(X, Tensor) or X.dtype == torch.float64:
        return linearization
    wide = X.double() if X.is_floating_point() else X
    with linearization.forward_mode.once_more():
        twin = if_possible(lambda: Linearization(model.in_float64(), wide), Exception)
    if twin is None:  # whatever a model raises that is copied, or given float64
        return linearization
    same = twin.functions.custom == linearization.functions.custom
    return twin if same and twin.output.dtype == torch.float64 else linearization


def has_no_silent_part(linearization: Linearization) -> bool:
    """Tell whether all functions that make z have a part in its derivatives."""
    z = linearization.output
    if not z.requires_grad:
        return False
    return counts_everywhere(z, linearization.model.leaves, random_like([z], seed=1)[0][0])


def _judge(linearization: Linearization, way: str) -> bool | None:
    """Tell whether J v, by a method of this name, is right; `None` if nothing tells it."""
    careful = linearization.verdicts.careful
    verdict: bool | None = True
    if careful and (twin := in_float64(linearization)) is not linearization:
        test = AdjointTest(twin.output, twin.model.leaves, careful)
        verdict, careful = test.agrees(getattr(twin, way)), False
    test = AdjointTest(linearization.output, linearization.model.leaves, careful)
    return verdict and test.agrees(getattr(linearization, way))
