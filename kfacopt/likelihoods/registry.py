"""Which functions are known losses, and what a call of one means.

Torch's own four are entered by `optim.watch.loss_calls`, those of users by `register_likelihood`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from kfacopt.likelihoods.interface import Likelihood, UnsupportedLossError, checked

Loss = TypeVar("Loss", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class LossCall:
    """A recognised call of a loss function.

    Attributes:
        likelihood: What the loss means.
        output: The tensor z that the curvature refers to, with its graph.
        target: The targets, or `None` where they are part of z (MSE: z is the residual), or of the
            likelihood.
    """

    likelihood: Likelihood
    output: Tensor
    target: Tensor | None


@dataclass(frozen=True, eq=False)
class LossRule:
    """What calls of a loss function mean.

    Attributes:
        signature: The function's.
        meaning: Maps the call's arguments, by name and with defaults, to what it means.
    """

    signature: inspect.Signature
    meaning: Callable[[dict[str, Any]], LossCall]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossCall:
        """Return what a call with these arguments means."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self.meaning(bound.arguments)


LOSS_RULES: dict[Callable[..., Any], LossRule] = {}


def register_likelihood(rule: Callable[..., Likelihood]) -> Callable[[Loss], Loss]:
    """Say what a loss of one's own means, where that is more than its second derivative tells.

    Any loss trains without it, by the positive part of its Hessian at the model's output. A
    likelihood says it better where its Fisher is another matrix (Student's t and von Mises have
    Hessians with negative parts), where labels are to be drawn from the distribution itself, or
    where z is wide and the structure of the Hessian is known.

    The decorated function is called as before. It is seen by `KFACOptimizer` in the loop, inside a
    model or outside of it, and by `KFACLinearOperator`, `EKFACLinearOperator` and
    `FisherMCLinearOperator`. z is its first argument, a tensor; no other argument may require
    gradients, or the call is one of any function. Without an optimizer a call costs one question
    to torch more (`torch.overrides.has_torch_function`).

    Args:
        rule: Called with the arguments of each call of the loss, returns its `Likelihood`, which
            holds what it needs of them: targets, weights, and the reduction. Most are subclasses of
            `Elementwise`. For a class of modules the first argument is the module.

    Returns:
        A decorator for the loss: a function, or a class of `nn.Module` whose own `forward` it is.

    Raises:
        TypeError: If what is decorated is neither, or has no argument for z.

    Example:
        Student's t with ν degrees of freedom. The second derivative of its loss is negative for
        large residuals; its Fisher is (ν + 1) / (ν + 3) everywhere.

        >>> import torch
        >>> from dataclasses import dataclass
        >>> from torch import nn
        >>> import kfacopt
        >>> @dataclass(frozen=True, eq=False)
        ... class StudentT(kfacopt.Elementwise):
        ...     degrees: float = 5.0
        ...     def second_derivative(self, output):
        ...         return torch.full_like(output, (self.degrees + 1) / (self.degrees + 3))
        >>> @kfacopt.register_likelihood(lambda z, y, nu=5.0: StudentT("mean", degrees=nu))
        ... def student_t_loss(z, y, nu=5.0):
        ...     return (nu + 1) / 2 * ((z - y) ** 2 / nu).log1p().mean()
        >>> model = nn.Linear(3, 1, bias=False)
        >>> X, y = torch.rand(8, 3), torch.rand(8, 1)
        >>> args = model, student_t_loss, list(model.parameters()), [(X, y)]
        >>> K = kfacopt.KFACLinearOperator(*args, fisher_type="type-2")
        >>> torch.allclose(K @ torch.eye(3), 6 / 8 * X.T @ X / 8)
        True

    References:
        Lange, Little & Taylor (1989), https://doi.org/10.1080/01621459.1989.10478852, for the
        Fisher information of Student's t.
    """

    def register(loss: Loss) -> Loss:
        if isinstance(loss, type) and issubclass(loss, nn.Module):
            loss.forward = _visible(loss.forward, rule, skipped=1)
            return cast(Loss, loss)
        if isinstance(loss, type) or not inspect.isfunction(loss):
            raise TypeError(
                f"register_likelihood decorates a function or a class of nn.Module, got {loss!r}."
            )
        return cast(Loss, _visible(loss, rule, skipped=0))

    return register


def _visible(loss: Any, rule: Callable[..., Likelihood], skipped: int) -> Any:
    """Return a function that does what a loss does, but asks tensors and modes first."""
    signature = inspect.signature(loss)
    if len(signature.parameters) <= skipped:
        raise TypeError(f"register_likelihood: {loss.__qualname__} has no argument for z.")
    name = list(signature.parameters)[skipped]

    @functools.wraps(loss)
    def visible(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if has_torch_function(tensors):
            return handle_torch_function(visible, tensors, *args, **kwargs)
        return loss(*args, **kwargs)

    def meaning(arguments: dict[str, Any]) -> LossCall:
        z = arguments[name]
        others = [x for key, x in arguments.items() if key != name and isinstance(x, Tensor)]
        if any(x.requires_grad for x in others):
            raise UnsupportedLossError(
                f"{loss.__qualname__}: another argument than {name!r} requires gradients."
            )
        given = signature.bind_partial()
        given.arguments.update(arguments)
        return LossCall(checked(rule(*given.args, **given.kwargs)), z, None)

    LOSS_RULES[visible] = LossRule(signature, meaning)
    return visible


def registered_call(loss_func: Any, output: Tensor, target: Any) -> LossCall | None:
    """Return what `loss_func(output, target)` means if the loss, or its class, is registered."""
    args: tuple[Any, ...] = (output, target)
    kwargs: dict[str, Any] = {}
    while isinstance(loss_func, functools.partial):
        args, kwargs = (*loss_func.args, *args), {**loss_func.keywords, **kwargs}
        loss_func = loss_func.func
    if isinstance(loss_func, nn.Module):
        args, loss_func = (loss_func, *args), type(loss_func).forward
    rule = LOSS_RULES.get(loss_func) if inspect.isfunction(loss_func) else None
    return None if rule is None else rule.call(args, kwargs)
