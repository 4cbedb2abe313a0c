"""A model evaluated on batches, deterministic and without a trace; no derivatives but gradients."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from kfacopt.argument_checks import as_integer
from kfacopt.linalg.snapshots import same_entries, strided_parts

Batch = tuple[Any, Any]

# Two runs of the same computation may differ by the order of summation of parallel reductions.
_RELATIVE_TOLERANCE: dict[torch.dtype | None, float] = {torch.float64: 1e-10}
_DEFAULT_TOLERANCE = 1e-4

_WAY_OUT = "Pass check_deterministic=False only if you know why this is right."


_evaluating: ContextVar[bool] = ContextVar("kfacopt_evaluating", default=False)


@contextmanager
def evaluation(*functions: Callable[..., Any]) -> Iterator[None]:
    """Run forward passes of kfacopt's own that leave no trace.

    Optimizers take no statistics from them. A module's buffers (the running statistics of batch
    norm), its attributes (what a layer remembers of its last call, counters), and torch's global
    generators, of which dropout and a `DataLoader` draw, are put back afterwards.
    """
    token = _evaluating.set(True)
    try:
        with (
            attributes_put_back(*functions),
            torch.random.fork_rng(random_devices()),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        _evaluating.reset(token)


@contextmanager
def attributes_put_back(*functions: Callable[..., Any]) -> Iterator[None]:
    """Put what modules have besides parameters back at the end: buffers, states, counters.

    That is: tensors that changed, names that hold something else than before, new names of tensors
    and plain values, and the entries of lists, dicts, sets and deques among the attributes.

    Args:
        functions: What is evaluated in the context; nothing is done for what is not a module.
    """
    owners = [f for f in functions if isinstance(f, nn.Module)]
    modules = list({id(m): m for owner in owners for m in owner.modules()}.values())
    # Of a module, both: what was assigned anew, as by `self.mean = 0.9 * self.mean + ...`.
    places: list[dict[str, Any]] = [d for m in modules for d in (m._buffers, vars(m))]
    before = [dict(place) for place in places]
    kept = [x for entries in before for name, x in entries.items() if name[0] != "_"]
    containers = [(x, copy.copy(x)) for x in kept if type(x) in (list, dict, set, deque)]
    tensors = {id(x): x for entries in before for x in entries.values() if isinstance(x, Tensor)}
    values = {key: x.detach().clone() for key, x in tensors.items()}
    try:
        yield
    finally:
        for place, entries in zip(places, before, strict=True):
            _put_back(place, entries)
        for container, content in containers:
            if not _same_content(container, content):
                container.clear()
                (container.extend if hasattr(container, "extend") else container.update)(content)
        for key, tensor in tensors.items():
            if not same_entries(tensor, values[key]):
                # Through .data: a graph that is kept over products saved the buffer, and would
                # take a changed version counter for a changed value.
                tensor.data.copy_(values[key])


def _put_back(place: dict[str, Any], entries: dict[str, Any]) -> None:
    """Give names that hold something else than before what they held; drop new plain values."""
    for name, value in list(place.items()):
        if name in entries:
            if value is not entries[name]:
                place[name] = entries[name]
        elif value is None or isinstance(value, Tensor | int | float | str | tuple):
            del place[name]


def _same_content(one: Collection[Any], other: Collection[Any]) -> bool:
    """Tell whether containers of one kind hold the same objects."""
    if len(one) != len(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return all(k in one and one[k] is value for k, value in other.items())
    if isinstance(one, set):
        return one == other
    return all(x is y for x, y in zip(one, other, strict=True))


def random_devices() -> list[int]:
    """Return the CUDA devices whose global generator a forward pass may draw from."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def random_state() -> list[Tensor]:
    """Return the states of the global generators that a forward pass may draw from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in random_devices())]


@contextmanager
def same_random_numbers(states: list[Tensor]) -> Iterator[None]:
    """Draw again what was drawn from these states of the global generators on."""
    with torch.random.fork_rng(random_devices()):
        torch.set_rng_state(states[0])
        for state, device in zip(states[1:], random_devices(), strict=True):
            torch.cuda.set_rng_state(state, device)
        yield


def is_evaluating() -> bool:
    """Tell whether the current forward pass is one of kfacopt's own."""
    return _evaluating.get()


def tensors_in(x: Any) -> list[Tensor]:
    """Return the tensors in a tensor, mapping or sequence, or among an object's attributes."""
    found: list[Tensor] = []
    seen, waiting = set[int](), [x]
    while waiting:
        x = waiting.pop()
        if isinstance(x, Tensor):
            found.append(x)
        elif id(x) not in seen and not isinstance(x, str | bytes | type | nn.Module):
            seen.add(id(x))
            if isinstance(x, Mapping):
                waiting += x.values()
            elif isinstance(x, list | tuple | set):
                waiting += x
            else:
                waiting += getattr(x, "__dict__", {}).values()
    return found


