"""Arrays, tensors and lists of tensors, to the kernel of an operator and back; no arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kfacopt.linalg.tensor_lists import Shapes, split_rows, stack_rows

if TYPE_CHECKING:
    from kfacopt.linalg.operator import LinearOperator

Kernel = Callable[[Tensor], Tensor]


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """Return NumPy's counterpart of a torch dtype (float32 for bfloat16, which NumPy lacks)."""
    if dtype == torch.bfloat16:
        return np.dtype(np.float32)
    return torch.empty(0, dtype=dtype).numpy().dtype


def multiply_array(A: LinearOperator, kernel: Kernel, X: np.ndarray) -> np.ndarray:
    """Apply a kernel of A to an array `[D, K]`."""
    if X.dtype.kind not in "biufc":
        raise TypeError(f"x: an array of numbers is needed, got dtype {X.dtype}.")
    if X.dtype.kind == "c":
        columns = multiply_array(A, kernel, np.concatenate([X.real, X.imag], axis=1))
        real, imaginary = np.split(columns, 2, axis=1)
        return real + 1j * imaginary
    dtype = np.result_type(X.dtype, A.dtype) if X.dtype.kind == "f" else A.dtype
    if X.dtype.kind != "f" or X.dtype.itemsize > 8:
        X = X.astype(np.float64)
    X = np.ascontiguousarray(X, X.dtype.newbyteorder("="))
    with torch.inference_mode(False):  # derivatives inside the kernel need autograd
        tensor = torch.from_numpy(X if X.flags.writeable else X.copy())
        result = kernel(tensor.to(A.device, A.torch_dtype))
    if result.dtype == torch.bfloat16:
        result = result.float()
    return result.cpu().numpy().astype(dtype, copy=False)


def multiply_tensor(A: LinearOperator, kernel: Kernel, x: Tensor, rows: int) -> Tensor:
    """Apply a kernel of A to a tensor `[rows]` or `[rows, K]`."""
    if x.ndim not in (1, 2) or x.shape[0] != rows:
        raise ValueError(
            f"x must have the shape [{rows}] or [{rows}, K] for this {type(A).__name__} "
            f"of shape {A.shape}; got {tuple(x.shape)}."
        )
    if x.device != A.device:
        raise ValueError(f"x is on {x.device}, the operator on {A.device}; move one with .to(...).")
    matrix = x.detach().unsqueeze(1) if x.ndim == 1 else x.detach()
    if x.is_complex():
        both = torch.cat([matrix.real, matrix.imag], dim=1)
        result = torch.complex(*multiply_tensor(A, kernel, both, rows).chunk(2, dim=1))
        return result[:, 0] if x.ndim == 1 else result
    dtype = torch.promote_types(x.dtype, A.torch_dtype)
    with torch.inference_mode(False):  # derivatives inside the kernel need autograd
        matrix = matrix.clone() if matrix.is_inference() else matrix
        # The imaginary part of a conjugate view is lazily negated, unknown to NumPy.
        result = kernel(matrix.resolve_neg().to(A.torch_dtype)).to(dtype)
    return result[:, 0] if x.ndim == 1 else result


def multiply_list(
    A: LinearOperator, kernel: Kernel, tensors: Sequence[Tensor], shapes: Sequence[Shapes | None]
) -> list[Tensor]:
    """Apply a kernel of A to parameter-shaped tensors; it acts between two lists of shapes."""
    in_shapes, out_shapes = shapes
    if in_shapes is None or out_shapes is None:
        raise TypeError(
            f"x: this {type(A).__name__} does not act between lists of parameter tensors; "
            "give one tensor."
        )
    matrix, trailing = stack_rows(tensors, in_shapes)
    pieces = split_rows(multiply_tensor(A, kernel, matrix, len(matrix)), out_shapes)
    return pieces if trailing else [p[..., 0] for p in pieces]
