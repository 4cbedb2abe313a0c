"""Losses over classes, cross entropy and NLL; not losses of single entries (`elementwise`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kfacopt.likelihoods.interface import Likelihood, UnsupportedLossError

_SIMPLEX_TOLERANCE = 0.1  # bfloat16 log-probabilities of 1,000 classes are off by 1 %


def _draw_labels(probabilities: Tensor, generator: Generator) -> Tensor:
    """Draw a class `[n]` from each row of `[n, classes]`, on the generator's device.

    On the CPU by the inverse distribution function, in float64 so that rare classes keep their
    probability: `torch.multinomial` draws an exponential variable for every class there.
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    cdf = probabilities.to(torch.float64).cumsum(-1)
    draw = torch.rand(cdf.shape[0], 1, generator=generator, dtype=torch.float64) * cdf[:, -1:]
    labels = torch.searchsorted(cdf, draw, right=True)[:, 0]
    return labels.clamp_(max=cdf.shape[-1] - 1)


@dataclass(frozen=True, eq=False)
class _Categorical(Likelihood):
    """Shared by cross entropy and NLL: the class axis is 1, or 0 for a single datum."""

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @staticmethod
    def _class_axis(output: Tensor) -> int:
        return 1 if output.ndim > 1 else 0

    def has_data_axis(self, output: Tensor) -> bool:
        """Tell whether z is a batch: one axis alone is that of the classes."""
        return output.ndim > 1

    def spread(self, weights: Tensor, output: Tensor) -> Tensor:
        """Return the weights with an axis of classes."""
        return weights.unsqueeze(self._class_axis(output))

    def _class_free_ones(self, output: Tensor) -> Tensor:
        """Return a one for each term."""
        return torch.ones_like(output.select(self._class_axis(output), 0))

    def _class_weights(self, output: Tensor) -> Tensor:
        if self.weight is not None:
            return self.weight.to(output)
        classes = output.shape[self._class_axis(output)]
        return torch.ones(classes, dtype=output.dtype, device=output.device)

    def _has_probabilities(self, output: Tensor, target: Tensor) -> bool:
        return target.shape == output.shape and target.is_floating_point()

    def _kept(self, target: Tensor) -> Tensor:
        return target != self.ignore_index

    def _target_weights(self, output: Tensor, target: Tensor) -> Tensor:
        """Return w_{y_t}, 0 for ignored targets."""
        kept = self._kept(target)
        return self._class_weights(output)[target.masked_fill(~kept, 0)] * kept

    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return t_t = Σ_c w_c ỹ_{t,c} with smoothed targets ỹ, the factor of the Hessian."""
        axis = self._class_axis(output)
        if target is None:
            if self.weight is not None:
                raise UnsupportedLossError(
                    "loss_func: class weights need the targets, which are unknown when the loss "
                    "is only stated. Compute the loss with F.cross_entropy on the model's output."
                )
            return self._class_free_ones(output)
        smoothing, class_weights = self.label_smoothing, self._class_weights(output)
        classes = output.shape[axis]
        if self._has_probabilities(output, target):
            smoothed = (1 - smoothing) * target.to(output) + smoothing / classes
            return (smoothed.movedim(axis, -1) * class_weights).sum(-1)
        uniform = smoothing * class_weights.sum() / classes
        plain = (1 - smoothing) * self._target_weights(output, target)
        return plain + uniform * self._kept(target)

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return Σ_t w_{y_t}, or the number of terms for probabilities or unknown targets."""
        if target is None or self._has_probabilities(output, target):
            return self._class_free_ones(output).sum()
        return self._target_weights(output, target).sum()

    def num_terms(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of targets that are not ignored: each is a datum of its own."""
        if target is None or self._has_probabilities(output, target):
            return self._class_free_ones(output).sum()
        return self._kept(target).sum().to(output.dtype)

    def num_positions(self, output: Tensor) -> int:
        """Return the number of targets."""
        return output.numel() // max(output.shape[self._class_axis(output)], 1)

    def _position_masks(self, output: Tensor) -> Iterator[Tensor | float]:
        positions = output.shape[2:]
        if positions.numel() == 1:
            yield 1.0
            return
        for mask in torch.eye(positions.numel(), dtype=output.dtype, device=output.device):
            yield mask.reshape(1, 1, *positions)

    def _draw_one_hot(self, probabilities: Tensor, generator: Generator) -> Tensor:
        axis = self._class_axis(probabilities)
        rows = probabilities.movedim(axis, -1)
        flat = rows.reshape(-1, rows.shape[-1]).to(generator.device)
        if not bool(flat.sum().isfinite()):
            return torch.full_like(probabilities, torch.nan)
        labels = _draw_labels(flat, generator).to(rows.device)
        one_hot = F.one_hot(labels, rows.shape[-1]).to(rows.dtype)
        return one_hot.reshape(rows.shape).movedim(-1, axis)


class CrossEntropy(_Categorical):
    """Softmax cross entropy at logits z: ∇²ℓ = diag(p) − p pᵀ with p = softmax(z)."""

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield √p_c (e_c − p)."""
        axis = self._class_axis(output)
        p = output.softmax(axis)
        for c in range(output.shape[axis]):
            column = -p
            column.select(axis, c).add_(1)
            yield column * p.select(axis, c).sqrt().unsqueeze(axis)

    def multiply_hessian(self, output: Tensor, vector: Tensor) -> Tensor:
        """Return p ⊙ v − p (pᵀ v)."""
        axis = self._class_axis(output)
        p = output.softmax(axis)
        return p * (vector - (p * vector).sum(axis, keepdim=True))

    def draw_gradient(self, output: Tensor, generator: Generator) -> Tensor:
        """Return p − e_ỹ."""
        p = output.softmax(self._class_axis(output))
        return p - self._draw_one_hot(p, generator)


class NegativeLogLikelihood(_Categorical):
    """NLL at log-probabilities z: the Fisher diag(p) with p = exp(z).

    The loss is linear in z, its Hessian is 0. The Fisher of the categorical distribution that z
    describes, diag(p), gives after the log-softmax that made z the Fisher of cross entropy.
    """

    def check_output(self, output: Tensor) -> None:
        """Raise an `UnsupportedLossError` if z is no tensor of log-probabilities."""
        self._probabilities(output)

    def _probabilities(self, output: Tensor) -> Tensor:
        p = output.exp()
        total = p.sum(self._class_axis(output))
        if bool(((total - 1).abs() > _SIMPLEX_TOLERANCE).any()):
            raise UnsupportedLossError(
                "nll_loss: its input must be log-probabilities, whose exponentials sum to 1 over "
                f"the classes; found a sum of {float(total.flatten()[0]):.4g}. Apply log_softmax, "
                "or use cross_entropy on the logits."
            )
        return p

    def undecided(self, output: Tensor) -> Tensor:
        """Return log-probabilities of classes that are equally likely."""
        return torch.full_like(output, -math.log(output.shape[self._class_axis(output)]))

    def root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield √p_c e_c."""
        axis = self._class_axis(output)
        root = self._probabilities(output).sqrt()
        for c in range(output.shape[axis]):
            column = torch.zeros_like(root)
            column.select(axis, c).copy_(root.select(axis, c))
            yield column

    def multiply_hessian(self, output: Tensor, vector: Tensor) -> Tensor:
        """Return p ⊙ v."""
        return self._probabilities(output) * vector

    def draw_gradient(self, output: Tensor, generator: Generator) -> Tensor:
        """Return −e_ỹ."""
        return -self._draw_one_hot(self._probabilities(output), generator)
