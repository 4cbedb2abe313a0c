"""A model evaluated on batches of data: progress, determinism, and leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Batch = tuple[Any, Any]

# Two runs of the same computation may differ by the order of summation of parallel reductions.
_RELATIVE_TOLERANCE = {torch.float64: 1e-10}
_DEFAULT_TOLERANCE = 1e-4


_evaluating: ContextVar[bool] = ContextVar("kfacopt_evaluating", default=False)


@contextmanager
def evaluation(model_func: Callable[..., Any]) -> Iterator[None]:
    """Run forward passes of kfacopt's own that leave no trace.

    Optimizers take no statistics from them, and a module's buffers (the running statistics of
    batch norm) are put back afterwards.

    Args:
        model_func: What is evaluated; its buffers are kept if it is a module.
    """
    buffers = list(model_func.buffers()) if isinstance(model_func, nn.Module) else []
    kept = [b.detach().clone() for b in buffers]
    token = _evaluating.set(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        _evaluating.reset(token)
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def is_evaluating() -> bool:
    """Tell whether the current forward pass is one of kfacopt's own."""
    return _evaluating.get()


def to_device(x: Any, device: torch.device) -> Any:
    """Move a tensor to a device; leave anything else to the model."""
    return x.to(device) if isinstance(x, Tensor) else x


def batch_size(X: Any) -> int:
    """Return the number of data in a batch of inputs, the length of its first axis."""
    if isinstance(X, Tensor):
        return X.shape[0] if X.ndim else 1
    raise TypeError(f"data: inputs must be tensors, got {type(X).__name__}.")


def iterate(
    data: Iterable[Batch], device: torch.device, progressbar: bool, description: str
) -> Iterator[Batch]:
    """Yield the batches `(X, y)` on a device, with a progress bar if asked for.

    Args:
        data: The batches.
        device: Where tensors are moved.
        progressbar: Whether to show a bar.
        description: What the bar says.
    """
    for X, y in tqdm(data, desc=description, disable=not progressbar):
        yield to_device(X, device), to_device(y, device)


def _differ(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return True
    if not first.is_floating_point():
        return not torch.equal(first, second)
    tolerance = _RELATIVE_TOLERANCE.get(first.dtype, _DEFAULT_TOLERANCE)
    scale = float(first.abs().max()) if first.numel() else 0.0
    return not torch.allclose(first, second, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _fingerprint(x: Any) -> Tensor:
    """Summarise a batch so that a change of values or of their order shows; bounded memory."""
    if not isinstance(x, Tensor):
        return torch.zeros(0)
    flat = x.detach().flatten().to("cpu", torch.float64)
    positions = torch.linspace(1, 2, max(flat.numel(), 1), dtype=torch.float64)[: flat.numel()]
    sums = torch.stack([flat.sum(), (flat * positions).sum(), flat.square().sum()])
    return torch.cat([sums, torch.tensor(list(x.shape), dtype=torch.float64)])


def run_determinism_check(
    data: Iterable[Batch], device: torch.device, evaluate: Callable[[Any], Any]
) -> None:
    """Check that two passes over the data see the same batches and the same predictions.

    The cost is two forward passes over the data.

    Args:
        data: The batches.
        device: Where tensors are moved.
        evaluate: Maps inputs to predictions.

    Raises:
        RuntimeError: If the number of batches, a batch, or a prediction differs; it says which.
    """
    passes = []
    for _ in range(2):
        records = []
        for X, y in iterate(data, device, False, ""):
            with torch.no_grad():
                prediction = evaluate(X)
            records.append((_fingerprint(X), _fingerprint(y), _fingerprint(prediction)))
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


def _compare_passes(
    first: list[tuple[Tensor, Tensor, Tensor]], second: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    way_out = "Pass check_deterministic=False only if you know why this is right."
    changed = [
        i
        for i, (a, b) in enumerate(zip(first, second, strict=True))
        if _differ(a[0], b[0]) or _differ(a[1], b[1])
    ]
    if changed:
        matched = all(any(not _differ(a[0], b[0]) for b in second) for a in first)
        what = "order of the batches changed" if matched else "batches themselves changed"
        raise RuntimeError(
            f"data: not deterministic, the {what} between two passes (first at batch "
            f"{changed[0]}). Switch off shuffling, drop_last and augmentation. {way_out}"
        )
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if _differ(a[2], b[2]):
            raise RuntimeError(
                f"model_func: not deterministic, its predictions for batch {i} differ between two "
                "passes over the same data. Dropout is active, or batch norm's statistics change; "
                f"call model.eval(). {way_out}"
            )
