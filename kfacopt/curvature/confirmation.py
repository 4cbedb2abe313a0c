"""Which derivatives of a graph can be relied on; they are computed elsewhere.

Torch derives its own operations twice and in both modes. The backward pass of a custom function
(`torch.autograd.Function`, an extension in C++, TorchScript) is whatever its author wrote: its
result may be detached, or treat an intermediate result as a constant. Then a derivative through it
is 0 or wrong, without an error. What is found is compared with what a single backward pass gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

# Products are right if they agree with a backward pass to this part of the dtype's digits.
CONFIRMATION_DIGITS = 0.5

# Central differences are as good as their rounding and their third derivatives allow; below
# float64, steps are so long that they meet kinks.
_DIFFERENCE_DIGITS = {torch.float64: 0.4}
_FEWER_DIFFERENCE_DIGITS = 0.25
# Steps, as parts of the digits: 1/3 balances both errors; a smaller one meets fewer kinks.
_STEPS = (1 / 3, 1 / 2)
# Of this many data, one by one, the second derivatives are compared: at a kink they may differ.
_MAX_ROWS = 3


# Whether derivatives, by name and the signature of their functions, were found to be right.
Verdicts = dict[tuple[str, int], bool]


class Functions:
    """The functions of which a tensor's graph is made.

    Args:
        tensor: The tensor.

    Attributes:
        signature: A number that tells graphs of other functions apart.
        custom: The names of those that are not torch's own.
    """

    def __init__(self, tensor: Tensor) -> None:
        seen: set[Node] = set()
        kinds: list[str] = []
        custom: set[str] = set()
        stack = [tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            kind = type(node).__name__
            if isinstance(node, BackwardCFunction) or kind == "CppFunction":
                custom.add(node.name().removesuffix("Backward"))
                written = getattr(type(node), "_forward_cls", None)
                kind = f"{node.name()} {getattr(written, '__module__', '')} {written}"
            kinds.append(kind)
            stack.extend(child for child, _ in node.next_functions)
        self.signature = hash(tuple(kinds))
        self.custom = sorted(custom)

    def __str__(self) -> str:
        return ", ".join(self.custom) or "an operation of torch"


def random_like(tensors: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return one random vector of length about 1, `[1, *x.shape]` for each tensor."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sum(x.numel() for x in tensors), 1) ** 0.5
    return [(torch.randn(1, *x.shape, generator=generator) / length).to(x) for x in tensors]


def are_adjoint(u: Tensor, Jv: Tensor, JTu: Sequence[Tensor], v: Sequence[Tensor]) -> bool | None:
    """Tell whether ⟨u, J v⟩ = ⟨Jᵀ u, v⟩; `None` if Jᵀ u is not finite, or all is 0.

    Args:
        u: A random vector at the outputs.
        Jv: What is to be confirmed, as `u`.
        JTu: Jᵀ u, by a backward pass.
        v: A random vector, as `JTu`.
    """
    left = _wide(u) * _wide(Jv)
    right = torch.cat([_wide(a) * _wide(b) for a, b in zip(JTu, v, strict=True)])
    error = (left.sum() - right.sum()).abs()
    # Of terms with random signs: the size of their sum, where that is not 0 by chance.
    scale = (left.square().sum() + right.square().sum()).sqrt()
    bound = torch.finfo(v[0].dtype).eps ** CONFIRMATION_DIGITS
    tells = right.isfinite().all() & (scale != 0)
    known, agree = torch.stack([tells, error <= bound * scale]).tolist()
    return bool(agree) if known else None


def agree_with_differences(
    gradient: Callable[[float], Sequence[Tensor]], product: Sequence[Tensor]
) -> bool:
    """Tell whether H v is the derivative of a gradient along v, by central differences.

    Args:
        gradient: Maps t to the gradient at x + t v, with v of about the size of x.
        product: H v, as the gradient.
    """
    dtype = product[0].dtype
    eps = torch.finfo(dtype).eps
    bound = eps ** _DIFFERENCE_DIGITS.get(dtype, _FEWER_DIFFERENCE_DIGITS)
    expected = torch.cat([_wide(x) for x in product])
    for digits in _STEPS:
        step = eps**digits
        plus, minus = (torch.cat([_wide(g) for g in gradient(t)]) for t in (step, -step))
        found = (plus - minus) / (2 * step)
        noise = 4 * eps / step * float(plus.norm())
        scale = max(float(found.norm()), float(expected.norm()))
        if float((found - expected).norm()) <= bound * scale + noise:
            return True
    return False


def single_rows(x: Tensor) -> Iterator[Tensor]:
    """Yield random vectors of the shape of `x`, each for one entry of its first axis alone.

    A kink (of a ReLU, say) is met by few data, whatever their number is.
    """
    if not x.ndim or not x.numel():
        yield random_like([x])[0][0]
        return
    for n in sorted({0, len(x) // 2, len(x) - 1})[:_MAX_ROWS]:
        v = torch.zeros_like(x, requires_grad=False)
        v[n] = random_like([v[n]], seed=n)[0][0] * x[n].numel() ** 0.5
        yield v


def root_mean_square(*tensors: Tensor) -> float:
    """Return the size of tensors' entries; 1 for zeros."""
    entries = torch.cat([_wide(x) for x in tensors])
    size = float(entries.square().mean().sqrt()) if entries.numel() else 0.0
    return size if size > 0 else 1.0


