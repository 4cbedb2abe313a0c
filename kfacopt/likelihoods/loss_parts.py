"""The curvature of a loss whose graph is at hand, at the tensors that it was computed from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.likelihoods.graph_products import GraphPiece
from kfacopt.likelihoods.parts import CurvaturePart
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
        raise ValueError("loss_func: the loss does not depend on the predictions.")
    if not note:
        try:
            return find_parts(values, gradients, piece.product, samples), ""
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            note = no_second_derivative(error)
    return find_parts(values, gradients, None, samples), note


def no_second_derivative(error: Exception) -> str:
    """Return torch's reason in a line."""
    return f"no second derivative: {str(error).splitlines()[0][:80]}"
