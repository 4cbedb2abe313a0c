"""Outputs that tell when a loss is computed from them; what the loss means is in `loss_calls`.

The outermost module's outputs are returned as a `ProbedTensor`, which lets every operation through
and recognises calls of known loss functions. Within the outermost module's forward pass, where
tensors are plain, a `LossCallMode` recognises the same calls, for models that compute their loss
themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from kfacopt.likelihoods import UnsupportedLossError
from kfacopt.optim.watch.forward_pass import (
    ForwardPass,
    ModelOutput,
    ModelOutputs,
    PassObserver,
    node_key,
)
from kfacopt.optim.watch.loss_calls import KNOWN_LOSSES, recognise_call
from kfacopt.optim.watch.recorded_calls import CONTAINERS, Call, LossOrigin, Source, Surroundings


class ProbedTensor(Tensor):
    """A model's output that tells when a loss is computed from it; otherwise a plain tensor.

    It is one until its forward passes are closed. While a function of torch is called, it *is* a
    plain tensor, so that nothing (formatting, subclasses of others) sees a difference.
    """

    _passes: tuple[ForwardPass, ...]
    _outputs: tuple[ModelOutputs, ...]  # theirs, which it keeps alive
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
        # A backward pass calls modules again, where their activations are checkpointed.
        backward = func in _DIFFERENTIATIONS
        alone = not backward and all(issubclass(t, ProbedTensor) for t in types)
        with _plain(probed, alone):
            told = _differentiated(func, args, kwargs, probed) if backward else nullcontext()
            with told:
                result = func(*args, **kwargs)
        if func in KNOWN_LOSSES:
            origin = None if call is None else LossOrigin(call)
            with torch._C.DisableTorchFunctionSubclass():
                _notify(func, unprobe(args), unprobe(kwargs), result, list(passes), origin)
        if func in _KEPT_TENSORS or func is Tensor.tolist:
            return result
        probed_result = _Prober(passes, call, {id(x) for x in given}).tree(result)
        if func is torch.autograd.grad:
            _note_derivatives(probed_result)
        return probed_result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


# What names classes (`type(x)` in messages, dispatch by the name of a library) says torch.Tensor.
ProbedTensor.__module__, ProbedTensor.__name__ = "torch", "Tensor"
ProbedTensor.__qualname__ = "Tensor"


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to the leaves of a tree, and leave shapes what they are, not tuples."""
    return tree_map(function, tree, is_leaf=lambda x: isinstance(x, torch.Size))


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
        if func in KNOWN_LOSSES:
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
    try:
        call = recognise_call(func, args, kwargs)
    except UnsupportedLossError:  # then it is like any other function
        return
    for observer, own in _by_observer(passes):
        observer.observe_loss(call, loss, own, origin)


def _by_observer(passes: Iterable[ForwardPass]) -> list[tuple[PassObserver, list[ForwardPass]]]:
    observers = dict.fromkeys(p.observer for p in passes)
    return [(o, [p for p in passes if p.observer is o]) for o in observers if o is not None]


@contextmanager
def _differentiated(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any], probed: Sequence[ProbedTensor]
) -> Iterator[None]:
    """Tell observers of what is differentiated while one of `_DIFFERENTIATIONS` runs."""
    handles: list[Any] = []
    arguments = dict(zip(_DIFFERENTIATIONS[func], args, strict=False)) | kwargs
    roots = tree_flatten(arguments[_DIFFERENTIATIONS[func][0]])[0]
    inputs = arguments.get("inputs")
    given = {id(x): x for x in roots if isinstance(x, Tensor)}
    for root in {id(x): x for x in probed if id(x) in given}.values():
        others = [x for x in given.values() if x is not root]
        for observer, own in _by_observer(vars(root)["_passes"]):
            if root.grad_fn is not None:
                handles += observer.observe_objective(root, own, others, inputs)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_derivatives(results: Any) -> None:
    """Take note of derivatives that have a graph of their own."""
    for tensor in tree_flatten(results)[0]:
        if isinstance(tensor, ProbedTensor):
            with torch._C.DisableTorchFunctionSubclass():
                edge = get_gradient_edge(tensor)
            for forward_pass in tensor._passes:
                forward_pass.derivatives.add(node_key(edge.node))


