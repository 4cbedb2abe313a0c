"""What users read in warnings, errors and logs; when it is said is in the rooms."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from kfacopt.kfac.factor_forms import FactorForm
from kfacopt.kfac.layers import Kinds, Layer, default_kinds, described

logger = logging.getLogger("kfacopt")


class KFACWarning(UserWarning):
    """Something works otherwise than a reader of the training script would expect."""


class Notices:
    """Warnings of one optimizer, each given once."""

    def __init__(self) -> None:
        """Start without any."""
        self._given: set[str] = set()

    def warn(self, key: str, message: str) -> None:
        """Warn, unless a warning of this key was given."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(
                f"KFACOptimizer: {message} (Shown once; silence it with "
                "warnings.simplefilter('ignore', kfacopt.KFACWarning).)",
                KFACWarning,
                stacklevel=user_stacklevel(),
            )

    def log(self, key: str, message: str) -> None:
        """Log what changes how well, but not what is computed, once."""
        if key not in self._given:
            self._given.add(key)
            logger.info("KFACOptimizer: %s", message)


def log_layers(layers: Sequence[Layer], fallback: Sequence[str], form: FactorForm) -> None:
    """Log, once, which parameters the fallback trains, and which factors are diagonals.

    Args:
        layers: The layers with Kronecker factors.
        fallback: The names of all other parameters.
        form: How factors are formed.
    """
    logger.info(
        "K-FAC preconditions %d layers; trained by the AdamW fallback: %s",
        len(layers),
        ", ".join(fallback) or "none",
    )
    for layer in layers:
        for side, width in (("input", layer.d_in), ("grad_output", layer.d_out)):
            always = side == "input" and layer.diagonal_input
            always = always or (side == "input" and layer.positions > 0)
            if form.diagonal(width) and not always:
                logger.warning(
                    "layer %r: its %s factor is kept as a diagonal, %d > max_factor_dim = %s",
                    layer.name,
                    side,
                    width,
                    form.max_factor_dim,
                )


def user_stacklevel() -> int:
    """Return the `stacklevel` with which the caller's warning points at the user's own line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("kfacopt", "torch"):
            break
        level, frame = level + 1, frame.f_back
    return level


def log_new_layer(layer: Layer) -> None:
    """Log that a layer was not yet known in the forward pass that its gradient comes from."""
    logger.info("layer %r is new since the forward pass; AdamW makes its first step", layer.name)


def log_objective(title: str, curvature: str) -> None:
    """Log which curvature is used for an objective."""
    logger.info("objective %s: %s", title, curvature)


def stale_factors(layer: Layer) -> str:
    """Say that a layer's curvature is no longer captured."""
    return (
        f"layer {layer.name!r} has a gradient but its curvature was not captured in this step, as "
        "it was before (its forward pass runs outside the hooks, its weight was used in other "
        "ways, or the loss on it was not recognised); the step uses the curvature of earlier "
        "steps, whose age is "
        f"statistics()['{layer.name}/factor_age']."
    )


def without_curvature(layer: Layer) -> str:
    """Say that a layer never had any curvature, and what may be the reason."""
    return (
        f"layer {layer.name!r} has a gradient but no curvature was captured (its forward pass runs "
        "outside the hooks, its weight is used without a call of the module, the loss on it was "
        "not recognised, or was not finite); it gets the AdamW fallback update."
    )


def derivatives_left_out() -> str:
    """Say that an objective contains derivatives of the model, whose curvature is not counted."""
    return (
        "the objective contains derivatives of the model that torch.autograd.grad took (a gradient "
        "penalty, the residual of a differential equation). Their gradients count, their curvature "
        "does not; that of the other terms does. Where they are most of the objective, take them "
        "with kfacopt.input_derivatives(model, x), which has the curvature."
    )


def transformed() -> str:
    """Say that a model was called within transforms of `torch.func`, or in forward mode."""
    return (
        "the model was called within transforms of torch.func or forward mode. If the objective "
        "contains what they compute (derivatives by the input, vmap), its gradients count, its "
        "curvature does not; where there is nothing else, AdamW makes the step. Derivatives by the "
        "input that are taken with kfacopt.input_derivatives(model, x) have the curvature."
    )


def used_otherwise(layers: Iterable[Layer]) -> str:
    """Say that layers have no curvature, as not all uses of their parameters were seen.

    Args:
        layers: Layers whose parameters are used otherwise than by calls and products, too.
    """
    names = sorted(repr(layer.name) for layer in layers)
    kind, whose = ("layer", "its") if len(names) == 1 else ("layers", "their")
    return (
        f"{kind} {', '.join(names)}: the loss depends on {whose} parameters in other ways, too, "
        "than by calls of the module and products with its weight (a weight in a sum, times a "
        "number, transposed; a derivative of the model by its input), which "
        f"{whose} factors would lack; the AdamW fallback updates them. "
        "To have them preconditioned, take derivatives by the input with "
        "kfacopt.input_derivatives(model, x), and call the module wherever its weight is used."
    )