@contextmanager
def moved(leaves: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Iterator[None]:
    """Move tensors within the context, whoever refers to them, by exchanging their memory."""
    before = [p.data for p in leaves]
    try:
        for p, v in zip(leaves, direction, strict=True):
            p.data = p.data + step * v
        yield
    finally:
        for p, data in zip(leaves, before, strict=True):
            p.data = data


def _wide(x: Tensor) -> Tensor:
    """Return entries in float64 (which MPS does not have), as a vector."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64).flatten()


def check_twice_differentiable(
    name: str, value: Tensor, function: Callable[[Tensor], Tensor], x: Tensor, confirmed: Verdicts
) -> None:
    """Raise if second derivatives of a function, through custom functions, are wrong.

    Args:
        name: The argument that it came from.
        value: A scalar with its graph.
        function: Maps x to it.
        x: A tensor on the way.
        confirmed: What is known already.
    """
    if not Functions(value).custom:
        return
    x = x.detach().requires_grad_()
    value = function(x)  # without what comes before x

    def gradient_at(shift: Tensor) -> Tensor:
        at = (x + shift).detach().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]

    check_gradient(name, value, x, [x], gradient_at, confirmed)


def check_has_graph(loss: Tensor) -> None:
    """Raise if a loss is a constant to backward passes."""
    if not loss.requires_grad:
        raise RuntimeError(
            "loss_func: its value has no graph, so that it has no derivatives by the predictions. "
            "Compute it with torch's operations, without torch.no_grad(), detach(), item() or "
            "NumPy."
        )


def check_gradient(
    name: str,
    value: Tensor,
    x: Tensor,
    by: Sequence[Tensor] | Sequence[GradientEdge],
    gradient_at: Callable[[Tensor], Tensor],
    confirmed: Verdicts,
) -> None:
    """Raise if derivatives of a gradient, through custom functions, are wrong.

    Args:
        name: The argument that they came from.
        value: A scalar with its graph.
        x: What it is differentiated by.
        by: Its place in the graph, alone.
        gradient_at: Maps a shift of x to the gradient there.
        confirmed: What is known already.
    """
    functions = Functions(value)
    if not functions.custom:
        return
    key = f"second derivatives of {name}", functions.signature
    if key not in confirmed:
        (gradient,) = torch.autograd.grad(value, by, create_graph=True, materialize_grads=True)
        confirmed[key] = any(
            _is_right(x.detach(), by, gradient, gradient_at, v) for v in single_rows(x.detach())
        )
    if not confirmed[key]:
        raise refusal(name, functions)


def _is_right(
    x: Tensor,
    by: Sequence[Tensor] | Sequence[GradientEdge],
    gradient: Tensor,
    gradient_at: Callable[[Tensor], Tensor],
    v: Tensor,
) -> bool:
    v = v * (root_mean_square(x) / root_mean_square(v[v != 0]))
    product = torch.zeros_like(x)
    if gradient.requires_grad:
        try:
            (product,) = torch.autograd.grad(
                [gradient], by, [v], retain_graph=True, materialize_grads=True
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what once_differentiable leaves behind
            return False
    return agree_with_differences(lambda step: [gradient_at(step * v)], [product])


def refusal(name: str, functions: Functions) -> RuntimeError:
    """Return the error for second derivatives that are not to be had."""
    return RuntimeError(
        f"{name}: the backward pass of {functions} is not differentiable, or not the derivative of "
        "its forward pass, so that second derivatives through it are wrong. Write it with torch's "
        "operations on ctx.saved_tensors that hold the function's inputs or outputs, without "
        "once_differentiable, detach() or NumPy; or use torch's operations in its place."
    )
