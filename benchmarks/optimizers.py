"""How each optimizer is put on a model. What a package does not train, AdamW trains."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from benchmarks.environment import installed
from kfacopt import KFACOptimizer

SINGD_STATE = ("Ks", "Cs", "m_Ks", "m_Cs")


class Joint:
    """Optimizers for disjoint sets of parameters of one model, used as one.

    Args:
        optimizers: The optimizers.
    """

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """The state of all."""
        return {p: s for optimizer in self.optimizers for p, s in optimizer.state.items()}

    def zero_grad(self) -> None:
        """Reset all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Perform a step of each."""
        for optimizer in self.optimizers:
            optimizer.step()


def has_shampoo_and_soap() -> bool:
    """Tell whether pytorch-optimizer is installed."""
    return installed("pytorch-optimizer") is not None


def has_singd() -> bool:
    """Tell whether SINGD and what it imports is installed."""
    return all(installed(name) is not None for name in ("singd", "einops", "einconv"))


def missing_packages() -> list[str]:
    """Return the packages whose optimizers are left out because they are not installed."""
    packages = ("pytorch-optimizer", "singd", "einops", "einconv")
    return [name for name in packages if installed(name) is None]


def sgd(
    model: nn.Module, *, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum.

    Torch's defaults are 1e-3 and no momentum, which nobody would call tuned or untuned SGD.

    Args:
        model: The model.
        lr: The learning rate.
        momentum: Above 0.
        weight_decay: Added to the gradient.
    """
    return torch.optim.SGD(
        model.parameters(), lr, momentum=momentum, nesterov=True, weight_decay=weight_decay
    )


def adamw(model: nn.Module, *, beta1: float = 0.9, **settings: Any) -> torch.optim.Optimizer:
    """Return AdamW with torch's defaults."""
    return torch.optim.AdamW(model.parameters(), betas=(beta1, 0.999), **settings)


def _rest(model: nn.Module, taken: Iterable[Tensor]) -> list[Parameter]:
    seen = {id(p) for p in taken}
    return [p for p in model.parameters() if id(p) not in seen]


def _with_adamw(main: Any, rest: Sequence[Parameter], **settings: Any) -> Any:
    return Joint(main, torch.optim.AdamW(rest, **settings)) if rest else main


def hidden_linear(model: nn.Module) -> list[Parameter]:
    """Return the matrices of linear layers but for output layers.

    Those are what lies in modules named `head` or `heads`, or else the last linear layer.
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    hidden = [m.weight for name, m in linear if not {"head", "heads"} & {*name.split(".")}]
    return hidden if len(hidden) < len(linear) else hidden[:-1]


def muon(model: nn.Module, *, lr: float = 1e-3, weight_decay: float = 0.1) -> Any:
    """Return torch's Muon for the matrices of hidden linear layers, and AdamW for the rest.

    Embeddings, the output layer, vectors and convolutions are the rest, as Muon's documentation
    advises (torch's takes matrices only). Its learning rate is scaled to that of AdamW.

    Args:
        model: The model.
        lr: The learning rate of both.
        weight_decay: Of both.
    """
    linear = hidden_linear(model)
    rest = _rest(model, linear)
    if not linear:
        return torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)
    main = torch.optim.Muon(
        linear, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return _with_adamw(main, rest, lr=lr, weight_decay=weight_decay)


def soap(model: nn.Module, *, beta1: float = 0.95, **settings: Any) -> Any:
    """Return pytorch-optimizer's SOAP with its defaults."""
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), betas=(beta1, 0.95), **settings)


def shampoo(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    interval: int = 10,
    beta1: float = 0.9,
    weight_decay: float = 0.0,
) -> Any:
    """Return pytorch-optimizer's blocked Shampoo, grafted to RMSProp.

    Its `Shampoo` accumulates statistics without decay and lacks grafting, so it is
    `ScalableShampoo`. Momentum is an average here, so that `lr` means what it does for AdamW: the
    package's default is a sum, 1 / (1 − β₁) times as long.

    Args:
        model: The model.
        lr: The learning rate.
        interval: Steps between updates of the roots, and before the first of them is used.
        beta1: The decay of momentum.
        weight_decay: Decoupled.
    """
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    return ScalableShampoo(
        model.parameters(),
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
        start_preconditioning_step=interval,
        preconditioning_compute_steps=interval,
        betas=(beta1, 0.99),
        moving_average_for_momentum=True,
        graft_type=LayerWiseGrafting.RMSPROP,
    )


def singd(model: nn.Module, *, lr: float = 1e-3, interval: int = 10, terms: str = "batch") -> Any:
    """Return SINGD for linear and convolution layers, and AdamW for the rest.

    Args:
        model: The model.
        lr: The learning rate of both.
        interval: Steps between updates of the preconditioner.
        terms: Over what the loss averages, `"batch"` or `"batch+sequence"`.
    """
    from singd.optim.optimizer import SINGD

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    params = [p for m in layers for p in m.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main = SINGD(model, params, lr=lr, T=interval, loss_average=terms)
    return _with_adamw(main, _rest(model, params), lr=lr)


def kfac(model: nn.Module, **settings: Any) -> KFACOptimizer:
    """Return `KFACOptimizer`."""
    return KFACOptimizer(model.parameters(), model=model, **settings)


def lbfgs(model: nn.Module, *, max_iter: int = 10, history: int = 100) -> torch.optim.Optimizer:
    """Return L-BFGS with a strong-Wolfe line search.

    It goes on for as long as it is asked to: torch's default tolerances end it at losses of 1e-9.

    Args:
        model: The model.
        max_iter: Iterations a step.
        history: How many pairs of vectors it keeps.
    """
    return torch.optim.LBFGS(
        model.parameters(),
        lr=1.0,
        max_iter=max_iter,
        history_size=history,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )


ekfac = functools.partial(kfac, preconditioner="ekfac")
self_tuned_kfac = functools.partial(kfac, lr="auto")


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def parts_of(optimizer: Any) -> tuple[Any, ...]:
    """Return the optimizers that an optimizer consists of."""
    return optimizer.optimizers if isinstance(optimizer, Joint) else (optimizer,)


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of all tensors in an optimizer's state, parameters excluded."""
    params = {p.untyped_storage().data_ptr() for g in optimizer.param_groups for p in g["params"]}
    params |= {
        p.grad.untyped_storage().data_ptr()
        for g in optimizer.param_groups
        for p in g["params"]
        if p.grad is not None
    }
    # SINGD keeps its matrices beside the state
    beside = [getattr(part, name, {}) for part in parts_of(optimizer) for name in SINGD_STATE]
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in (*optimizer.state.values(), *beside)
        for t in _tensors(state)
    }
    return sum(size for pointer, size in found.items() if pointer not in params)