def uncompiled_cause(module: type[nn.Module] | None, interval: int) -> str | None:
    """Say why `torch.compile` has no effect at all, or return `None` where it has.

    Args:
        module: The kind of the module that was called from compiled code while it had hooks, if
            there was one.
        interval: `factor_update_interval`; 1 for `lr="auto"`.
    """
    if module is None:
        return None
    if interval == 1:
        return (
            "a compiled model runs uncompiled on steps that look at it, and with "
            'factor_update_interval=1 or lr="auto" all do. Raise factor_update_interval.'
        )
    if module.forward.__module__.startswith("torch.nn."):
        return (
            f"torch.compile leaves a bare nn.{module.__name__} uncompiled once it met hooks on it. "
            "Compile a module of your own that calls it in its forward."
        )
    return None


def unwrapped_averaging() -> str:
    """Say what is wrong where gradients are averaged over ranks by hand."""
    return (
        "gradients seem to be averaged over ranks without a wrapper (collectives ran between the "
        "loss and the step, and the model is in no DistributedDataParallel). The curvature is that "
        "of this rank's data alone, so that ranks with one model step differently and their "
        "parameters drift apart, silently. Wrap the model in nn.parallel.DistributedDataParallel: "
        "it averages the gradients, and this optimizer the curvature. Where each rank trains a "
        "model of its own, all is well."
    )


def skipped_step(names: Sequence[str]) -> str:
    """Say that a step was skipped, as the gradients of parameters are not finite."""
    return (
        f"the step is skipped: gradients have NaN or infinite entries ({', '.join(names)}). "
        "statistics()['skipped_steps'] counts such steps."
    )


def without_layers(layers: Kinds | None) -> str:
    """Say that there is no curvature at all.

    Args:
        layers: Which kinds of modules are preconditioned, if that was set.
    """
    kinds = default_kinds() if layers is None else layers
    which = "a layer that K-FAC knows" if layers is None else "what layers= names"
    return (
        f"none of the parameters is in {which} ({described(kinds) or 'nothing'}); "
        "all are trained by the AdamW fallback."
    )


def hidden_by_checkpointing(names: Sequence[str]) -> str:
    """Say that reentrant checkpointing hides what matrices are used for.

    Args:
        names: The matrices' names.
    """
    shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return (
        f"the products with {shown} are not to be seen: activation checkpointing with "
        "use_reentrant=True keeps what is within out of autograd's graph. The AdamW fallback "
        "trains what is named here. Call torch.utils.checkpoint.checkpoint(..., "
        "use_reentrant=False); in transformers, gradient_checkpointing_kwargs="
        '{"use_reentrant": False}.'
    )


def missing_statistics(forward_seen: bool, accumulated: bool = True) -> str:
    """Say why there are gradients but no statistics, and the way out.

    Args:
        forward_seen: Whether a forward pass went through the hooks.
        accumulated: Whether a backward pass accumulated gradients.
    """
    if not accumulated:
        return (
            "there are gradients, but no backward pass made them since the last step: they are of "
            "an earlier one, were set by hand (p.grad = ...), or computed before the optimizer was "
            "made. Curvature is taken from backward passes: call backward() on the loss of a "
            "forward pass that came after the optimizer, and change its gradients then, if at all."
        )
    if not forward_seen:
        return (
            "no forward pass of the model went through the optimizer's hooks since the last step. "
            "Make the optimizer before the forward pass whose gradients it steps with. "
            "If the parameters are used by another module than the one that owns them, name it "
            "with model=; if the model was compiled and called before the optimizer was made, "
            "call torch._dynamo.reset()."
        )
    return (
        "no backward pass from the model's outputs was seen: the loss is computed from tensors in "
        "objects that are no containers of torch's pytrees, dataclasses or tensors, in another "
        "thread, or from detached outputs. Return the outputs in a tuple, dict or dataclass, or "
        "say with loss_func= what the loss at the model's output is."
    )


def unmeasured(reason: str) -> str:
    """Say that the KL clip does not follow the data."""
    return f'kl_clip="auto": steps cannot be measured ({reason}); it stays as it is until they can.'


def short_rates(share: float, steps: int, base: float, tuned: bool) -> str:
    """Say that a schedule's rates are meant for another rule.

    Args:
        share: The largest rate so far, in units of the one that its group was made with.
        steps: Of how many steps that is.
        base: What that group was made with.
        tuned: Whether it is `lr="auto"`, whose rates are factors.
    """
    other = "" if tuned else ", or make the optimizer with lr= the largest rate of your schedule"
    return (
        f"in {steps} steps lr was never above {share * base:.3g}, {share:.2g} of the rate that the "
        "optimizer was made with, and steps are proportional to it: they are that much too short. "
        "Rates here are no rates of AdamW's. Let the schedule rise to the optimizer's own rate "
        f"(max_lr={base:g}){other}."
    )
