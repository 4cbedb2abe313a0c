"""Scale and shift of normalisations, z = w x̂ + b entry by entry; x̂ has no parameters.

The exact diagonal of the Fisher costs no more than a factor: with γ = Σ_s g_s x̂_s for w, and
γ = Σ_s g_s for b, of a datum, it is Σ_n γ². Each entry is a block of its own with A = 1 and
G = Σ γ², so that G ⊗ A is exact, and its damped inverse 1 / (G + δ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from kfacopt.kfac.layers.interface import LayerFamily, first_argument

Normalized = Callable[[Any, Tensor], Tensor]


def layer_normalized(module: Any, x: Tensor) -> Tensor:
    """Return x̂ of `nn.LayerNorm`."""
    return F.layer_norm(x, module.normalized_shape, None, None, module.eps)


def rms_normalized(module: Any, x: Tensor) -> Tensor:
    """Return x̂ of `nn.RMSNorm`."""
    return F.rms_norm(x, module.normalized_shape, None, module.eps)


def group_normalized(module: Any, x: Tensor) -> Tensor:
    """Return x̂ of `nn.GroupNorm`."""
    return F.group_norm(x, module.num_groups, None, None, module.eps)


def batch_normalized(module: Any, x: Tensor) -> Tensor:
    """Return x̂ of `nn.BatchNorm1d` to `3d`, by the batch's moments or by the running ones."""
    mean, variance = module.running_mean, module.running_var
    if module.training or mean is None or variance is None:
        return F.batch_norm(x, None, None, training=True, eps=module.eps)
    return F.batch_norm(x, mean, variance, eps=module.eps)


def instance_normalized(module: Any, x: Tensor) -> Tensor:
    """Return x̂ of `nn.InstanceNorm1d` to `3d`, by a datum's moments or by the running ones."""
    batch = x.unsqueeze(0) if x.ndim == module._get_no_batch_dim() else x
    if module.training or module.running_mean is None:
        return F.instance_norm(batch, eps=module.eps).reshape(x.shape)
    moments = module.running_mean, module.running_var
    return F.batch_norm(batch, *moments, eps=module.eps).reshape(x.shape)


class Scale(LayerFamily):
    """The weight of a normalisation, B = its entries.

    Args:
        normalized: Returns x̂ of a module's input.
        channels_last: Whether w has the last axes of the input (`normalized_shape`), else its
            second one.
    """

    weight_name, bias_name, elementwise = "weight", None, True

    def __init__(self, normalized: Normalized, channels_last: bool) -> None:
        self._normalized, self._channels_last = normalized, channels_last

    def is_single(self, module: Any, x: Tensor) -> bool:
        """Tell whether there is no axis but those of a single datum."""
        if self._channels_last:
            return x.ndim == len(module.normalized_shape)
        return isinstance(module, _InstanceNorm) and x.ndim == module._get_no_batch_dim()

    def record(
        self, module: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor
    ) -> tuple[Any, Tensor]:
        """Keep x̂, which depends on the batch, and on the module's mode, in the module's dtypes."""
        return module, self._normalized(module, first_argument(args, kwargs).detach())

    def inputs(self, module: Any, x: Tensor, reduce: bool) -> tuple[Tensor, int]:
        """Bring x̂ to `[B, N, S, 1]`, or its means."""
        rows = self._entries(module, x)
        return rows.mean(2, keepdim=True) if reduce else rows, rows.shape[2]

    def grad_outputs(self, module: Any, g: Tensor) -> Tensor:
        """Bring g to `[B, N, S, 1]`."""
        return self._entries(module, g)

    def _entries(self, module: Any, x: Tensor) -> Tensor:
        """Bring `[N, *positions, *entries]`, or `[N, entries, *positions]`, to `[B, N, S, 1]`."""
        B = self.groups(module)
        if self.is_single(module, x):
            x = x.unsqueeze(0)
        if not self._channels_last:
            return x.reshape(x.shape[0], B, x.shape[2:].numel()).transpose(0, 1).unsqueeze(3)
        positions = x.shape[1 : x.ndim - len(module.normalized_shape)].numel()
        return x.reshape(x.shape[0], positions, B).permute(2, 0, 1).unsqueeze(3)


class Shift(Scale):
    """The bias of a normalisation: a scale of ones."""

    weight_name = "bias"

    def record(
        self, module: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor
    ) -> tuple[Any, Tensor]:
        """Keep ones in the shape of the output, in one number's memory."""
        return module, output.detach().new_ones(()).expand(output.shape)
