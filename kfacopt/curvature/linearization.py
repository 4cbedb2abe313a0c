"""Products with the Jacobian of a network's outputs, for many vectors at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from kfacopt.curvature.batched_autograd import batched_grad, quiet_vmap
from kfacopt.curvature.data_gradients import (
    DataGradients,
    GradientPlan,
    LayerCall,
    watch_linear_layers,
)
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.data import random_devices, tensors_put_back

# From this many columns on, the forward pass that forward mode repeats is cheap beside the rest.
_FORWARD_MODE_COLUMNS = 8

# Forward mode is right if it agrees with backward passes to this part of the dtype's digits.
_CONFIRMATION_DIGITS = 0.5

# From this ratio of saved activations to parameters on, second derivatives take double backward.
_ACTIVATIONS_PER_PARAMETER = 2


class Linearization:
    """The derivative J of z = f(X; θ) by θ, at the current θ.

    The graph of the forward pass is kept, and that of the backward pass once `jvp` needs it.
    J v is taken in one of two ways:

    - as the derivative of u ↦ Jᵀ u, which is linear in u, on those graphs: nothing that does not
      depend on v is computed again; one column costs two products per layer, as Jᵀ u does;
    - in forward mode, one forward pass for all columns together. It is preferred for many
      columns, and for convolutions, whose double derivative computes by-products
      (`_convolution_double_backward` forms all of its outputs, asked for or not).

    Where J itself is small beside the graphs, it can be kept in their place, as rows of
    `DataGradients`: J v and Jᵀ u then cost half as much, or less where weights are shared.

    Args:
        model: f and θ.
        X: The inputs of one batch.
        watch: Whether the batch may be asked for `plan` or `keep_rows`.
        graph_bytes: How many bytes the graph saves, where that is known and it will be kept.

    Attributes:
        output: z, with its graph.
        can_substitute: Whether f can be evaluated with other tensors in the place of θ.
    """

    def __init__(
        self, model: ParametrizedModel, X: Any, watch: bool = False, graph_bytes: int = 0
    ) -> None:
        self._model, self._X = model, X
        self._random_state = [torch.get_rng_state()]
        self._random_state += [torch.cuda.get_rng_state(d) for d in random_devices()]
        watching: AbstractContextManager[list[LayerCall]] = nullcontext([])
        with watch_linear_layers(model) if watch else watching as calls:
            self.output: Tensor = model(X)
        if not isinstance(self.output, Tensor):
            raise TypeError(
                f"model_func must return one tensor, got {type(self.output).__name__}; wrap the "
                "model in a module that selects what the loss sees."
            )
        self._pullback: tuple[Tensor, list[int], list[Tensor]] | None = None
        self.can_substitute = model.can_substitute()
        self._checked: bool | None = None
        self._calls = calls
        self._rows: DataGradients | None = None
        self._columns, self._enough = 0, math.inf
        convolutions = nn.modules.conv._ConvNd
        modules = model.module.modules() if model.module is not None else ()
        # Double backward forms products of the size of θ for every column, forward mode passes over
        # the activations in many small operations: each pays where that size is the smaller one.
        # Measured on sequences: 0.7 to 0.9 times the time of forward mode.
        own_bytes = sum(p.numel() * p.element_size() for p in model.leaves)
        self._wide_activations = graph_bytes > _ACTIVATIONS_PER_PARAMETER * own_bytes
        self._convolves = any(isinstance(m, convolutions) for m in modules)

    def plan(self) -> GradientPlan | None:
        """Return how gradients of single data are to be kept, or `None` if there are no data."""
        single = not isinstance(self._X, Tensor) or not self._X.ndim or not self.output.ndim
        if single or not self.can_substitute or len(self._X) != len(self.output):
            return None
        if not self.output.requires_grad or not self.output.numel():
            return None
        return GradientPlan(self._model, self._X, self.output, self._calls)

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
            del self._plan
        return self._rows is not None

    def jvp(self, V: Sequence[Tensor]) -> Tensor:
        """Return J v `[K, *z.shape]` for K vectors, one `[K, *p.shape]` for each parameter."""
        if self._has_rows(V[0].shape[0]):
            assert self._rows is not None
            return self._rows.project(list(V)).reshape(-1, *self.output.shape)
        wide = self._convolves or V[0].shape[0] >= _FORWARD_MODE_COLUMNS
        if wide and self._can_forward():
            result = self._confirmed_forward_mode(
                "jvp",
                lambda *p: (self._model.at(p, self._X),),
                V,
                lambda v: [self._double_backward(v)],
            )
            if result is not None:
                return result[0]
        return self._double_backward(V)

    def _confirmed_forward_mode(
        self,
        name: str,
        function: Callable[..., tuple[Tensor, ...]],
        V: Sequence[Tensor],
        reference: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor] | None:
        """Return derivatives along K vectors in forward mode, or `None` where it fails or is wrong.

        Torch has rules that are wrong without an error. One random vector more, along all of θ, is
        multiplied in both ways with the first vectors of a model; not with those of every product.

        Args:
            name: Which derivative.
            function: Maps θ to what is differentiated.
            V: The vectors.
            reference: Computes the same by backward passes.
        """
        confirmed = self._model.confirmed
        if name in confirmed:
            return self._forward_mode(function, V) if confirmed[name] else None
        generator = torch.Generator().manual_seed(0)
        probe = [torch.randn(1, *v.shape[1:], generator=generator).to(v) for v in V]
        result = self._forward_mode(
            function, [torch.cat([v, r]) for v, r in zip(V, probe, strict=True)]
        )
        if result is None:
            return None
        try:
            expected = reference(probe)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # forward mode is the only way
            expected = []
        pairs = [(x[-1:], b) for x, b in zip(result, expected, strict=False) if b.numel()]
        if pairs:
            error = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
            scale = torch.stack([b.abs().max() for _, b in pairs]).max()
            bound = torch.finfo(V[0].dtype).eps ** _CONFIRMATION_DIGITS
            # A derivative that is 0 along a random vector says nothing: it is asked again.
            if bool(scale == 0) and bool(error == 0):
                return [x[:-1] for x in result]
            confirmed[name] = not bool(error > bound * scale)
        else:
            confirmed[name] = True
        return [x[:-1] for x in result] if confirmed[name] else None

    def _can_forward(self) -> bool:
        """Tell whether substitution sees every path from θ to z.

        A module may reach a parameter past its own name (in a closure, a list, a plain
        attribute); with other tensors in the place of θ, the predictions then still depend on it.
        """
        if self.can_substitute and self._checked is None:
            values = [p.detach() for p in self._model.leaves]
            with torch.enable_grad(), torch.random.fork_rng(random_devices()):
                self._checked = not self._model.reached_by(self._model.at(values, self._X))
        return self.can_substitute and bool(self._checked)

    def vjp(self, U: Tensor) -> list[Tensor]:
        """Return Jᵀ u, one `[K, *p.shape]` for each parameter, for `U` `[K, *z.shape]`."""
        if self._has_rows(U.shape[0]):
            assert self._rows is not None
            rows = U.reshape(U.shape[0], len(self.output), -1).to(self._model.leaves[0].dtype)
            return self._rows.combine(rows, self._model.leaves)
        if not self.output.requires_grad:
            return [p.new_zeros(U.shape[0], *p.shape) for p in self._model.leaves]
        return batched_grad([self.output], self._model.leaves, [U])

    def gradient_jvp(
        self,
        scalar: Callable[[Tensor], Tensor],
        V: Sequence[Tensor],
        reference: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor] | None:
        """Return the derivatives of ∇_θ s(z) along K vectors, in forward mode over reverse mode.

        Args:
            scalar: s, maps z to a scalar.
            V: The vectors, one `[K, *p.shape]` for each parameter.
            reference: Computes the same by backward passes, to confirm the first result.

        Returns:
            One `[K, *p.shape]` for each parameter; or `None` where forward mode is not at hand, or
            does not pay for as few columns.
        """
        few = V[0].shape[0] < _FORWARD_MODE_COLUMNS
        if few or (self._wide_activations and not self._convolves) or not self._can_forward():
            return None
        if self._model.reached_by(scalar(self.output.detach())):  # a loss that sees θ itself
            return None
        every = tuple(range(len(self._model.leaves)))
        gradient = grad(lambda *p: scalar(self._model.at(p, self._X)), argnums=every)
        return self._confirmed_forward_mode("gradient_jvp", gradient, V, reference)

    def _forward_mode(
        self, function: Callable[..., tuple[Tensor, ...]], V: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """Return the derivatives of a function of θ along K vectors, or `None` if torch cannot."""
        primals = tuple(p.detach() for p in self._model.leaves)

        def along(*v: Tensor) -> tuple[Tensor, ...]:
            derivatives: tuple[Tensor, ...] = jvp(function, primals, v)[1]
            return derivatives

        with (
            torch.no_grad(),
            torch.random.fork_rng(random_devices()),
            quiet_vmap(),
            # Tensors that are assigned inside a transformation cannot be used outside of it.
            tensors_put_back(self._model.function),
        ):
            # A dropout that is active must drop what it dropped in the forward pass.
            torch.set_rng_state(self._random_state[0])
            for state, device in zip(self._random_state[1:], random_devices(), strict=True):
                torch.cuda.set_rng_state(state, device)
            try:
                if V[0].shape[0] == 1:
                    return [x.unsqueeze(0) for x in along(*(v[0] for v in V))]
                return list(vmap(along, randomness="same")(*V))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError):
                self.can_substitute = False
                return None

    def _double_backward(self, V: Sequence[Tensor]) -> Tensor:
        if self._pullback is None:
            self._pullback = self._pull_back()
        u, reached, grads = self._pullback
        if not reached:
            return self.output.new_zeros(V[0].shape[0], *self.output.shape)
        return batched_grad(grads, [u], [V[i] for i in reached])[0]

    def _pull_back(self) -> tuple[Tensor, list[int], list[Tensor]]:
        """Return u, and Jᵀ u as a function of u for the parameters that z depends on."""
        u = torch.zeros_like(self.output, requires_grad=True)
        if not self.output.requires_grad:
            return u, [], []
        pulled = torch.autograd.grad(
            self.output, self._model.leaves, u, create_graph=True, allow_unused=True
        )
        reached = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        return u, reached, [g for g in pulled if g is not None and g.requires_grad]