# What differentiates, and its positional arguments.
_DIFFERENTIATIONS = {
    function: tuple(inspect.signature(function).parameters)
    for function in (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
}


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
        return self._leaf(tree) if isinstance(tree, Tensor) else _mapped(self._leaf, tree)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._tensor(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            # torch's pytrees know dataclasses only if they were registered
            original, leaf = leaf, copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                value = self.tree(getattr(original, field.name))
                object.__setattr__(leaf, field.name, value)
        elif isinstance(leaf, CONTAINERS):
            leaf = copy.copy(leaf)
            vars(leaf).update((name, self.tree(value)) for name, value in vars(leaf).items())
        return leaf

    def _tensor(self, tensor: Tensor) -> Tensor:
        number = next(self.numbers)
        known: tuple[ForwardPass, ...] = ()
        if isinstance(tensor, ProbedTensor):
            known = tensor._passes
            if self.given is None:
                tensor = self._output_of_another(tensor, number)
        elif type(tensor) is Tensor and tensor.requires_grad:
            if self.given is None or id(tensor) in self.given:
                behind = tensor
                tensor = tensor.as_subclass(ProbedTensor)
                if self.given is None:
                    output = ModelOutput.of(tensor, behind, self._source(number))
                    self.passes[-1].outputs.append(output)
            else:
                tensor.__class__ = ProbedTensor
        else:
            return tensor
        probed = cast(ProbedTensor, tensor)
        probed._passes = tuple(dict.fromkeys(known + self.passes))
        probed._outputs = tuple(p.outputs for p in probed._passes)
        for forward_pass in self.passes:
            if forward_pass not in known:
                forward_pass.probe(probed)
        probed._source = self._source(number)
        return probed

    def _output_of_another(self, tensor: ProbedTensor, number: int) -> Tensor:
        """Take note of an output that tells of other passes.

        Of another optimizer that watches the module, too; or it was computed from probed tensors
        that came in an object that nobody looked into.
        """
        with torch._C.DisableTorchFunctionSubclass():
            edge = get_gradient_edge(tensor)
            known = [o for own in tensor._outputs for o in own if o.edge == edge]
            if known:
                self.passes[-1].outputs.append(known[0])
                return tensor
            behind, tensor = tensor, tensor.as_subclass(ProbedTensor)
            output = ModelOutput.of(tensor, behind, self._source(number))
        self.passes[-1].outputs.append(output)
        return tensor

    def _source(self, number: int) -> Source | None:
        return None if self.call is None else Source(self.call, number)


def probe(outputs: Any, forward_pass: ForwardPass, parents: list[ForwardPass]) -> Any:
    """Return a module's outputs with every differentiable tensor probed.

    Args:
        outputs: A tensor, or tensors in containers, registered pytrees, dataclasses or
            `CONTAINERS`.
        forward_pass: The call that made them.
        parents: The calls that fed it.
    """
    probed = _Prober((*parents, forward_pass), forward_pass.call, None).tree(outputs)
    forward_pass.hand_over_outputs()
    return probed


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
        probed._outputs = source._outputs
        for forward_pass in probed._passes:
            forward_pass.probe(probed)
            forward_pass.carry(source, probed)
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
        if not isinstance(leaf, Tensor):
            return leaf
        fixed.append(leaf.grad_fn is not None or isinstance(leaf, Parameter))
        return leaf.detach()

    fixed: list[bool] = []
    with torch._C.DisableTorchFunctionSubclass():
        own = (_mapped(sourced, args), _mapped(sourced, kwargs))
    return Call(function, *own, surroundings, any(fixed))


def unprobe(tree: Any) -> Any:
    """Return tensors in containers as plain tensors."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, ProbedTensor):
            return leaf
        with torch._C.DisableTorchFunctionSubclass():
            return leaf.as_subclass(Tensor)

    return _mapped(plain, tree)


def passes_feeding(tree: Any) -> list[ForwardPass]:
    """Return the forward passes whose outputs are among a module's inputs."""
    return list(dict.fromkeys(_passes_of(tree)))


def differentiable_tensors(tree: Any) -> list[Tensor]:
    """Return the floating tensors with a graph in a module's outputs."""
    leaves = tree_flatten(tree)[0]
    return [
        x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad
    ]
