"""A network as a function of named tensors; what is differentiated, not how."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfacopt.argument_checks import check_distinct, check_params
from kfacopt.curvature.batched_autograd import if_possible
from kfacopt.curvature.differentiable_functions import DifferentiableFunctions
from kfacopt.curvature.verdicts import Verdicts
from kfacopt.data import evaluation
from kfacopt.module_calls import call_with
from kfacopt.module_search import living_modules, modules_of, owners_of


class ParametrizedModel:
    """f(X; θ) with the tensors θ that it is differentiated by.

    Args:
        model_func: A module, or a function that closes over its parameters.
        params: θ: a list of the parameters that `model_func` uses, any subset in any order; or a
            mapping from names in the module to tensors that take the place of its own.

    Attributes:
        leaves: θ, as leaves of autograd's graph.
        device: Where it is evaluated.
        confirmed: Whether derivatives of graphs were found to be right.

    Raises:
        ValueError: If `params` is empty, names what the module does not have, repeats a tensor,
            or mixes dtypes or devices.
    """

    def __init__(
        self, model_func: Callable[[Any], Any], params: Sequence[Tensor] | Mapping[str, Tensor]
    ) -> None:
        if not callable(model_func):
            raise ValueError(f"model_func must be a module or a function, got {model_func!r}.")
        params = check_params(params)
        if isinstance(params, Mapping):
            _check_names(model_func, params)
            self._hold(model_func, [_leaf_of(t) for t in params.values()], list(params))
            self._sources = list(params.values())
        else:
            self._hold(model_func, list(params), _names_in(model_func, params))
        self.is_functional = isinstance(params, Mapping)
        _check_leaves(self.leaves, self.names)
        if self.names is None and isinstance(model_func, nn.Module):
            raise ValueError(
                "params: the list holds tensors that are no parameters of model_func. Give its "
                "own, a dict from its names to tensors that take their place, or a function "
                "as model_func that closes over the tensors."
            )
        # Modules that own θ and are not found through the function are looked for once.
        known = {id(p) for m in modules_of(model_func) for p in m.parameters()}
        if unknown := [p for p in self.leaves if id(p) not in known and not self.is_functional]:
            self._owners = owners_of(unknown, living_modules())
        self.device = self.leaves[0].device

    def _hold(
        self, function: Callable[[Any], Any], leaves: list[Tensor], names: list[str] | None
    ) -> None:
        self.function, self.leaves, self.names = function, leaves, names
        self._kinds = [_kind_of(p) for p in leaves]
        self._sources, self._owners = list[Tensor](), list[nn.Module]()
        self.confirmed, self._functions = Verdicts(), DifferentiableFunctions()

    @classmethod
    def of_module(cls, module: nn.Module) -> ParametrizedModel:
        """Return a module as a function of its inputs alone."""
        model = cls.__new__(cls)
        model._hold(module, [], [])
        model.is_functional = False
        model.device = next(chain(module.parameters(), module.buffers()), torch.empty(0)).device
        return model

    def refresh(self) -> None:
        """Follow a dict's tensors whose `.data` was replaced.

        Raises:
            ValueError: If one of θ is frozen, or has another shape, dtype or device than at first.
        """
        for i, (leaf, source) in enumerate(zip(self.leaves, self._sources, strict=False)):
            if _kind_of(source) == self._kinds[i] and source.data_ptr() == leaf.data_ptr():
                continue
            self.leaves[i] = _leaf_of(source)
        for i, (p, kind) in enumerate(zip(self.leaves, self._kinds, strict=True)):
            if _kind_of(p) != kind:
                before, now = (
                    f"{shape}, {dtype}, {device}" for shape, dtype, device in (kind, _kind_of(p))
                )
                raise ValueError(
                    f"{_label(i, self.names)} was ({before}) when the operator was made and is "
                    f"({now}) now; make a new operator."
                )
            if not p.requires_grad:
                raise ValueError(
                    f"{_label(i, self.names)} does not require gradients any more; call "
                    "requires_grad_(), or make a new operator without it."
                )

    def __call__(self, X: Any) -> Any:
        """Return f(X; θ), with a graph that reaches θ."""
        if self.is_functional:
            return self.at(self.leaves, X)
        return self.function(X)

    @property
    def module(self) -> nn.Module | None:
        """The module, or `None` if the model is a plain function."""
        return self.function if isinstance(self.function, nn.Module) else None

    @property
    def switches(self) -> int:
        """How often evaluations switched gradients on or off within, which not all modes see."""
        return self._functions.switches

    def roots(self) -> list[Any] | None:
        """Return what its values depend on, but for the inputs; `None` if nobody knows."""
        return None if self.module is None else [*self.leaves, self.module]

    def modules(self) -> list[nn.Module]:
        """Return the modules that are evaluated, without their parts."""
        if isinstance(self.function, nn.Module):
            return [self.function]
        found = {id(m): m for m in [*modules_of(self.function), *self._owners]}
        return list(found.values())

    def at(self, values: Sequence[Tensor], X: Any) -> Any:
        """Return f(X; values). Only for modules that own θ."""
        assert self.module is not None
        assert self.names is not None
        own: dict[str, Tensor] = {
            **dict(self.module.named_parameters(remove_duplicate=False)),
            **dict(self.module.named_buffers(remove_duplicate=False)),
        }
        by_id: dict[int, Tensor] = {}
        for name, value in zip(self.names, values, strict=True):
            if by_id.setdefault(id(own[name]), value) is not value:
                raise ValueError(f"params: {name!r} is tied to another name; give one of them.")
        return call_with(self.module, by_id, (X,), {})

    def in_float64(self) -> ParametrizedModel:
        """Return a copy in float64. Only for modules that own θ."""
        assert self.names is not None
        values = [p.detach().double().requires_grad_() for p in self.leaves]
        module = copy.deepcopy(self.function)
        assert isinstance(module, nn.Module)
        return ParametrizedModel(module.double(), dict(zip(self.names, values, strict=True)))

    def can_substitute(self) -> bool:
        """Tell whether `at` is defined: whether the module, as it is now, owns θ."""
        if isinstance(self.function, torch.jit.ScriptModule):
            return False
        return self.is_functional or (
            self.names is not None and _names_in(self.function, self.leaves) == self.names
        )

    def predict(self, X: Any) -> Any:
        """Return f(X; θ) without a graph, as far as f does without."""
        with torch.no_grad():
            output = if_possible(lambda: self(X))
            if output is None:  # it differentiates by its inputs
                with torch.enable_grad():
                    output = self(X)
        return output.detach() if isinstance(output, Tensor) else output

    def reached_by(self, value: Tensor) -> bool:
        """Tell whether a value's graph reaches any of θ."""
        if not value.requires_grad:
            return False
        grads = torch.autograd.grad(value.sum(), self.leaves, allow_unused=True)
        return any(g is not None for g in grads)

    @contextmanager
    def evaluation(self, *functions: Callable[..., Any] | None) -> Iterator[None]:
        """Run passes that leave no trace, on kernels that can be differentiated twice.

        Fused weight normalisation has a wrong double derivative, an embedding with a padding index
        a wrong forward mode. Fused attention and the fast path of
        `nn.TransformerEncoderLayer` have neither forward-mode nor double derivatives, cuDNN's
        recurrent layers have no double derivatives, nor has compiled code. Where a plain function
        uses recurrent layers on CUDA that are found neither through it nor through θ, run products
        under `torch.backends.cudnn.flags(enabled=False)`.

        Args:
            functions: What else is evaluated, such as the loss.
        """
        owners = self.modules()
        with ExitStack() as stack:
            others = [m for f in functions if f is not None for m in modules_of(f)]
            stack.enter_context(evaluation(*owners, *others))
            if "torch._dynamo" in sys.modules:  # else nothing can be compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(self._functions)
            stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
            mha.set_fastpath_enabled(False)
            parts = chain.from_iterable(m.modules() for m in owners)
            if self.device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in parts):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield


