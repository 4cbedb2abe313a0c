"""First and second derivatives of functions that act on each entry; `taylor_mode` applies them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Derivatives = tuple[Tensor, Tensor, Tensor]  # σ(z), σ'(z) and σ''(z), of the shape of z
Rule = Callable[..., Derivatives]


def register_elementwise_derivatives(function: Callable[..., Any], rule: Rule) -> None:
    """Teach `input_derivatives` a function of torch that acts on each entry by itself.

    >>> def erf(z):
    ...     slope = 2 / math.pi**0.5 * (-z * z).exp()
    ...     return torch.erf(z), slope, -2 * z * slope
    >>> register_elementwise_derivatives(torch.erf, erf)

    Args:
        function: A function of torch as the model calls it, `torch.erf`; methods and in-place
            variants of the same name are meant, too. (What is made of known functions needs no
            rule.)
        rule: Gets z `[N, features]` and the function's other arguments, without `inplace`; returns
            σ(z), σ'(z) and σ''(z), computed by differentiable operations.
    """
    ELEMENTWISE[name_of(function)] = rule


def name_of(function: Callable[..., Any]) -> str:
    """Return the name that `torch.tanh`, `Tensor.tanh` and `Tensor.tanh_` have in common."""
    return str(getattr(function, "__name__", function)).strip("_")


def _times(z: Tensor, factor: Derivatives) -> Derivatives:
    """Return z τ(z), τ + z τ' and 2 τ' + z τ''."""
    value, slope, curvature = factor
    return z * value, value + z * slope, 2 * slope + z * curvature


def _tanh(z: Tensor) -> Derivatives:
    h = z.tanh()
    slope = 1 - h * h
    return h, slope, -2 * h * slope


def _sigmoid(z: Tensor) -> Derivatives:
    h = z.sigmoid()
    slope = h * (1 - h)
    return h, slope, slope * (1 - 2 * h)


def _gelu(z: Tensor, approximate: str = "none") -> Derivatives:
    if approximate == "tanh":  # z (1 + tanh k) / 2
        scale = math.sqrt(2 / math.pi)
        k, slope = scale * (z + 0.044715 * z**3), scale * (1 + 0.134145 * z * z)
        t, t_1, t_2 = _tanh(k)
        curvature = t_2 * slope**2 + t_1 * (0.26829 * scale * z)
        return _times(z, ((1 + t) / 2, t_1 * slope / 2, curvature / 2))
    density = (-z * z / 2).exp() / math.sqrt(2 * math.pi)
    return _times(z, ((1 + torch.erf(z / math.sqrt(2))) / 2, density, -z * density))


def _softplus(z: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Derivatives:
    """Above the threshold it is z itself, as in torch."""
    slope, curvature, _ = _sigmoid(beta * z)
    identity = beta * z > threshold
    slope = slope.masked_fill(identity, 1.0)
    return F.softplus(z, beta, threshold), slope, beta * curvature.masked_fill(identity, 0.0)


def _mish(z: Tensor) -> Derivatives:
    softplus, s, s_1 = _softplus(z)
    t, t_1, t_2 = _tanh(softplus)
    return _times(z, (t, t_1 * s, t_2 * s * s + t_1 * s_1))


def _elu(z: Tensor, alpha: float = 1.0) -> Derivatives:
    above, slope = z > 0, alpha * z.clamp(max=0).exp()
    return F.elu(z, alpha), slope.masked_fill(above, 1.0), slope.masked_fill(above, 0.0)


def _leaky_relu(z: Tensor, negative_slope: float = 0.01) -> Derivatives:
    slope = torch.ones_like(z).masked_fill(z <= 0, negative_slope)
    return slope * z, slope, torch.zeros_like(z)


def _sin(z: Tensor) -> Derivatives:
    h = z.sin()
    return h, z.cos(), -h


def _cos(z: Tensor) -> Derivatives:
    h = z.cos()
    return h, -z.sin(), -h


def _exp(z: Tensor) -> Derivatives:
    h = z.exp()
    return h, h, h


def _pow(z: Tensor, exponent: float) -> Derivatives:
    if isinstance(exponent, Tensor) or exponent in (0, 1):  # 0 z⁻¹ would not be 0 at 0
        raise NotImplementedError(f"input_derivatives: a power of {exponent}. Leave it out.")
    p = exponent
    return z**p, p * z ** (p - 1), p * (p - 1) * z ** (p - 2)


ELEMENTWISE: dict[str, Rule] = {
    "cos": _cos,
    "elu": _elu,
    "exp": _exp,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "mish": _mish,
    "pow": _pow,
    "reciprocal": lambda z: _pow(z, -1.0),
    "relu": lambda z: _leaky_relu(z, 0.0),
    "sigmoid": _sigmoid,
    "silu": lambda z: _times(z, _sigmoid(z)),
    "sin": _sin,
    "softplus": _softplus,
    "sqrt": lambda z: _pow(z, 0.5),
    "square": lambda z: _pow(z, 2.0),
    "tanh": _tanh,
}
