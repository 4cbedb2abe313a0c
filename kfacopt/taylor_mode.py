"""Derivatives of a model's outputs by its inputs, forward through its layers; no curvature here.

A `Jet` has the value of a layer at N points and its derivatives as K further positions of one axis.
The model is called once, with a jet in the place of its input; `__torch_function__` meets every
function of torch that its forward pass applies. A linear layer maps all positions by W and adds its
bias to the value alone. With z_i = ∂_i z and L_r = Σ_i C_ri ∂_i², an elementwise h = σ(z) has

    h_i = σ'(z) z_i,    L_r h = σ'(z) L_r z + σ''(z) Σ_i C_ri z_i².

References:
    Dangel, Müller & Zeinhofer (2024), https://arxiv.org/abs/2405.15603, section 3.
    Li et al. (2023), https://arxiv.org/abs/2307.08214, for the forward Laplacian.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.nn import functional as F

from kfacopt.elementwise_derivatives import ELEMENTWISE, name_of


class InputDerivatives(NamedTuple):
    """What `input_derivatives` returns.

    Attributes:
        value: u, `[N, m]`.
        gradient: ∂_i u, `[N, m, d]`.
        second: Δu `[N, m]`, or what `second` asks for, `[N, m]` or `[N, m, R]`; else `None`.
    """

    value: Tensor
    gradient: Tensor
    second: Tensor | None


def input_derivatives(
    model: nn.Module, x: Tensor, second: Literal["laplacian"] | Tensor | None = "laplacian"
) -> InputDerivatives:
    """Return a model's outputs u, their gradients and their Laplacians by the model's inputs.

    The derivatives can be differentiated by parameters, and K-FAC sees their curvature: the model
    is called once, each layer once on `[N, K, d_in]`, the value and the derivatives as K positions.
    The bias of a layer acts, and counts in its factor, at the value alone.

    The model may apply, in any order, linear layers, activations (tanh, sigmoid, SiLU, GELU,
    softplus, ELU, Mish, ReLU, leaky ReLU, sin, cos, exp and those of
    `register_elementwise_derivatives`), sums, differences and products of what depends on the input
    with each other and with anything else, quotients, powers, matrix products, slices of features
    `x[:, i:j]`, `torch.cat` of features and dropout, none of it in place.
    Compiled models run eagerly.

    >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> u, gradient, laplacian = input_derivatives(model, torch.zeros(5, 2))
    >>> u.shape, gradient.shape, laplacian.shape
    (torch.Size([5, 1]), torch.Size([5, 1, 2]), torch.Size([5, 1]))

    Args:
        model: Maps `[N, d]` to `[N, m]`, each row by itself.
        x: The points, `[N, d]`.
        second: `"laplacian"`; weights C of second derivatives, `[d]` or `[R, d]`, for the sums
            Σ_i C_ri ∂_i² u (`torch.eye(d)`: each on its own); `None` for none. K is 1 + d, and 1 or
            R for these.

    Returns:
        u, ∂_i u and the second derivatives.

    Raises:
        ValueError: If x is no matrix of floats, or `second` does not fit it.
        NotImplementedError: If the model applies a function that has no rule.
        TypeError: If what the model returns does not depend on x, or is not one tensor.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be points [N, d] of floats, got {x.dtype} {tuple(x.shape)}.")
    jet = _at_points(x, _weights(second, x))
    with _uncompiled():
        output = model(jet)
    if not isinstance(output, Jet):
        raise TypeError(
            f"model must return one tensor that depends on x, got {type(output).__name__}."
        )
    rows, d = output.rows, x.shape[1]
    gradient, sums = rows[:, 1 : d + 1].mT, rows[:, d + 1 :].mT
    if second is None:
        return InputDerivatives(rows[:, 0], gradient, None)
    listed = isinstance(second, Tensor) and second.ndim == 2
    return InputDerivatives(rows[:, 0], gradient, sums if listed else sums[..., 0])


def _weights(second: Any, x: Tensor) -> Tensor:
    """Return C `[R, d]`."""
    d = x.shape[1]
    if second is None:
        return x.new_zeros(0, d)
    if isinstance(second, str) and second == "laplacian":
        return x.new_ones(1, d)
    if not isinstance(second, Tensor) or second.ndim not in (1, 2) or second.shape[-1] != d:
        found = tuple(second.shape) if isinstance(second, Tensor) else repr(second)
        raise ValueError(
            f"second must be 'laplacian', None, or weights of shape [{d}] or [R, {d}]; got {found}."
        )
    return second.detach().to(x).reshape(-1, d)


def _at_points(x: Tensor, weights: Tensor) -> Jet:
    """Return the jet of x itself: ∂_i x is the i-th unit vector, and all second ones are 0."""
    (N, d), R = x.shape, len(weights)
    unit = torch.eye(d, dtype=x.dtype, device=x.device).expand(N, d, d)
    rows = torch.cat([x.unsqueeze(1), unit, x.new_zeros(N, R, d)], dim=1)
    return Jet(rows, weights, torch.is_grad_enabled())


