"""Outputs that tell when a loss is computed from them; what the loss means is in `loss_calls`.

The outermost module's outputs are returned as a `ProbedTensor`, which lets every operation through
and recognises calls of known loss functions. Within the outermost module's forward pass, where
tensors are plain, a `LossCallMode` recognises the same calls, for models that compute their loss
themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from kfacopt.kfac.capture import LayerUse
from kfacopt.likelihoods import UnsupportedLossError
from kfacopt.optim.watch.compilation import EAGER_SPELL
from kfacopt.optim.watch.loss_calls import LOSS_FUNCTIONS, LossCall, recognise_call
from kfacopt.optim.watch.recorded_calls import Call, LossOrigin, Source, Surroundings


class PassObserver(Protocol):
    """Whoever wants to know about losses."""

    def observe_loss(
        self,
        call: LossCall | UnsupportedLossError,
        loss: Tensor,
        passes: list[ForwardPass],
        origin: LossOrigin | None,
    ) -> None:
        """Take note of a recognised loss on the outputs of forward passes.

        Args:
            call: What the loss means.
            loss: Its value.
            passes: The forward passes.
            origin: Where it was computed, if calls are recorded.
        """

    def observe_unknown_loss(self, name: str, loss: Tensor) -> None:
        """Take note of a call of a loss function that is not known."""


class ForwardPass:
    """One call of an outermost module: the layers that it used.

    It is referred to by the outputs and the loss's graph alone and goes away with them. Until then,
    or until it is closed, compiled code runs eagerly.

    Attributes:
        uses: The uses of layers, in order.
        consumed: Whether its output became the input of another outermost module.
        call: The call, recorded for a replay; `None` where nothing is recorded.
    """

    def __init__(self, observer: PassObserver, call: Call | None = None) -> None:
        """Start without any use."""
        # Weak: an output that is kept must not keep a deleted optimizer at work.
        self._observer = weakref.ref(observer)
        self.uses: list[LayerUse] = []
        self.consumed = False
        self.call = call
        EAGER_SPELL.begin(self)
        self._probed: list[weakref.ref[ProbedTensor]] = []

    @property
    def observer(self) -> PassObserver | None:
        """Who asked for this pass, or `None` if it is gone."""
        return self._observer()

    def probe(self, tensor: ProbedTensor) -> None:
        """Take note of a tensor that tells of losses on this pass."""
        self._probed.append(weakref.ref(tensor))

    def close(self) -> None:
        """Let the tensors that told of losses on this pass alone be plain ones again."""
        EAGER_SPELL.end(self)
        for ref in self._probed:
            tensor = ref()
            if tensor is not None and isinstance(tensor, ProbedTensor):
                tensor._passes = tuple(p for p in tensor._passes if p is not self)
                if not tensor._passes:
                    vars(tensor).pop("_source", None)
                    del tensor._passes
                    tensor.__class__ = Tensor  # type: ignore[assignment]
        self._probed.clear()


class ProbedTensor(Tensor):
    """A model's output that tells when a loss is computed from it; otherwise a plain tensor.

    It is one until its forward passes are closed. While a function of torch is called, it *is* a
    plain tensor, so that nothing (formatting, subclasses of others) sees a difference.
    """

    _passes: tuple[ForwardPass, ...]
    _source: Source | None = None

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
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        probed = [x for x in given if isinstance(x, ProbedTensor)]
        passes = tuple(dict.fromkeys(p for x in probed for p in x._passes))
        call = None
        if any(p.call is not None for p in passes):
            call = record_call(func, args, kwargs)
        with _plain(probed, alone=all(issubclass(t, ProbedTensor) for t in types)):
            result = func(*args, **kwargs)
        if func in LOSS_FUNCTIONS:
            origin = None if call is None else LossOrigin(call)
            with torch._C.DisableTorchFunctionSubclass():
                _notify(func, unprobe(args), unprobe(kwargs), result, list(passes), origin)
            return result
        if func in _KEPT_TENSORS:
            return result
        return _Prober(passes, call, {id(x) for x in given}).tree(result)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


# Of attributes that are tensors with a life of their own, not functions of the tensor.
_KEPT_TENSORS = tuple(vars(torch._C.TensorBase)[name].__get__ for name in ("_base", "grad"))


@contextmanager
def _plain(probed: Sequence[Tensor], alone: bool) -> Iterator[None]:
    """Make probed tensors plain ones for a while.

    Args:
        probed: The tensors.
        alone: Whether no other subclass of tensors has a say; only then others are kept out that
            hide in containers that pytrees do not know.
    """
    for x in probed:
        x.__class__ = Tensor
    try:
        with torch._C.DisableTorchFunctionSubclass() if alone else nullcontext():
            yield
    finally:
        for x in probed:
            if "_passes" in vars(x):  # else its passes were closed meanwhile
                x.__class__ = ProbedTensor


class LossCallMode(TorchFunctionMode):
    """Recognise losses among all torch functions that are called while it is on."""

    def __init__(self, forward_pass: ForwardPass, parents: list[ForwardPass]) -> None:
        """Recognise losses on the layers of a forward pass and of those that fed it."""
        super().__init__()
        self._passes = [*parents, forward_pass]
        self._calls = 0

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
        if func in LOSS_FUNCTIONS:
            call = self._passes[-1].call
            origin = None if call is None else LossOrigin(call, self._calls)
            self._calls += 1
            _notify(func, args, kwargs, result, self._passes, origin)
        return result


def _notify(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Any,
    passes: list[ForwardPass],
    origin: LossOrigin | None,
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
            own = [p for p in passes if p.observer is observer]
            observer.observe_loss(call, loss, own, origin)


def _passes_of(tree: Any) -> Iterator[ForwardPass]:
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, ProbedTensor):
            yield from leaf._passes


@dataclasses.dataclass(frozen=True)
class _Prober:
    """Probes the tensors in a call's result, numbered as by `replay.tensor_leaves`.

    Attributes:
        passes: What they tell of.
        call: The call, if calls are recorded.
        given: The `id`s of the tensors that the call was given. A result that is none of them is
            new and becomes a probe itself; else, and for modules, which may keep their outputs,
            the probe is another tensor on the same data.
        numbers: Counts the tensors.
    """

    passes: tuple[ForwardPass, ...]
    call: Call | None
    given: set[int] | None
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def tree(self, tree: Any) -> Any:
        return self._leaf(tree) if isinstance(tree, Tensor) else tree_map(self._leaf, tree)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._tensor(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            # torch's pytrees know dataclasses only if they were registered
            original, leaf = leaf, copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                value = self.tree(getattr(original, field.name))
                object.__setattr__(leaf, field.name, value)
        return leaf

    def _tensor(self, tensor: Tensor) -> Tensor:
        number = next(self.numbers)
        known: tuple[ForwardPass, ...] = ()
        if isinstance(tensor, ProbedTensor):
            known = tensor._passes
        elif type(tensor) is Tensor and tensor.requires_grad:
            if self.given is None or id(tensor) in self.given:
                tensor = tensor.as_subclass(ProbedTensor)
            else:
                tensor.__class__ = ProbedTensor
        else:
            return tensor
        probed = cast(ProbedTensor, tensor)
        probed._passes = tuple(dict.fromkeys(known + self.passes))
        for forward_pass in self.passes:
            if forward_pass not in known:
                forward_pass.probe(probed)
        probed._source = None if self.call is None else Source(self.call, number)
        return probed


def probe(outputs: Any, forward_pass: ForwardPass, parents: list[ForwardPass]) -> Any:
    """Return a module's outputs with every differentiable tensor probed.

    Args:
        outputs: A tensor, or tensors in containers, registered pytrees or dataclasses.
        forward_pass: The call that made them.
        parents: The calls that fed it.
    """
    return _Prober((*parents, forward_pass), forward_pass.call, None).tree(outputs)


def carry_probes(before: Any, after: Any) -> Any:
    """Return tensors in containers with the probes of those that stand at the same places.

    Args:
        before: Probed tensors and others.
        after: What became of them by operations that lose probes and change no values.
    """
    leaves, spec = tree_flatten(after)
    sources = tree_flatten(before)[0]
    if len(leaves) != len(sources):
        return after

    def carried(source: Any, leaf: Any) -> Any:
        if not isinstance(source, ProbedTensor) or type(leaf) is not Tensor:
            return leaf
        if not leaf.requires_grad:
            return leaf
        with torch._C.DisableTorchFunctionSubclass():
            probed = leaf.as_subclass(ProbedTensor)
        probed._passes, probed._source = source._passes, source._source
        for forward_pass in probed._passes:
            forward_pass.probe(probed)
        return probed

    pairs = zip(sources, leaves, strict=True)
    return tree_unflatten([carried(*pair) for pair in pairs], spec)


def record_call(
    function: Callable[..., Any], args: Any, kwargs: Any, surroundings: Surroundings | None = None
) -> Call:
    """Record a call, with the sources of probed tensors among its arguments.

    Args:
        function: A module or a function of torch.
        args: Its arguments.
        kwargs: Its keyword arguments.
        surroundings: What a module's forward pass depends on.
    """

    def sourced(leaf: Any) -> Any:
        if isinstance(leaf, ProbedTensor) and leaf._source is not None:
            return leaf._source
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    with torch._C.DisableTorchFunctionSubclass():
        return Call(function, tree_map(sourced, args), tree_map(sourced, kwargs), surroundings)


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
