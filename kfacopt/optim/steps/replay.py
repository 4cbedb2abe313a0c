"""Run the user's objective again, at other parameters; what is recorded is in `watch`.

While a self-tuning optimizer watches, the calls of outermost modules and the functions that were
applied to their outputs are recorded, up to the losses. A replay runs the same calls in the same
order, with tensors of its own in the place of the parameters and with the same random numbers.
Buffers (the running statistics of batch norm) are replaced by copies. Nothing is autocast: forward
mode has no rules for that, and the change of a loss is smaller than bfloat16 resolves.

References:
    Martens & Grosse (2015), https://arxiv.org/abs/1503.05671, sections 6.4 and 6.5, for what the
    evaluations are good for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from kfacopt.data import evaluation
from kfacopt.likelihoods import widened
from kfacopt.optim.watch.loss_calls import KNOWN_LOSSES, LossCall, recognise_call
from kfacopt.optim.watch.recorded_calls import (
    Call,
    LayerSource,
    ObjectiveTerm,
    ScalarTerm,
    Source,
    Term,
    device_types,
    in_order,
    tensor_leaves,
)


@dataclass(frozen=True, eq=False)
class ReplayedTerm:
    """A term of the objective, evaluated again.

    Attributes:
        recorded: The term as it was recorded.
        output: What has to be the same again: z of a known loss, the value of a scalar.
        outputs: The tensors z that its curvature is at.
        contribution: What it adds to the objective, a scalar.
        call: What a known loss means.
    """

    recorded: Term
    output: Tensor
    outputs: Sequence[Tensor]
    contribution: Tensor
    call: LossCall | None = None

    @property
    def counts(self) -> bool:
        """Whether the contribution is not part of another term's."""
        return isinstance(self.recorded, ScalarTerm) or self.recorded.counts

    def curvature_product(
        self, outputs: Sequence[Tensor], vectors: Sequence[Tensor], loss_scale: float
    ) -> list[Tensor]:
        """Return H v for each z, with the term's factor in the objective.

        Args:
            outputs: z, without derivatives.
            vectors: v for each z.
            loss_scale: What a `GradScaler` multiplied the objective with.
        """
        if isinstance(self.recorded, ScalarTerm):
            return self.recorded.product([widened(v) for v in vectors], loss_scale)
        assert self.call is not None
        z, likelihood = widened(outputs[0]), self.call.likelihood
        upstream = self.recorded.upstream / loss_scale
        weights = likelihood.curvature_weights(z, self.call.target, upstream)
        return [likelihood.hessian_product(z, weights, vectors[0].to(z.dtype))]