def _uncompiled() -> AbstractContextManager[None]:
    # Where nothing is compiled, the import would take seconds; in compiled code it is an error.
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    if eval_frame.get_eval_frame_callback():
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _operator(function: Callable[..., Any]) -> Callable[[Jet, Any], Any]:
    return lambda jet, other: jet.__torch_function__(function, (), (jet, other))


@dataclasses.dataclass(frozen=True, eq=False)
class Jet:
    """Features `[N, features]` at N points with their derivatives by d inputs.

    It stands for a tensor `[N, features]` where functions of torch are applied.

    Attributes:
        rows: `[N, 1 + d + R, features]`: the value, its d first derivatives, R sums L_r.
        weights: C, `[R, d]`.
        tracked: Whether gradients were on where it was made.
    """

    rows: Tensor
    weights: Tensor
    tracked: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply a function of torch by its rule."""
        name, options = name_of(func), dict(kwargs or {})
        if "input" in options:
            args = (options.pop("input"), *args)
        jet = next(x for x in _flat((*args, *options.values())) if isinstance(x, Jet))
        if jet.tracked != torch.is_grad_enabled():
            raise NotImplementedError(
                "input_derivatives: the model switches gradients on or off on its way (no_grad, or "
                f"a custom autograd.Function), in which {name} is applied. Leave that out."
            )
        if options.pop("inplace", False) or func.__name__ == f"{name}_" or name in _IN_PLACE:
            raise NotImplementedError(
                f"input_derivatives: {name} in place{_calling_module()}. Set inplace=False, or "
                "write x = x + ... instead of x += ..."
            )
        if name in ELEMENTWISE and args[0] is jet:
            return jet.elementwise(*ELEMENTWISE[name](jet.rows[:, 0], *args[1:], **options))
        result = _RULES[name](*args, **options) if name in _RULES else NotImplemented
        if result is NotImplemented:
            raise NotImplementedError(_no_rule(func, name))
        return result

    def __getattr__(self, name: str) -> Any:
        """Return a method of tensors, or an attribute that a jet has in common with its rows."""
        if name in ("dtype", "device"):
            return getattr(self.rows, name)
        method = None if name.startswith("_") else getattr(Tensor, name, None)
        if not inspect.isroutine(method):
            raise AttributeError(f"input_derivatives: the model asks for {name!r} of its input.")
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that it stands for."""
        return self.rows[:, 0].shape

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return 2

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def constants(self) -> Tensor:
        """What the constant 1 is at each position, `[K]`: 1 at the value, 0 at derivatives."""
        constants = self.rows.new_zeros(self.rows.shape[1])
        constants[0] = 1
        return constants

    def with_rows(self, rows: Tensor) -> Jet:
        """Return other features at the same points."""
        return Jet(rows, self.weights, self.tracked)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value `[N, 1, .]`, the first derivatives and the sums of second ones."""
        d = self.weights.shape[1]
        return self.rows[:, :1], self.rows[:, 1 : d + 1], self.rows[:, d + 1 :]

    def contracted(self, products: Tensor) -> Tensor:
        """Return Σ_i C_ri p_i `[N, R, features]` of p `[N, d, features]`."""
        return (self.weights[:, :, None] * products.unsqueeze(1)).sum(2)

    def elementwise(self, h: Tensor, slope: Tensor, curvature: Tensor) -> Jet:
        """Return the jet of h = σ(z).

        Args:
            h: σ(z), `[N, features]`.
            slope: σ'(z), likewise.
            curvature: σ''(z), likewise.
        """
        _, first, second = self.parts()
        h, slope, curvature = h.unsqueeze(1), slope.unsqueeze(1), curvature.unsqueeze(1)
        second = slope * second + curvature * self.contracted(first.square())
        return self.with_rows(torch.cat([h, slope * first, second], dim=1))

    def __neg__(self) -> Jet:
        return self.with_rows(-self.rows)

    # Operators that Python looks up in the class, as `x + y`.
    __add__ = __radd__ = _operator(torch.add)
    __sub__, __rsub__ = _operator(torch.sub), _operator(torch.rsub)
    __mul__ = __rmul__ = _operator(torch.mul)
    __truediv__, __matmul__ = _operator(torch.div), _operator(torch.matmul)
    __pow__, __getitem__ = _operator(torch.pow), _operator(Tensor.__getitem__)
    __rtruediv__ = _operator(Tensor.__rtruediv__)
    __iadd__, __isub__ = _operator(Tensor.__iadd__), _operator(Tensor.__isub__)
    __imul__, __itruediv__ = _operator(Tensor.__imul__), _operator(Tensor.__itruediv__)


def _flat(args: Sequence[Any]) -> list[Any]:
    return [x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,))]


def _calling_module() -> str:
    """Say in which module a function is applied, if in one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return f" in {type(module).__name__}"
        frame = frame.f_back
    return ""


