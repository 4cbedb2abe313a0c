"""The curvature of a loss whose graph is at hand, or that can be called, at its tensors z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfacopt.likelihoods.found import KrylovRows
from kfacopt.likelihoods.graph_products import GraphPiece
from kfacopt.likelihoods.interface import UnsupportedLossError
from kfacopt.likelihoods.parts import CurvaturePart
from kfacopt.likelihoods.registry import registered_call
from kfacopt.likelihoods.structure import KRYLOV_SAMPLES, find_parts


def parts_of_loss(
    loss: Tensor, tensors: Sequence[Tensor], samples: int = KRYLOV_SAMPLES
) -> tuple[list[CurvaturePart], str]:
    """Return the positive part of H = ∂²L/∂z², and why it is not sought, if it is not.

    Args:
        loss: L, a scalar with its graph.
        tensors: z, of which L is a function.
        samples: As for `find_parts`.

    Returns:
        Parts, and `""`; or the empirical Fisher and torch's reason why there is no second
        derivative.

    Raises:
        ValueError: If L does not depend on z.
    """
    values = [z.detach() for z in tensors]
    note = ""
    try:
        piece = GraphPiece(loss, list(tensors))
    except (RuntimeError, NotImplementedError) as error:
        note = no_second_derivative(error)
        piece = GraphPiece(loss, list(tensors), twice=False)
    gradients = [g for g in piece.gradients if g is not None]
    if len(gradients) < len(values):
        raise ValueError("loss: it does not depend on z.")
    if not note:
        try:
            return find_parts(values, gradients, piece.product, samples), ""
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            note = no_second_derivative(error)
    return find_parts(values, gradients, None, samples), note


def exact_part(
    loss_func: Callable[..., Any], z: Tensor, y: Any, factor: float
) -> CurvaturePart | None:
    """Return the curvature of `factor * loss_func(z, y)`, where it is exact.

    That of its likelihood, for a loss that was registered with one; else the positive part of the
    Hessian at z.

    Args:
        loss_func: Maps predictions and targets to a scalar.
        z: The predictions, without a graph.
        y: The targets.
        factor: A factor of the loss.

    Returns:
        The curvature, or `None` where the Hessian has no positive part.

    Raises:
        UnsupportedLossError: If the curvature is no exact one, by name.
        ValueError: If the loss is no scalar, or does not depend on z.
    """
    if not z.numel():
        return None
    call = registered_call(loss_func, z, y)
    if call is not None:
        weights = call.likelihood.curvature_weights(z, call.target, factor)
        return CurvaturePart((0,), None, call.likelihood, z, weights, "registered")
    z = z.detach().requires_grad_()
    (part,), note = parts_of_loss(scalar_loss(loss_func, z, y) * factor, [z])
    if part.kind == "empirical" and not note:
        return None
    if part.empirical or isinstance(part.likelihood, KrylovRows):
        raise UnsupportedLossError(
            f"loss_func: {loss_name(loss_func)} has no exact curvature at predictions of the shape "
            f"{tuple(z.shape)}: {note or part.kind}. Its gradients have an empirical Fisher "
            '(EFLinearOperator, fisher_type="empirical"); kfacopt.register_likelihood says what '
            "else it means."
        )
    return part


def scalar_loss(loss_func: Callable[..., Any], z: Tensor, y: Any) -> Tensor:
    """Return a loss as a scalar, with its graph.

    Raises:
        ValueError: If it is none, or has no graph.
    """
    loss: Tensor = loss_func(z, y)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_func must return a scalar, got the shape {shape}; set its reduction to "
            '"mean" or "sum".'
        )
    if not loss.requires_grad:
        raise ValueError("loss_func: the loss does not depend on the predictions.")
    return loss.sum()


def loss_name(loss_func: Any) -> str:
    """Return a loss's name for messages."""
    return getattr(loss_func, "__name__", type(loss_func).__name__)


def no_curvature(loss_func: Any) -> UnsupportedLossError:
    """Return the error for a loss without curvature at any of the data."""
    return UnsupportedLossError(
        f"loss_func: {loss_name(loss_func)} has no curvature: its Hessian at the predictions is 0, "
        "or has no positive part, for all data. Its gradients have an empirical Fisher "
        '(EFLinearOperator, fisher_type="empirical").'
    )


def uncompiled(loss_func: Any) -> Any:
    """Return the loss that `torch.compile` was given: compiled code is differentiated but once."""
    loss_func = getattr(loss_func, "_orig_mod", loss_func)
    return getattr(loss_func, "_torchdynamo_orig_callable", loss_func)


def no_second_derivative(error: Exception) -> str:
    """Return torch's reason in a line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return f"no second derivative: {lines[0][:80]}"
