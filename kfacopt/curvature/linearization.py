"""Products with the Jacobian of a network's outputs, for many vectors at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import grad, jvp, vmap

from kfacopt.curvature.model import ParametrizedModel
from kfacopt.data import random_devices, tensors_put_back

# From this many columns on, the forward pass that forward mode repeats is cheap beside the rest.
_FORWARD_MODE_COLUMNS = 8


def batched_grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    vectors: Sequence[Tensor],
    *,
    like: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return vᵀ ∂outputs/∂inputs for K vectors; the graph stays alive.

    All K are backpropagated at once by `vmap`. Where an operation of the graph cannot be
    vectorised, they are backpropagated one after the other, with the same result.

    Args:
        outputs: Tensors with a graph.
        inputs: What is differentiated by.
        vectors: One `[K, *output.shape]` for each output.
        like: Tensors of the inputs' shapes, where these are gradient edges.

    Returns:
        One `[K, *input.shape]` for each input; zeros where no output depends on it.
    """
    columns = vectors[0].shape[0]
    shapes = [x for x in inputs if isinstance(x, Tensor)] if like is None else like
    grads = _vectorised_grad(outputs, inputs, vectors) if columns > 1 else None
    if grads is None:
        each = [
            torch.autograd.grad(
                outputs, inputs, [v[k] for v in vectors], retain_graph=True, allow_unused=True
            )
            for k in range(columns)
        ]
        grads = tuple(None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True))
    return [
        torch.zeros(columns, *x.shape, dtype=x.dtype, device=x.device) if g is None else g
        for g, x in zip(grads, shapes, strict=True)
    ]


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Silence what torch says of itself when it vectorises."""
    with warnings.catch_warnings():
        # vmap itself loops over an operation that has no batching rule, and says so.
        warnings.filterwarnings("ignore", "There is a performance drop")
        # Its forward-mode formulas are scripted when they are first needed.
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        yield


def _vectorised_grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    vectors: Sequence[Tensor],
) -> tuple[Tensor | None, ...] | None:
    with quiet_vmap():
        try:
            return torch.autograd.grad(
                outputs,
                inputs,
                vectors,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None


class Linearization:
    """The derivative J of z = f(X; θ) by θ, at the current θ.

    The graph of the forward pass is kept, and that of the backward pass once `jvp` needs it.
    J v is taken in one of two ways:

    - as the derivative of u ↦ Jᵀ u, which is linear in u, on those graphs: nothing that does not
      depend on v is computed again; one column costs two products per layer, as Jᵀ u does;
    - in forward mode, one forward pass for all columns together. It is preferred for many
      columns, and for convolutions, whose double derivative computes by-products
      (`_convolution_double_backward` forms all of its outputs, asked for or not).

    Args:
        model: f and θ.
        X: The inputs of one batch.

    Attributes:
        output: z, with its graph.
        can_substitute: Whether f can be evaluated with other tensors in the place of θ.
    """

    def __init__(self, model: ParametrizedModel, X: Any) -> None:
        self._model, self._X = model, X
        self._random_state = [torch.get_rng_state()]
        self._random_state += [torch.cuda.get_rng_state(d) for d in random_devices()]
        self.output: Tensor = model(X)
        if not isinstance(self.output, Tensor):
            raise TypeError(
                f"model_func must return one tensor, got {type(self.output).__name__}; wrap the "
                "model in a module that selects what the loss sees."
            )
        self._pullback: tuple[Tensor, list[int], list[Tensor]] | None = None
        self.can_substitute = model.can_substitute()
        self._checked: bool | None = None
        convolutions = nn.modules.conv._ConvNd
        modules = model.module.modules() if model.module is not None else ()
        self._convolves = any(isinstance(m, convolutions) for m in modules)

    def jvp(self, V: Sequence[Tensor]) -> Tensor:
        """Return J v `[K, *z.shape]` for K vectors, one `[K, *p.shape]` for each parameter."""
        wide = self._convolves or V[0].shape[0] >= _FORWARD_MODE_COLUMNS
        if wide and self._can_forward():
            result: Tensor | None = self._forward_mode(lambda *p: self._model.at(p, self._X), V)
            if result is not None:
                return result
        return self._double_backward(V)

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
        if not self.output.requires_grad:
            return [p.new_zeros(U.shape[0], *p.shape) for p in self._model.leaves]
        return batched_grad([self.output], self._model.leaves, [U])

    def gradient_jvp(
        self, scalar: Callable[[Tensor], Tensor], V: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """Return the derivatives of ∇_θ s(z) along K vectors, in forward mode over reverse mode.

        Args:
            scalar: s, maps z to a scalar.
            V: The vectors, one `[K, *p.shape]` for each parameter.

        Returns:
            One `[K, *p.shape]` for each parameter; or `None` where forward mode is not at hand, or
            does not pay for as few columns.
        """
        if V[0].shape[0] < _FORWARD_MODE_COLUMNS or not self._can_forward():
            return None
        if self._model.reached_by(scalar(self.output.detach())):  # a loss that sees θ itself
            return None
        every = tuple(range(len(self._model.leaves)))
        gradient = grad(lambda *p: scalar(self._model.at(p, self._X)), argnums=every)
        result = self._forward_mode(gradient, V)
        return None if result is None else list(result)

    def _forward_mode(self, function: Callable[..., Any], V: Sequence[Tensor]) -> Any:
        """Return the derivatives of a function of θ along K vectors, or `None` if torch cannot."""
        primals = tuple(p.detach() for p in self._model.leaves)

        def along(*v: Tensor) -> Any:
            return jvp(function, primals, v)[1]

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
                    return along(*(v[0] for v in V)).unsqueeze(0)
                return vmap(along, randomness="same")(*V)
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