def _no_rule(function: Callable[..., Any], name: str) -> str:
    """Say that a function has no rule, where it is, and the way out."""
    how = " with these arguments" if name in _RULES or name in ELEMENTWISE else ""
    place = getattr(function, "__module__", None) or "torch"
    return (
        f"input_derivatives: no rule for {name}{how}{_calling_module()}. Known are linear layers, "
        "sums, products, quotients, matrix products, slices x[:, i:j] and torch.cat of features, "
        f"dropout, and {', '.join(sorted(ELEMENTWISE))}. If it acts on each entry by itself, say "
        f"kfacopt.register_elementwise_derivatives({place}.{name}, rule)."
    )


# Rules of arithmetic; NotImplemented where one does not apply -----------------------------------


def _placed(value: Any) -> Any:
    """Return what does not depend on the input so that it meets all positions of a jet."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    return value.unsqueeze(-2) if value.ndim == 2 else NotImplemented


def _linear(jet: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(jet, Jet) or isinstance(weight, Jet) or isinstance(bias, Jet):
        return NotImplemented
    out = jet.with_rows(F.linear(jet.rows, weight))
    return out if bias is None else _add(out, bias.to(out.rows.dtype))


def _add(left: Any, right: Any) -> Any:
    """Add jets; what does not depend on the input counts at the value alone."""
    if isinstance(left, Jet) and isinstance(right, Jet):
        return left.with_rows(left.rows + right.rows)
    jet, constant = (left, _placed(right)) if isinstance(left, Jet) else (right, _placed(left))
    if constant is NotImplemented:
        return NotImplemented
    return jet.with_rows(jet.rows + jet.constants.unsqueeze(-1) * constant)


def _subtract(left: Any, right: Any) -> Any:
    return _add(left, -right)


def _multiply(left: Any, right: Any) -> Any:
    """L_r (f g) = f L_r g + g L_r f + 2 Σ_i C_ri f_i g_i."""
    if isinstance(left, Jet) and isinstance(right, Jet):
        (f, f_i, f_r), (g, g_i, g_r) = left.parts(), right.parts()
        second = f * g_r + g * f_r + 2 * left.contracted(f_i * g_i)
        return left.with_rows(torch.cat([f * g, f * g_i + g * f_i, second], dim=1))
    jet, factor = (left, _placed(right)) if isinstance(left, Jet) else (right, _placed(left))
    return NotImplemented if factor is NotImplemented else jet.with_rows(jet.rows * factor)


def _divide(left: Any, right: Any) -> Any:
    return _multiply(left, right**-1 if isinstance(right, Jet) else 1 / right)


def _matmul(left: Any, right: Any) -> Any:
    plain = isinstance(left, Jet) and isinstance(right, Tensor) and right.ndim == 2
    return left.with_rows(left.rows @ right) if plain else NotImplemented


def _take(jet: Jet, index: Any) -> Any:
    """Take features: `x[:, i:j]`, `x[..., [i, j]]`."""
    if not (isinstance(index, tuple) and len(index) == 2) or isinstance(index[1], int):
        return NotImplemented
    all_points = index[0] is Ellipsis or index[0] == slice(None)
    return jet.with_rows(jet.rows[..., index[1]]) if all_points else NotImplemented


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    if dim not in (-1, 1):
        return NotImplemented
    jet = next(x for x in tensors if isinstance(x, Jet))
    zero = jet.with_rows(torch.zeros_like(jet.rows[..., :1]))
    rows = [(x if isinstance(x, Jet) else _add(zero, x)).rows for x in tensors]
    return jet.with_rows(torch.cat(rows, dim=-1))


def _dropout(jet: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    """Drop a feature's value and derivatives together."""
    if not training:
        return jet
    return jet.with_rows(jet.rows * F.dropout(torch.ones_like(jet.rows[:, :1]), p))


def _flatten(jet: Jet, start_dim: int = 0, end_dim: int = -1) -> Any:
    return jet if start_dim in (1, -1) and end_dim in (1, -1) else NotImplemented


_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "idiv", "ipow"}
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "radd"), _add),
    **dict.fromkeys(("sub", "subtract"), _subtract),
    **dict.fromkeys(("mul", "multiply", "rmul"), _multiply),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv"), _divide),
    **dict.fromkeys(("matmul", "mm"), _matmul),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "rsub": lambda left, right: _add(-left, right),
    "rdiv": lambda left, right: _divide(right, left),
    "neg": Jet.__neg__,
    "linear": _linear,
    "getitem": _take,
    "dropout": _dropout,
    "flatten": _flatten,
}