class CallRecorder(TorchFunctionMode):
    """Keeps the calls of loss functions that happen while it is on."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` and keep it if it is a loss."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in KNOWN_LOSSES:
            self.calls.append((func, args, kwargs, result))
        return result


def replay(terms: Sequence[Term], values: Mapping[int, Tensor]) -> list[ReplayedTerm]:
    """Evaluate the terms of an objective again.

    Args:
        terms: The terms as they were recorded.
        values: For a parameter's `id` the tensor that takes its place; it may be dual.

    Returns:
        The terms, in the same order.

    Raises:
        RuntimeError: If an operation cannot be evaluated again; names it.
    """
    results: dict[Call, list[Tensor]] = {}
    known = [term for term in terms if isinstance(term, ObjectiveTerm)]
    inside = {term.origin.call for term in known if term.origin.ordinal is not None}
    within = _layer_sources(terms)
    losses: dict[Call, list[tuple[Any, Any, Any, Any]]] = {}
    layers: dict[LayerSource, Tensor] = {}
    with _replaying():
        for call in in_order(call for term in terms for call in term.calls):
            args, kwargs = (
                tree_map(lambda x: results[x.call][x.leaf] if isinstance(x, Source) else x, tree)
                for tree in (call.args, call.kwargs)
            )
            recorder = CallRecorder() if call in inside else nullcontext()
            with recorder, _named_errors(call), _outputs_kept(within.get(call, ()), layers):
                if call.surroundings is None:
                    result = call.function(*args, **kwargs)
                else:
                    result = _replay_module(call, args, kwargs, values)
            own = recorder.calls if isinstance(recorder, CallRecorder) else []
            losses[call] = own or [(call.function, args, kwargs, result)]
            results[call] = list(tensor_leaves(result))

    def found(source: Source | LayerSource) -> Tensor:
        if isinstance(source, LayerSource):
            return layers[source]
        return results[source.call][source.leaf]

    return [
        _replayed_loss(term, losses[term.origin.call])
        if isinstance(term, ObjectiveTerm)
        else _replayed_scalar(term, found)
        for term in terms
    ]


def _layer_sources(terms: Iterable[Term]) -> dict[Call, list[LayerSource]]:
    found: dict[Call, list[LayerSource]] = {}
    for term in terms:
        for source in term.arrivals if isinstance(term, ScalarTerm) else ():
            if isinstance(source, LayerSource):
                found.setdefault(source.call, []).append(source)
    return found


@contextmanager
def _outputs_kept(
    sources: Iterable[LayerSource], outputs: dict[LayerSource, Tensor]
) -> Iterator[None]:
    """Keep outputs of layers of the module that is called meanwhile."""
    calls: Counter[nn.Module] = Counter()
    wanted = list(sources)

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        for source in wanted:
            if source.module is module and source.ordinal == calls[module]:
                outputs[source] = output
        calls[module] += 1

    modules = dict.fromkeys(source.module for source in wanted)
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _named_errors(call: Call) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        name = getattr(call.function, "__name__", type(call.function).__name__)
        raise RuntimeError(
            f'lr="auto": {name} cannot be evaluated again in forward mode, without gradients '
            f"({error}). Everything between the model's inputs and the loss must have forward-mode "
            "derivatives and must not call torch.autograd itself; else give lr a number."
        ) from error


def coarsest_dtype(terms: Sequence[Term]) -> torch.dtype:
    """Return the dtype of the least precision in which the losses' inputs were computed."""
    calls = in_order(call for term in terms for call in term.calls)
    autocast = [c.surroundings.autocast_dtype for c in calls if c.surroundings is not None]
    dtypes = [*(term.output.dtype for term in terms), *(d for d in autocast if d is not None)]
    dtypes += [g.dtype for term in terms if isinstance(term, ScalarTerm) for g in term.gradients]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _replay_module(call: Call, args: Any, kwargs: Any, values: Mapping[int, Tensor]) -> Any:
    module, surroundings = call.function, call.surroundings
    assert isinstance(module, nn.Module)
    assert surroundings is not None
    copies, own = dict(values), {}
    # Each module once: functional_call does not put back what it replaces under two names.
    for prefix, owner in module.named_modules():
        once: dict[str, Any] = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        for name, p in owner.named_parameters(**once):
            own[name] = copies.setdefault(id(p), p.detach())
        for name, buffer in owner.named_buffers(**once):
            own[name] = copies.setdefault(id(buffer), buffer.clone())
    surroundings.set_random_states()
    return functional_call(module, own, args, kwargs, tie_weights=False)


def _replayed_loss(
    term: ObjectiveTerm, losses: Sequence[tuple[Any, Any, Any, Any]]
) -> ReplayedTerm:
    function, args, kwargs, value = losses[term.origin.ordinal or 0]
    call = recognise_call(function, args, kwargs)
    contribution = (value * term.upstream.to(value.dtype)).sum()
    return ReplayedTerm(term, call.output, [call.output], contribution, call)


def _replayed_scalar(
    term: ScalarTerm, found: Callable[[Source | LayerSource], Tensor]
) -> ReplayedTerm:
    value = found(term.source)
    contribution = (value * term.upstream.to(value.dtype)).sum()
    return ReplayedTerm(term, value, [found(source) for source in term.arrivals], contribution)


class _Constants(TorchFunctionMode):
    """Take what the model computes under `torch.no_grad()` for constants, as backward passes do.

    Forward mode does not see `no_grad`, and would give slopes of another function.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function; detach what it returns, unless that is one of its arguments."""
        result = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            return result
        known = {id(x) for x in tree_flatten((args, kwargs))[0]}
        return tree_map(
            lambda x: x.detach() if isinstance(x, Tensor) and id(x) not in known else x, result
        )


@contextmanager
def _replaying() -> Iterator[None]:
    """Evaluate without a trace, by operations that have forward-mode derivatives."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            for kind in device_types():
                stack.enter_context(torch.autocast(kind, enabled=False))
            # Gradients are on, as in the user's pass, so that a model's own `no_grad` is seen;
            # nothing requires them, so that there is no graph.
            for context in (evaluation(replay), sdpa_kernel(SDPBackend.MATH), _Constants()):
                stack.enter_context(context)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def undisturbed(terms: Iterable[Term]) -> Iterator[None]:
    """Let a closure be called again without a trace, with the random numbers of the first call.

    Args:
        terms: The losses that the first call computed.
    """
    calls = in_order(call for term in terms for call in term.calls)
    modules = [call.function for call in calls if isinstance(call.function, nn.Module)]
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.enter_context(evaluation(module))
        first = next(call.surroundings for call in calls if call.surroundings is not None)
        first.set_random_states()
        yield
