"""What the phases of a K-FAC step must cost: operation counts, and the bare calls of torch.

For a layer z = W a + b with R = N S rows (R = N for reduce), d_in inputs (one more with a bias)
and d_out outputs, in floating-point operations:

    factors          R d_in² + R d_out²        symmetric products, half of a general one; of d_in²,
                                               for expand, the share of distinct patch correlations
                     + 2 N S d_in d_out        would-be backward pass to the layer's input;
                                               none for a layer whose input needs no gradient
    inverses         d_in³ + d_out³            Cholesky d³/3, inverse from it 2 d³/3
    preconditioning  2 d_in d_out (d_in + d_out)

    EKFAC: factors   + 2 N S (d_in² + d_out²) + 2 N S d_in d_out   rotated rows, single gradients
           bases     14/3 (d_in³ + d_out³)     one product (2 d³) and QR with Q (8/3 d³)
           preconditioning: twice the above    into the eigenbasis and back

The time that this takes at the machine's rate of large square matrix products is the floor. Beside
it stand the same operations as one call of torch per layer (`bare_calls`): what small matrices,
general instead of symmetric products, and LAPACK make of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

GEMM_SIDE = 1024
PHASES = ("factors", "inverses", "preconditioning")


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one use of a linear or convolution layer.

    Attributes:
        data: N.
        positions: S.
        d_in: Side of A, the constant of a bias included.
        d_out: Side of G.
        needs_input_gradient: Whether the backward pass goes on to its input.
        distinct: The share of distinct blocks of A. Where a kernel of k × k taps moves by one
            pixel, the correlation of two taps depends on their distance but for borders:
            (2k − 1)² blocks of k⁴.
    """

    data: int
    positions: int
    d_in: int
    d_out: int
    needs_input_gradient: bool
    distinct: float = 1.0

    def rows(self, reduce: bool) -> int:
        """Return the number of rows that the factors sum over."""
        return self.data * (1 if reduce else self.positions)


def layer_shapes(model: nn.Module, X: Tensor) -> list[LayerShape]:
    """Return the sizes of a model's layers, seen in one forward pass.

    Args:
        model: The model.
        X: Its input.
    """
    shapes: list[LayerShape] = []

    def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        weight = module._parameters["weight"]
        assert weight is not None
        d_in = weight[0].numel() + int(module._parameters["bias"] is not None)
        positions = output.numel() // (output.shape[0] * weight.shape[0])
        sizes = (output.shape[0], positions, d_in, weight.shape[0])
        distinct = 1.0
        if isinstance(module, nn.Conv2d) and set(module.stride) == {1}:
            distinct = math.prod((2 * k - 1) / k**2 for k in module.kernel_size)
        shapes.append(LayerShape(*sizes, args[0].requires_grad, distinct))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [m.register_forward_hook(record) for m in layers]
    model(X)
    for handle in handles:
        handle.remove()
    return shapes


def operations(shape: LayerShape, reduce: bool, ekfac: bool) -> dict[str, float]:
    """Return the floating-point operations of each phase.

    Args:
        shape: The layer.
        reduce: Whether positions are averaged.
        ekfac: Whether the eigenbases and second moments of EKFAC are kept.
    """
    rows, d_in, d_out = shape.rows(reduce), shape.d_in, shape.d_out
    squares, cubes = d_in**2 + d_out**2, d_in**3 + d_out**3
    factors = rows * ((1.0 if reduce else shape.distinct) * d_in**2 + d_out**2)
    if shape.needs_input_gradient:
        factors += 2 * shape.data * shape.positions * d_in * d_out
    if ekfac:
        factors += 2 * shape.data * shape.positions * (squares + d_in * d_out)
    return {
        "factors": float(factors),
        "inverses": 14 / 3 * cubes if ekfac else float(cubes),
        "preconditioning": float((4 if ekfac else 2) * d_in * d_out * (d_in + d_out)),
    }


def total_operations(shapes: list[LayerShape], reduce: bool, ekfac: bool) -> dict[str, float]:
    """Return the operations of each phase over all layers."""
    counts = [operations(shape, reduce, ekfac) for shape in shapes]
    return {phase: sum(count[phase] for count in counts) for phase in PHASES}


def square_product(device: str) -> Callable[[], Tensor]:
    """Return a call of `2 GEMM_SIDE³` operations, for the machine's rate."""
    A, B = torch.randn(2, GEMM_SIDE, GEMM_SIDE, device=device)
    return partial(torch.mm, A, B)


def _inverse(A: Tensor) -> None:
    torch.cholesky_inverse(torch.linalg.cholesky_ex(A).L)


def _symmetric(rows: Tensor) -> None:
    torch.mm(rows.mT, rows)


def bare_calls(
    shapes: list[LayerShape], reduce: bool, device: str
) -> dict[str, Callable[[], None]]:
    """Return the phases of K-FAC as bare calls on random matrices of the layers' sizes.

    Args:
        shapes: The layers.
        reduce: Whether positions are averaged.
        device: Where to run.
    """
    make = partial(torch.randn, device=device)
    factor_inputs, inverse_inputs, gradients = [], [], []
    for shape in shapes:
        rows, all_rows = shape.rows(reduce), shape.data * shape.positions
        a, g = make(rows, shape.d_in), make(rows, shape.d_out)
        whole = (make(all_rows, shape.d_out), make(shape.d_out, shape.d_in))
        factor_inputs.append((a, g, whole if shape.needs_input_gradient else None))
        sides = [torch.eye(side, device=device) for side in (shape.d_in, shape.d_out)]
        inverse_inputs += sides
        gradients.append((sides[1], make(shape.d_out, shape.d_in), sides[0]))

    def factors() -> None:
        for a, g, backward in factor_inputs:
            _symmetric(a)
            _symmetric(g)
            if backward is not None:
                torch.mm(*backward)

    def inverses() -> None:
        for A in inverse_inputs:
            _inverse(A)

    def preconditioning() -> None:
        for G, X, A in gradients:
            torch.linalg.multi_dot((G, X, A))

    return {"factors": factors, "inverses": inverses, "preconditioning": preconditioning}