def to_device(x: Any, device: torch.device) -> Any:
    """Move tensors to a device, also in mappings, sequences and what has a method `to`."""
    if isinstance(x, Tensor):
        return x.to(device)
    if all(t.device == device for t in tensors_in(x)):
        return x
    if type(x) is dict:
        return {key: to_device(value, device) for key, value in x.items()}
    if isinstance(x, list | tuple):
        moved = [to_device(value, device) for value in x]
        return type(x)(*moved) if hasattr(x, "_fields") else type(x)(moved)
    # A copy, as the batches of Hugging Face and graphs move themselves.
    return copy.copy(x).to(device) if hasattr(x, "to") else x


def batch_size(
    X: Any, output: Tensor | None = None, batch_size_fn: Callable[[Any], int] | None = None
) -> int:
    """Return the number of data in a batch of inputs.

    That is the length of a tensor's first axis; in a mapping, sequence or object that of all of its
    tensors'. The predictions must agree: they have as many rows, or a multiple.

    Args:
        X: The inputs.
        output: The predictions.
        batch_size_fn: Tells the number of data, in the place of all this.

    Raises:
        TypeError: If the inputs do not tell it.
        ValueError: If the predictions contradict.
    """
    if batch_size_fn is not None:
        size: Any = batch_size_fn(X)
        size = size.item() if isinstance(size, Tensor) and size.numel() == 1 else size
        return as_integer("batch_size_fn(X)", size, 0)
    rows = None if output is None or not output.ndim else len(output)
    if isinstance(X, Tensor):
        size = X.shape[0] if X.ndim else 1
        if rows and size and rows % size:
            raise ValueError(
                f"model_func: its {rows} rows of predictions are not a multiple of the {size} data "
                "along X's first axis. Return equally many for each, or give batch_size_fn."
            )
        return int(size)
    if isinstance(X, PackedSequence):
        return int(X.batch_sizes[0])
    sizes = sorted({len(t) for t in tensors_in(X) if t.ndim})
    if len(sizes) == 1 and (rows is None or (rows % sizes[0] == 0 if sizes[0] else not rows)):
        return sizes[0]
    raise TypeError(
        f"data: inputs of type {type(X).__name__} do not tell the number of data in the batch: the "
        f"first axes of their tensors are {sizes} long, the predictions have {rows} rows. Give "
        "batch_size_fn, a function from X to that number."
    )


