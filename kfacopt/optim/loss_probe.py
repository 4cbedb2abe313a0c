"""Recognise the loss that the user computes on a model's output, without being told.

The outermost module's outputs are returned as a `ProbedTensor`, which lets every operation through
and recognises calls of known loss functions. Within the outermost module's forward pass, where
tensors are plain, a `LossCallMode` recognises the same calls, for models that compute their loss
themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from kfacopt.kfac.capture import LayerUse
from kfacopt.likelihoods import UnsupportedLossError
from kfacopt.optim.loss_calls import LossCall, recognise_call


class LossObserver(Protocol):
    """Whoever wants to know about losses."""

    def observe_loss(
        self, call: LossCall | UnsupportedLossError, loss: Tensor, passes: list[ForwardPass]
    ) -> None:
        """Take note of a recognised loss on the outputs of forward passes."""

    def observe_unknown_loss(self, name: str, loss: Tensor) -> None:
        """Take note of a call of a loss function that is not known."""


class ForwardPass:
    """One call of an outermost module: the layers that it used.

    It is referred to by the outputs and the loss's graph alone and goes away with them.

    Attributes:
        uses: The uses of layers, in order.
        consumed: Whether its output became the input of another outermost module.
    """

    def __init__(self, observer: LossObserver) -> None:
        """Start without any use."""
        # Weak: an output that is kept must not keep a deleted optimizer at work.
        self._observer = weakref.ref(observer)
        self.uses: list[LayerUse] = []
        self.consumed = False

    @property
    def observer(self) -> LossObserver | None:
        """Who asked for this pass, or `None` if it is gone."""
        return self._observer()


class ProbedTensor(Tensor):
    """A model's output that tells when a loss is computed from it; otherwise a plain tensor."""

    _passes: tuple[ForwardPass, ...]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Let `func` through, note it if it is a loss, and pass the probe on to its results."""
        kwargs = kwargs or {}
        passes = tuple(dict.fromkeys(_passes_of((args, kwargs))))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if func in _LOSS_FUNCTIONS:
                _notify(func, unprobe(args), unprobe(kwargs), result, list(passes))
                return result
        return _wrap(result, passes)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class LossCallMode(TorchFunctionMode):
    """Recognise losses among all torch functions that are called while it is on."""

    def __init__(self, forward_pass: ForwardPass, parents: list[ForwardPass]) -> None:
        """Recognise losses on the layers of a forward pass and of those that fed it."""
        super().__init__()
        self._passes = [*parents, forward_pass]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` and note it if it is a loss."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _LOSS_FUNCTIONS:
            _notify(func, args, kwargs, result, self._passes)
        return result


def _is_loss_name(name: str) -> bool:
    others = {"cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"}
    return name in others or (name.endswith("_loss") and not name.startswith("_"))


_LOSS_FUNCTIONS = {getattr(F, name) for name in dir(F) if _is_loss_name(name)}


def _notify(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Any,
    passes: list[ForwardPass],
) -> None:
    if not (isinstance(loss, Tensor) and loss.requires_grad and torch.is_grad_enabled()):
        return
    call: LossCall | UnsupportedLossError | None
    try:
        call = recognise_call(func, args, kwargs)
    except UnsupportedLossError as error:
        call = error
    for observer in dict.fromkeys(p.observer for p in passes):
        if observer is None:
            continue
        if call is None:
            observer.observe_unknown_loss(func.__name__, loss)
        else:
            observer.observe_loss(call, loss, [p for p in passes if p.observer is observer])


def _passes_of(tree: Any) -> Iterator[ForwardPass]:
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, ProbedTensor):
            yield from leaf._passes


def _wrap_leaf(passes: tuple[ForwardPass, ...], leaf: Any) -> Any:
    if isinstance(leaf, ProbedTensor):
        leaf._passes = tuple(dict.fromkeys(leaf._passes + passes))
    elif type(leaf) is Tensor and leaf.is_floating_point() and leaf.requires_grad:
        with torch._C.DisableTorchFunctionSubclass():
            leaf = leaf.as_subclass(ProbedTensor)
        leaf._passes = passes
    elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        # torch's pytrees know dataclasses only if they were registered
        original, leaf = leaf, copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(leaf, field.name, _wrap(getattr(original, field.name), passes))
    return leaf


def _wrap(tree: Any, passes: tuple[ForwardPass, ...]) -> Any:
    wrap = functools.partial(_wrap_leaf, passes)
    return wrap(tree) if isinstance(tree, Tensor) else tree_map(wrap, tree)


def probe(outputs: Any, forward_pass: ForwardPass, parents: list[ForwardPass]) -> Any:
    """Return a module's outputs with every differentiable tensor probed.

    Args:
        outputs: A tensor, or tensors in containers, registered pytrees or dataclasses.
        forward_pass: The call that made them.
        parents: The calls that fed it.
    """
    return _wrap(outputs, (*parents, forward_pass))


def unprobe(tree: Any) -> Any:
    """Return tensors in containers as plain tensors."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, ProbedTensor):
            return leaf
        with torch._C.DisableTorchFunctionSubclass():
            return leaf.as_subclass(Tensor)

    return tree_map(plain, tree)


def passes_feeding(tree: Any) -> list[ForwardPass]:
    """Return the forward passes whose outputs are among a module's inputs."""
    return list(dict.fromkeys(_passes_of(tree)))


def differentiable_tensors(tree: Any) -> list[Tensor]:
    """Return the floating tensors with a graph in a module's outputs."""
    leaves = tree_flatten(tree)[0]
    return [
        x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad
    ]
