"""The Hessian by a feature inside the network; those by parameters have other files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfacopt.argument_checks import check_choice, check_evaluation, check_loss, check_shape
from kfacopt.curvature.batched_autograd import batched_grad
from kfacopt.curvature.confirmation import check_gradient, check_has_graph
from kfacopt.curvature.model import ParametrizedModel
from kfacopt.curvature.network import (
    CACHE_BYTES,
    CHUNK_SIZE,
    NetworkLinearOperator,
    leading_columns,
)
from kfacopt.curvature.risk import scalar_loss
from kfacopt.data import Batch, evaluation, random_state, same_random_numbers, show_progress

IO_TYPES = ("input", "output")

Product = Callable[[Tensor], Tensor]


class Feature(NamedTuple):
    """A tensor that was seen inside a forward pass.

    Attributes:
        value: It, without its graph.
        edge: Its place in the graph, which stays right if a later layer changes it in place.
    """

    value: Tensor
    edge: GradientEdge


class ActivationHessianLinearOperator(NetworkLinearOperator[Product]):
    r"""The Hessian of the loss by an intermediate feature Z, on one batch.

    For L = ℓ(f_θ(X), y) on a single batch and a feature Z = {z_1, …, z_N} that the forward pass
    makes on its way,

        ∇²_Z L,    of dimension dim(Z) = N dim(z), Z flattened as torch does.

    The derivative counts every path from Z to the loss, also those that go around the layer by
    which Z is named.

    Args:
        model_func: The network.
        loss_func: ℓ, any callable that maps predictions and targets to a scalar.
        activation: Which feature: the layer's name in `model_func.named_modules()`; `"input"` or
            `"output"`; and which of the layer's positional inputs, or of its tuple of outputs (0
            where there is one).
        data: One batch `(X, y)`, in an iterable.
        progressbar: Show a bar during products.
        check_deterministic: Check that data and model are deterministic, at the cost of two
            forward passes.
        shape: The shape; if `None`, one forward pass finds it out. If given, checked by the first
            product.
        chunk_size: How many columns are multiplied at once, which bounds the memory.
        cache_bytes: How many bytes of activations are kept between products; see
            `EmpiricalRiskLinearOperator`.

    Raises:
        ValueError: If `data` has more than one batch, or if there is no such feature.
        RuntimeError: If the check for deterministic behavior fails.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.rand(10, 4), torch.rand(10, 2))]
        >>> H = ActivationHessianLinearOperator(model, nn.MSELoss(), ("1", "input", 0), data)
        >>> H.shape  # 10 data of 3 features
        (30, 30)
        >>> same = ActivationHessianLinearOperator(model, nn.MSELoss(), ("0", "output", 0), data)
        >>> torch.allclose(H @ torch.eye(30), same @ torch.eye(30))
        True
    """

    self_adjoint = True

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: Callable[[Tensor, Tensor], Tensor],
        activation: tuple[str, str, int],
        data: Iterable[Batch],
        progressbar: bool = False,
        check_deterministic: bool = True,
        shape: tuple[int, int] | None = None,
        *,
        chunk_size: int = CHUNK_SIZE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        check_evaluation(data, progressbar, check_deterministic)
        check_loss(loss_func)
        if not isinstance(model_func, nn.Module):
            raise ValueError(
                f"model_func must be an nn.Module with named layers, got {model_func!r}."
            )
        self._activation = _checked_activation(model_func, activation)
        with evaluation(model_func):  # a DataLoader draws from torch's generator
            batches = list(islice(show_progress(data, False, ""), 2))
        if len(batches) != 1:
            number = "none" if not batches else "more"
            raise ValueError(f"data must have exactly one batch for a Hessian by Z, got {number}.")
        model = ParametrizedModel.of_module(model_func)
        super().__init__(model, loss_func, data, progressbar, chunk_size, cache_bytes)
        if check_deterministic:
            self._check_deterministic()
        # Also where `shape` is given: the dtype of Z is not known without a forward pass.
        with model.evaluation():
            feature = self._evaluate(self._to_device(*batches[0])[0])[1]
        size = feature.value.numel()
        check_shape(shape, (size, size), "this activation")
        shapes = [tuple(feature.value.shape)]
        self._set_shape(shapes, shapes, feature.value.dtype, feature.value.device)

    def _evaluate(self, X: Any, shift: Tensor | None = None) -> tuple[Tensor, Feature]:
        """Return the predictions, and the feature on their way, moved by `shift`."""
        if isinstance(X, Tensor) and X.is_floating_point():
            # Z has a graph even if no parameter does. A copy: a layer may change it in place.
            X = X.detach().requires_grad_().clone()
        module = self._model.module
        assert module is not None
        with _watch(module, self._activation, shift) as seen:
            output = self._model(X)
        if len(seen) != 1:
            raise ValueError(
                f"activation: the layer {self._activation[0]!r} must run exactly once in a forward "
                f"pass to name a feature, it ran {len(seen)} times."
            )
        return output, seen[0]

    def _seen(self) -> list[Any]:
        return [*super()._seen(), self._activation]

    def _make_term(self, X: Any, y: Any) -> Product:
        states = random_state()
        output, (value, edge) = self._evaluate(X)
        kind = tuple(value.shape), value.dtype
        if self.in_shapes is None or kind != (self.in_shapes[0], self.torch_dtype):
            raise ValueError(
                f"activation: Z had the shape {self.in_shapes} and {self.torch_dtype} when the "
                f"operator was made, it has {kind} now; make a new operator."
            )
        loss = scalar_loss(self._loss_func, output, y)
        check_has_graph(loss)

        def gradient_at(shift: Tensor) -> Tensor:
            with same_random_numbers(states):
                moved_output, moved = self._evaluate(X, shift)
                moved_loss = scalar_loss(self._loss_func, moved_output, y)
            return torch.autograd.grad(moved_loss, [moved.edge], materialize_grads=True)[0]

        check_gradient("model_func or loss_func", loss, value, [edge], gradient_at)
        (gradient,) = torch.autograd.grad(loss, [edge], create_graph=True, allow_unused=True)

        def product(V: Tensor) -> Tensor:
            if gradient is None or not gradient.requires_grad:
                return torch.zeros_like(V)
            return batched_grad([gradient], [edge], [V], like=[value])[0]

        return product

    def _matmat_tensor(self, X: Tensor) -> Tensor:
        assert self.in_shapes is not None
        chunks: list[Tensor] = []
        (columns,) = leading_columns(X, self.in_shapes)

        def add(term: Product) -> None:
            for chunk in self._chunks(X.shape[1]):
                product = term(columns[chunk])
                chunks.append(product.reshape(product.shape[0], -1))

        self._visit_terms(add)
        return torch.cat(chunks).mT


def _checked_activation(model: nn.Module, activation: tuple[str, str, int]) -> tuple[str, str, int]:
    if not isinstance(activation, tuple | list) or len(activation) != 3:
        raise ValueError(
            "activation must have three entries: a layer's name, "
            f'"input" or "output", and an index; got {activation!r}.'
        )
    name, io_type, index = activation
    names = [n for n, _ in model.named_modules()]
    if name not in names:
        raise ValueError(f"activation: no layer {name!r} in model_func, which has {names}.")
    check_choice("activation: its second entry", io_type, IO_TYPES)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise ValueError(f"activation: its third entry must be an index from 0, got {index!r}.")
    return name, io_type, index


@contextmanager
def _watch(
    model: nn.Module, activation: tuple[str, str, int], shift: Tensor | None
) -> Iterator[list[Feature]]:
    """Record a layer's input or output, moved by `shift`, for each of its calls in the context."""
    name, io_type, index = activation
    seen: list[Feature] = []

    def record(tensors: Any) -> Any:
        single = isinstance(tensors, Tensor)
        tensors = (tensors,) if single else tuple(tensors)
        tensor = tensors[index] if index < len(tensors) else None
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(
                f"activation: {io_type} {index} of the layer {name!r} must be a floating tensor; "
                f"it has {[type(t).__name__ for t in tensors]}."
            )
        if shift is not None:
            tensor = tensor + shift
        if not tensor.requires_grad:  # no parameter came before: Z is where the graph begins
            tensor.requires_grad_()
        seen.append(Feature(tensor.detach(), get_gradient_edge(tensor)))
        if shift is None:
            return None
        return tensor if single else (*tensors[:index], tensor, *tensors[index + 1 :])

    layer = model.get_submodule(name)
    if io_type == "input":
        handle = layer.register_forward_pre_hook(lambda _, args: record(args))
    else:
        handle = layer.register_forward_hook(lambda _, args, output: record(output))
    try:
        yield seen
    finally:
        handle.remove()