def some(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches; raise if there are none."""
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise ValueError(
            "data: there are no batches. A generator can be read once only; give a list or a "
            "DataLoader."
        )


def check_terms(normalizer: Tensor | float) -> None:
    """Raise if a mean over all data would be one over nothing."""
    if normalizer == 0:
        raise ValueError(
            "data: the loss is a mean over no terms; all batches are empty, or all targets ignored."
        )


def is_empty(X: Any) -> bool:
    """Tell whether a batch of inputs has an axis of data, and none along it."""
    return {len(t) for t in tensors_in(X) if t.ndim} == {0}


def sum_gradients(
    params: Sequence[Tensor], terms: Iterable[tuple[Tensor, Tensor | float]], mean: bool
) -> tuple[list[Tensor], Tensor]:
    """Return the gradient of a sum or mean over batches, and the sum or mean.

    Args:
        params: By what it is differentiated.
        terms: For each batch a scalar, its summed loss with its graph, and what the mean divides
            by.
        mean: Whether it is the mean.

    Returns:
        One tensor `[*p.shape]` for each parameter, and a scalar.
    """
    gradient, total = [torch.zeros_like(p) for p in params], params[0].new_zeros(())
    normalizer: Tensor | float = 0.0
    for loss, count in terms:
        normalizer = normalizer + count
        total = total + loss.detach()
        if loss.requires_grad:
            own = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            for g, new in zip(gradient, own, strict=True):
                g += new
    if not mean:
        return gradient, total
    check_terms(normalizer)
    return [g / normalizer for g in gradient], total / normalizer


def show_progress(data: Iterable[Batch], progressbar: bool, description: str) -> Iterator[Batch]:
    """Yield the batches as they are, with a progress bar if asked for."""
    for batch in tqdm(data, desc=description, disable=not progressbar):
        # Neither a tensor, whose rows would be taken for X and y, nor one batch for a data set.
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            entries = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise ValueError(
                f"data: each batch must be a pair (X, y), got a {type(batch).__name__}{entries}. "
                "Give one batch as [(X, y)]."
            )
        yield batch[0], batch[1]


def iterate(
    data: Iterable[Batch], device: torch.device, progressbar: bool, description: str
) -> Iterator[Batch]:
    """Yield the batches `(X, y)` on a device, with a progress bar if asked for."""
    for X, y in show_progress(data, progressbar, description):
        yield to_device(X, device), to_device(y, device)


def _differ(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Tell whether summaries differ by more than a part of the largest entry."""
    if first.shape != second.shape:
        return True
    scale = float(first.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if first.numel() else 0.0
    return not torch.allclose(first, second, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


class _Record(NamedTuple):
    """What one pass saw of a batch."""

    X: Tensor
    y: Tensor
    prediction: Tensor
    dtype: torch.dtype | None


def _fingerprint(x: Any) -> Tensor:
    """Summarise tensors so that a change of values or of their order shows; bounded memory."""
    if not isinstance(x, Tensor):
        return torch.cat([torch.zeros(0), *(_fingerprint(t) for t in tensors_in(x))])
    parts = [p.detach().flatten() for p in strided_parts(x)]
    flat = parts[0] if len(parts) == 1 else torch.cat([torch.zeros(0), *parts])
    # The devices that lack float64 (MPS) are left for the CPU.
    flat = flat.to("cpu" if flat.device.type == "mps" else flat.device, torch.float64)
    count = flat.numel()
    positions = torch.linspace(1, 2, max(count, 1), dtype=flat.dtype, device=flat.device)[:count]
    sums = torch.stack([flat.sum(), flat.dot(positions), flat.square().sum()]).cpu()
    return torch.cat([sums, torch.tensor(list(x.shape), dtype=torch.float64)])


def _check_drop_last(data: Iterable[Batch]) -> None:
    batches = data.batch_sampler if isinstance(data, DataLoader) else None
    if not isinstance(batches, BatchSampler) or not batches.drop_last:
        return
    sampler = batches.sampler
    size = len(sampler) if isinstance(sampler, Sized) else 0
    dropped = size % batches.batch_size
    if dropped:
        raise RuntimeError(
            f"data: drop_last=True leaves out {dropped} of {size} data. Use drop_last=False. "
            f"{_WAY_OUT}"
        )


def run_determinism_check(
    data: Iterable[Batch], device: torch.device, evaluate: Callable[[Any], Any]
) -> list[tuple[int, ...]]:
    """Check that two passes over the data see the same batches and the same predictions.

    The cost is two forward passes over the data: less than any product. Each pass keeps a few
    numbers for each batch.

    Returns:
        The shapes of the predictions, for each batch.

    Raises:
        RuntimeError: If the number of batches, a batch, or a prediction differs; it says which.
            Also if a `DataLoader` leaves out data by `drop_last`.
    """
    _check_drop_last(data)
    shapes: list[tuple[int, ...]] = []
    passes: list[list[_Record]] = []
    for _ in range(2):
        shapes, records = [], []
        for X, y in iterate(data, device, False, ""):
            # Taken first, for a model that changes its input in place.
            seen = _fingerprint(X), _fingerprint(y)
            # With a graph, for models that differentiate by their input.
            prediction = evaluate(X)
            dtype = prediction.dtype if isinstance(prediction, Tensor) else None
            records.append(_Record(*seen, _fingerprint(prediction), dtype))
            shapes.append(tuple(prediction.shape) if isinstance(prediction, Tensor) else ())
        passes.append(records)
    first, second = passes
    if len(first) != len(second):
        raise RuntimeError(
            f"data: not deterministic, a first pass gave {len(first)} batches and a second "
            f"{len(second)}. A generator can be read once only; give a list or a DataLoader."
        )
    if not first:
        raise RuntimeError("data: there are no batches.")
    _compare_passes(first, second)
    return shapes


def _same_data(a: _Record, b: _Record) -> bool:
    # Exactly: nothing is computed with data, and small entries may stand beside large ones.
    return not _differ(a.X, b.X, 0.0) and not _differ(a.y, b.y, 0.0)


def _compare_passes(first: list[_Record], second: list[_Record]) -> None:
    pairs = list(zip(first, second, strict=True))
    changed = [i for i, (a, b) in enumerate(pairs) if not _same_data(a, b)]
    if changed:
        matched = all(any(_same_data(a, b) for b in second) for a in first)
        what = "order of the batches changed" if matched else "batches themselves changed"
        raise RuntimeError(
            f"data: not deterministic, the {what} between two passes (first at batch "
            f"{changed[0]}). Switch off shuffling, drop_last and augmentation. {_WAY_OUT}"
        )
    for i, (a, b) in enumerate(pairs):
        tolerance = _RELATIVE_TOLERANCE.get(a.dtype, _DEFAULT_TOLERANCE)
        if a.dtype != b.dtype or _differ(a.prediction, b.prediction, tolerance):
            raise RuntimeError(
                f"model_func: not deterministic, its predictions for batch {i} differ between two "
                "passes over the same data. Dropout is active, or batch norm's statistics change; "
                f"call model.eval(). {_WAY_OUT}"
            )
