"""Gradients times the damped inverses of their blocks; the inverses are made in `state`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.layers import Block
from kfacopt.linalg.kept_products import KeptProduct
from kfacopt.linalg.kronecker import KroneckerEigendecomposition, KroneckerMatrix
from kfacopt.linalg.triangles import Workspace
from kfacopt.optim.settings import Groups
from kfacopt.optim.state.curvature_state import CurvatureState
from kfacopt.optim.steps.update import ByParameter


def gradients_of(groups: Groups) -> dict[Parameter, Tensor]:
    """Return what to descend along: the gradients, with their sign changed to maximise."""
    return {
        p: -p.grad if group["maximize"] else p.grad
        for group in groups
        for p in group["params"]
        if p.grad is not None
    }


def preconditioned(
    curvature: CurvatureState,
    gradients: ByParameter,
    groups: Groups,
    without_inverse: Callable[[Block], None],
) -> dict[Parameter, Tensor]:
    """Return the preconditioned gradients of the parameters in layers.

    Args:
        curvature: Has the inverses.
        gradients: The gradients of all parameters that have one.
        groups: The parameter groups, which have the damping.
        without_inverse: Is told of a block that has gradients, and no inverse yet.

    Returns:
        Directions of the parameters' shapes, for those in a block with an inverse.
    """
    directions: dict[Parameter, Tensor] = {}
    workspace = Workspace()
    damping = {p: group["damping"] for group in groups for p in group["params"]}
    for block in curvature.blocks:
        grads = [gradients.get(p) for p in block.parameters]
        if all(g is None for g in grads):
            continue
        inverse = curvature.inverse(block, damping[block.anchor], workspace)
        if inverse is None:
            without_inverse(block)
            continue
        products = precondition(inverse, block, grads)
        with_grad = zip(block.parameters, products, strict=True)
        directions.update({p: d for p, d in with_grad if p in gradients})
    return directions


def precondition(
    inverse: KroneckerMatrix | KeptProduct, block: Block, grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return the damped inverse times the gradients of a block's parameters.

    It is multiplied in the precision that the inverse is kept in, but at least float32.

    Args:
        inverse: The block's damped inverse.
        block: The block.
        grads: One for each parameter of the block; `None` counts as 0.

    Returns:
        Tensors of the shapes and dtypes of the block's parameters.
    """
    inverse = inverse.widened()
    dtype = inverse.dtype
    filled = [
        torch.zeros_like(p, dtype=dtype) if g is None else g.to(dtype)
        for p, g in zip(block.parameters, grads, strict=True)
    ]
    if isinstance(inverse, KroneckerEigendecomposition):
        pieces = block.from_matrix(inverse.apply(block.to_matrix(filled)))
    else:
        pieces = block.from_columns(inverse.apply_columns(block.to_columns(filled)))
    pairs = zip(pieces, block.parameters, strict=True)
    return [piece.contiguous().to(p.dtype) for piece, p in pairs]  # as fused kernels need it
