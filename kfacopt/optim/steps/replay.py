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
from kfacopt.optim.watch.loss_calls import KNOWN_LOSSES, LossCall, recognise_call
from kfacopt.optim.watch.recorded_calls import (
    Call,
    ObjectiveTerm,
    Source,
    device_types,
    in_order,
    tensor_leaves,
)


@dataclass(frozen=True, eq=False)
class ReplayedTerm:
    """A loss of the objective, evaluated again.

    Attributes:
        call: What it means, with its input z.
        contribution: What it adds to the objective, a scalar.
        upstream: The derivative of the objective by the loss.
    """

    call: LossCall
    contribution: Tensor
    upstream: Tensor


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


def replay(terms: Sequence[ObjectiveTerm], values: Mapping[int, Tensor]) -> list[ReplayedTerm]:
    """Evaluate the losses of an objective again.

    Args:
        terms: The losses as they were recorded.
        values: For a parameter's `id` the tensor that takes its place; it may be dual.

    Returns:
        The losses, in the order of `terms`.

    Raises:
        RuntimeError: If an operation cannot be evaluated again; names it.
    """
    results: dict[Call, list[Tensor]] = {}
    inside = {term.origin.call for term in terms if term.origin.ordinal is not None}
    losses: dict[Call, list[tuple[Any, Any, Any, Any]]] = {}
    with _replaying():
        for call in in_order(term.origin.call for term in terms):
            args, kwargs = (
                tree_map(lambda x: results[x.call][x.leaf] if isinstance(x, Source) else x, tree)
                for tree in (call.args, call.kwargs)
            )
            recorder = CallRecorder() if call in inside else nullcontext()
            with recorder, _named_errors(call):
                if call.surroundings is None:
                    result = call.function(*args, **kwargs)
                else:
                    result = _replay_module(call, args, kwargs, values)
            own = recorder.calls if isinstance(recorder, CallRecorder) else []
            losses[call] = own or [(call.function, args, kwargs, result)]
            results[call] = list(tensor_leaves(result))
    return [_replayed_term(term, losses[term.origin.call]) for term in terms]


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


def coarsest_dtype(terms: Sequence[ObjectiveTerm]) -> torch.dtype:
    """Return the dtype of the least precision in which the losses' inputs were computed."""
    calls = in_order(term.origin.call for term in terms)
    autocast = [c.surroundings.autocast_dtype for c in calls if c.surroundings is not None]
    dtypes = [*(term.output.dtype for term in terms), *(d for d in autocast if d is not None)]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _replay_module(call: Call, args: Any, kwargs: Any, values: Mapping[int, Tensor]) -> Any:
    module, surroundings = call.function, call.surroundings
    assert isinstance(module, nn.Module)
    assert surroundings is not None
    named = module.named_parameters(remove_duplicate=False)
    copies = dict(values)
    own = {name: copies.setdefault(id(p), p.detach()) for name, p in named}
    for name, buffer in module.named_buffers(remove_duplicate=False):
        own[name] = copies.setdefault(id(buffer), buffer.clone())
    surroundings.set_random_states()
    return functional_call(module, own, args, kwargs)


def _replayed_term(
    term: ObjectiveTerm, losses: Sequence[tuple[Any, Any, Any, Any]]
) -> ReplayedTerm:
    function, args, kwargs, value = losses[term.origin.ordinal or 0]
    call = recognise_call(function, args, kwargs)
    contribution = (value * term.upstream.to(value.dtype)).sum()
    return ReplayedTerm(call, contribution, term.upstream)


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
def undisturbed(terms: Iterable[ObjectiveTerm]) -> Iterator[None]:
    """Let a closure be called again without a trace, with the random numbers of the first call.

    Args:
        terms: The losses that the first call computed.
    """
    calls = in_order(term.origin.call for term in terms)
    modules = [call.function for call in calls if isinstance(call.function, nn.Module)]
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.enter_context(evaluation(module))
        first = next(call.surroundings for call in calls if call.surroundings is not None)
        first.set_random_states()
        yield
