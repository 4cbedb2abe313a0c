"""AdamW for parameters without curvature; those with a direction are moved by `clipped_step`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.adamw import adamw

from kfacopt.kfac.layers import RECURRENT
from kfacopt.optim.settings import Groups
from kfacopt.optim.state.initial import initialise_moments
from kfacopt.optim.state.running_averages import States
from kfacopt.optim.steps.update import can_be_fused, decay_in_place, decay_of

BETAS = (0.9, 0.999)
EPS = 1e-8
MATRIX_LR = 1e-3  # of tensors that do not get the rate of vectors, unless a rate is given


def at_rate_of_vectors(modules: Iterable[nn.Module]) -> set[int]:
    """Return the `id`s of tensors that AdamW trains at the rate of vectors, whatever their shape.

    Those of embeddings and recurrent modules, parametrised ones included: LSTMs of 64 and of 256
    learnt best at 0.03, and much worse at 1e-3 (docs/layers.md).
    """
    kinds = (nn.Embedding, nn.EmbeddingBag, *RECURRENT)
    return {id(p) for m in modules if isinstance(m, kinds) for p in m.parameters()}


def rate_of(
    p: Parameter, group: Mapping[str, Any], vectors: Container[int], vector_lr: float
) -> float:
    """Return the rate at which AdamW trains a parameter, before a schedule scales it.

    Args:
        p: The parameter.
        group: Its group. Where that has no `fallback_lr`, the rate follows from p's kind.
        vectors: What `at_rate_of_vectors` returns.
        vector_lr: The rate of these and of vectors.
    """
    given: float | None = group["fallback_lr"]
    if given is not None:
        return given
    return vector_lr if p.ndim < 2 or id(p) in vectors else MATRIX_LR


def adamw_step(
    params: Sequence[Parameter], states: States, group: dict[str, Any], lr: float, decay: float
) -> None:
    """Update parameters by torch's AdamW, with a rate that is scaled as the group's `lr` was.

    They decay as those with curvature do, whatever the rate; not at all where the rate is 0.

    Args:
        params: The parameters.
        states: The optimizer's state by parameter.
        group: Their group.
        lr: AdamW's rate, at the group's initial `lr`.
        decay: The share of the parameters that weight decay takes.
    """
    own: list[Tensor] = list(params)
    for p in params:
        initialise_moments(states[p], p)
    grads = [p.grad for p in own if p.grad is not None]
    averages, squares = [[states[p][key] for p in own] for key in ("exp_avg", "exp_avg_sq")]
    fused = group["foreach"] is None and can_be_fused(own, grads, averages, squares)
    ratio = group["lr"] / group["base_lr"] if group["base_lr"] else float(group["lr"] > 0)
    steps: list[Tensor] = [states[p]["step"] for p in own]
    tensors = (own, grads, averages, squares, list[Tensor](), steps)
    if lr * ratio:
        decay_in_place(own, decay, group["foreach"])
    adamw(
        *tensors,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=lr * ratio,
        eps=EPS,
        weight_decay=0.0,
        fused=True if fused else None,
        **{name: group[name] for name in ("foreach", "maximize")},
    )


def fallback_step(
    states: States,
    groups: Groups,
    covered: Container[Parameter],
    vectors: set[int],
    vector_lr: float,
    size: float = 1.0,
) -> int:
    """Update all parameters with a gradient that have no direction.

    Their rates are those of `rate_of`. Weight decay is multiplied with `size`, that of the step
    along directions.

    Returns:
        How many parameters that were.
    """
    count = 0
    for group in groups:
        by_lr: dict[float, list[Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None and p not in covered:
                by_lr.setdefault(rate_of(p, group, vectors, vector_lr), []).append(p)
        for lr, own in by_lr.items():
            adamw_step(own, states, group, lr, size * decay_of(group))
            count += len(own)
    return count