def _names_in(model_func: Callable[..., Any], params: Sequence[Tensor]) -> list[str] | None:
    """Return the parameters' names in the module, or `None` if it does not own them all."""
    if not isinstance(model_func, nn.Module):
        return None
    known = {id(p): name for name, p in model_func.named_parameters()}
    names = [known.get(id(p)) for p in params]
    return [name for name in names if name is not None] if None not in names else None


def _check_names(model_func: Callable[..., Any], params: Mapping[str, Tensor]) -> None:
    if not isinstance(model_func, nn.Module):
        raise ValueError(
            "params: a dict of named tensors needs an nn.Module as model_func, got "
            f"{type(model_func).__name__}; give a list of the tensors that it closes over."
        )
    own: dict[str, Tensor] = {
        **dict(model_func.named_parameters(remove_duplicate=False)),
        **dict(model_func.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in params.items():
        if name not in own:
            raise ValueError(f"params: {name!r} is not in model_func, which has {list(own)}.")
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"params[{name!r}] must have the shape {tuple(own[name].shape)} of the module's, "
                f"got {tuple(tensor.shape)}."
            )


def _leaf_of(tensor: Tensor) -> Tensor:
    """Return a leaf that shares memory and version counter with a tensor of the user."""
    return tensor.detach().requires_grad_()


def _kind_of(p: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(p.shape), p.dtype, p.device


def _label(index: int, names: Sequence[str] | None) -> str:
    return f"params[{index}]" if names is None else f"params[{index}] ({names[index]})"


def _check_leaves(leaves: Sequence[Tensor], names: Sequence[str] | None) -> None:
    check_distinct(leaves)
    first = leaves[0]
    for i, p in enumerate(leaves):
        label = _label(i, names)
        if not p.requires_grad:
            raise ValueError(f"{label} does not require gradients; call requires_grad_().")
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"{label}: parameters must share one dtype and device, got {p.dtype} on {p.device} "
                f"beside {first.dtype} on {first.device}; split params into operators of their own."
            )
