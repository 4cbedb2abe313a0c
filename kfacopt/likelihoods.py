"""What a loss means at the tensor that it sees: its curvature, its samples and all scaling.

A likelihood sees the tensor z that the loss was given, `[N, ...]`, and the targets. Its terms are
the summands ℓ_t(z_t, y_t) that the loss reduces. The loss is L = Σ_t ω_t ℓ_t, where the weight ω_t
holds every constant factor: 1/normalizer for `reduction="mean"`, class weights, ignored targets,
and what the user multiplied the loss with before `backward()`. It is applied here and nowhere else:
the vectors v that `hessian_root` and `sample_gradient` give satisfy, for each datum,

    Σ_v v vᵀ = ω_t ∇²_z ℓ_t    and    E[v vᵀ] = ω_t ∇²_z ℓ_t.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

FisherType = Literal["mc", "type-2", "empirical"]
FISHER_TYPES: tuple[FisherType, ...] = ("mc", "type-2", "empirical")

SUPPORTED_LOSSES = (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.NLLLoss)

_SIMPLEX_TOLERANCE = 0.1  # bfloat16 log-probabilities of 1,000 classes are off by 1 %


class UnsupportedLossError(NotImplementedError):
    """The loss, or an option of it, has no likelihood here."""


def _sampling_dtype(output: Tensor) -> torch.dtype:
    return torch.promote_types(output.dtype, torch.float32)


def widened(output: Tensor) -> Tensor:
    """Return z without a graph and in at least float32: counts overflow float16 beyond 65,504."""
    return output.detach().to(_sampling_dtype(output))


def _uniform_draw(output: Tensor, generator: Generator) -> Tensor:
    """Draw from [0, 1) on the generator's device, wherever z lives."""
    dtype = _sampling_dtype(output)
    draw = torch.rand(output.shape, generator=generator, dtype=dtype, device=generator.device)
    return draw.to(output.device)


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
class Likelihood(ABC):
    """A loss as a negative log-likelihood at its input z `[N, ...]`.

    Attributes:
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    reduction: str

    def check_target(self, output: Tensor, target: Tensor | None) -> None:  # noqa: B027
        """Raise a `ValueError` for a target that torch's loss accepts, but that is no target of z.

        Args:
            output: z, `[N, ...]`.
            target: The loss's target, or `None` where it is unknown.
        """

    @abstractmethod
    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the weight of each term in the *summed* loss: class weights, 0 if ignored.

        Args:
            output: z, `[N, ...]`.
            target: The loss's target, or `None` where it is unknown.
        """

    @abstractmethod
    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return, as a scalar, what `reduction="mean"` divides the summed loss by."""

    @abstractmethod
    def num_terms(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return, as a scalar, how many data the loss counts: all that are not ignored.

        A weight is part of a datum's loss, and does not make it more than one datum.
        """

    @abstractmethod
    def num_positions(self, output: Tensor) -> int:
        """Return the number of data, each of their positions counted as one of its own."""

    @abstractmethod
    def _root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield v `[*z.shape]` with Σ_v v vᵀ = ∇²ℓ_t for every term, one for each output of it."""

    @abstractmethod
    def _hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        """Return ∇²ℓ_t v for every term, `[*z.shape]`."""

    @abstractmethod
    def _sample(self, output: Tensor, generator: Generator) -> Tensor:
        """Draw labels y ~ q(·|z) and return ∇_z ℓ(z, y) `[*z.shape]`."""

    def _spread(self, weights: Tensor, output: Tensor) -> Tensor:
        """Broadcast a tensor of one entry per term against z."""
        return weights

    def curvature_weights(
        self, output: Tensor, target: Tensor | None, upstream: Tensor | float = 1.0
    ) -> Tensor:
        """Return ω_t, the non-negative factor of each term's curvature in the user's objective.

        Args:
            output: z, `[N, ...]`.
            target: The loss's target, or `None` where it is unknown.
            upstream: Derivative of the user's objective by the loss value: a scalar, or for
                `reduction="none"` one for each term. Its sign is dropped: a Fisher has none.
        """
        weights = self.term_weights(output, target)
        factor = torch.as_tensor(upstream, dtype=weights.dtype, device=weights.device).abs()
        if self.reduction == "mean":
            factor = factor / self.normalizer(output, target)
        return weights * factor

    def hessian_root(
        self, output: Tensor, weights: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Yield the columns v `[*z.shape]` of a root of the loss Hessian, for all data at once.

        There is one column for each entry of a datum z_n (classes × positions). Rows of z are
        independent data; where a model mixes them (batch norm, sequences that were flattened into
        rows), a deterministic root would add their cross terms, so every row gets a random sign,
        which keeps the estimate unbiased and does not change it where nothing is mixed.

        Args:
            output: z, `[N, ...]`, without a graph.
            weights: ω_t, from `curvature_weights`.
            generator: Draws the signs.
        """
        scale = self._spread(weights.sqrt(), output)
        rows = output.shape[:1] if self.has_data_axis(output) else ()
        shape = rows + (1,) * (output.ndim - len(rows))
        draw = torch.randint(2, shape, generator=generator, device=generator.device)
        scale = scale * (draw.to(output) * 2 - 1)
        for column in self._root_columns(output):
            for position in self._position_masks(output):
                yield (column * scale * position).to(output.dtype)

    def hessian_product(self, output: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
        """Return ω_t ∇²ℓ_t v `[*z.shape]`.

        Args:
            output: z, `[N, ...]`, without a graph.
            weights: ω_t, from `curvature_weights`.
            vector: v, `[*z.shape]`.
        """
        return self._hessian_product(output, vector) * self._spread(weights, output)

    def has_data_axis(self, output: Tensor) -> bool:
        """Tell whether z is a batch, and not a single datum without an axis N."""
        return output.ndim > 0

    def _position_masks(self, output: Tensor) -> Iterator[Tensor | float]:
        """Yield masks, broadcastable to z, that single out one position of every datum."""
        yield 1.0

    def sample_gradient(self, output: Tensor, weights: Tensor, generator: Generator) -> Tensor:
        """Return √ω_t ∇ℓ_t(z, ỹ) `[*z.shape]` for labels ỹ drawn once from the model.

        Args:
            output: z, `[N, ...]`, without a graph.
            weights: ω_t, from `curvature_weights`.
            generator: Draws the labels, in one call.
        """
        sample = self._sample(output.to(_sampling_dtype(output)), generator)
        return (sample * self._spread(weights.sqrt(), output)).to(output.dtype)


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

    def _spread(self, weights: Tensor, output: Tensor) -> Tensor:
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

    def _root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield √p_c (e_c − p)."""
        axis = self._class_axis(output)
        p = output.softmax(axis)
        for c in range(output.shape[axis]):
            column = -p
            column.select(axis, c).add_(1)
            yield column * p.select(axis, c).sqrt().unsqueeze(axis)

    def _hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        axis = self._class_axis(output)
        p = output.softmax(axis)
        return p * (vector - (p * vector).sum(axis, keepdim=True))

    def _sample(self, output: Tensor, generator: Generator) -> Tensor:
        p = output.softmax(self._class_axis(output))
        return p - self._draw_one_hot(p, generator)


class NegativeLogLikelihood(_Categorical):
    """NLL at log-probabilities z: the Fisher diag(p) with p = exp(z).

    The loss is linear in z, its Hessian is 0. The Fisher of the categorical distribution that z
    describes, diag(p), gives after the log-softmax that made z the Fisher of cross entropy.
    """

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

    def _root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield √p_c e_c."""
        axis = self._class_axis(output)
        root = self._probabilities(output).sqrt()
        for c in range(output.shape[axis]):
            column = torch.zeros_like(root)
            column.select(axis, c).copy_(root.select(axis, c))
            yield column

    def _hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        return self._probabilities(output) * vector

    def _sample(self, output: Tensor, generator: Generator) -> Tensor:
        return -self._draw_one_hot(self._probabilities(output), generator)


@dataclass(frozen=True, eq=False)
class _Elementwise(Likelihood):
    """Shared by losses whose terms are single entries of z."""

    weight: Tensor | None = None

    def _second_derivative(self, output: Tensor) -> Tensor:
        raise NotImplementedError

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of entries of z."""
        return torch.full((), output.numel(), dtype=output.dtype, device=output.device)

    def num_terms(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of rows of z: the mean over a datum's outputs is part of ℓ_n."""
        rows = output.shape[0] if output.ndim else 1
        return torch.full((), rows, dtype=output.dtype, device=output.device)

    def num_positions(self, output: Tensor) -> int:
        """Return the number of vectors along the last axis of z."""
        return output.shape[:-1].numel() if output.ndim > 1 else output.numel()

    def _hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        return self._second_derivative(output) * vector

    def _root_columns(self, output: Tensor) -> Iterator[Tensor]:
        """Yield √(∂²ℓ/∂z²) at one entry of each datum."""
        root = self._second_derivative(output).sqrt()
        if root.ndim == 0:
            yield root
            return
        flat = root.reshape(root.shape[0], root.shape[1:].numel())
        for i in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, i] = flat[:, i]
            yield column.reshape(root.shape)


class SquaredError(_Elementwise):
    """MSE: ℓ = (z − y)², ∇²ℓ = 2; the negative log-likelihood of y ~ N(z, 1/2)."""

    def check_target(self, output: Tensor, target: Tensor | None) -> None:
        """Raise a `ValueError` if predictions and targets have different shapes."""
        if isinstance(target, Tensor) and target.shape != output.shape:
            raise ValueError(
                f"MSE: the prediction has the shape {tuple(output.shape)} and the target "
                f"{tuple(target.shape)}, which would be broadcast against each other; reshape one."
            )

    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the elementwise `weight` of the loss, or ones."""
        self.check_target(output, target)
        return torch.ones_like(output) if self.weight is None else self.weight.to(output)

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return the number of entries of z, or the sum of the elementwise weights."""
        self.check_target(output, target)
        if self.weight is None:
            return super().normalizer(output, target)
        return self.weight.to(output).sum()

    def _second_derivative(self, output: Tensor) -> Tensor:
        return torch.full_like(output, 2.0)

    def _sample(self, output: Tensor, generator: Generator) -> Tensor:
        """Return 2 (z − ỹ) with ỹ − z ~ N(0, 1/2)."""
        shape, device = output.shape, generator.device
        noise = torch.randn(shape, generator=generator, dtype=output.dtype, device=device)
        return noise.to(output.device) * 2**0.5


@dataclass(frozen=True, eq=False)
class Bernoulli(_Elementwise):
    """Binary cross entropy at logits z: ∇²ℓ = σ(z) (1 − σ(z)), times `weight` and `pos_weight`."""

    pos_weight: Tensor | None = None

    def term_weights(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Return w (1 + (pos_weight − 1) y), the factor of σ(1 − σ) in the Hessian."""
        weights = torch.ones_like(output)
        if self.pos_weight is not None:
            if target is None:
                raise UnsupportedLossError(
                    "loss_func: pos_weight needs the targets, which are unknown when the loss is "
                    "only stated. Compute the loss with F.binary_cross_entropy_with_logits."
                )
            weights = weights + (self.pos_weight.to(output) - 1) * target.to(output)
        return weights if self.weight is None else weights * self.weight.to(output)

    def _second_derivative(self, output: Tensor) -> Tensor:
        p = output.sigmoid()
        return p * (1 - p)

    def _sample(self, output: Tensor, generator: Generator) -> Tensor:
        p = output.sigmoid()
        return p - (_uniform_draw(output, generator) < p).to(p.dtype)


# From losses to likelihoods ------------------------------------------------------------------


def checked(likelihood: Likelihood) -> Likelihood:
    """Return the likelihood if its options make sense, else raise."""
    if likelihood.reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f'reduction must be "mean", "sum" or "none", got {likelihood.reduction!r}.'
        )
    weight = getattr(likelihood, "weight", None)
    if weight is not None and bool((weight < 0).any()):
        raise UnsupportedLossError("weight: negative weights make the loss concave; no Fisher.")
    return likelihood


def has_likelihood(loss_func: object) -> bool:
    """Tell whether a loss is one of `SUPPORTED_LOSSES`; a subclass that changes it is not."""
    return any(
        isinstance(loss_func, kind) and type(loss_func).forward is kind.forward
        for kind in SUPPORTED_LOSSES
    )


def with_sum(loss_func: nn.Module) -> Any:
    """Return a loss that is the sum of the terms of which a loss is the mean or the sum."""
    summed: Any = copy.copy(loss_func)
    summed.reduction = "sum"
    return summed


def likelihood_of(loss_func: nn.Module) -> Likelihood:
    """Return the likelihood of an `nn` loss module.

    Args:
        loss_func: `nn.MSELoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss` or `NLLLoss`.

    Raises:
        UnsupportedLossError: For any other loss, by name.
    """
    if not has_likelihood(loss_func):
        supported = ", ".join(f"nn.{loss.__name__}" for loss in SUPPORTED_LOSSES)
        name = getattr(loss_func, "__name__", type(loss_func).__name__)
        raise UnsupportedLossError(f"loss_func: {name} is not supported; give one of {supported}.")
    if isinstance(loss_func, nn.CrossEntropyLoss):
        return checked(
            CrossEntropy(
                loss_func.reduction,
                loss_func.weight,
                loss_func.ignore_index,
                loss_func.label_smoothing,
            )
        )
    if isinstance(loss_func, nn.NLLLoss):
        return checked(
            NegativeLogLikelihood(loss_func.reduction, loss_func.weight, loss_func.ignore_index)
        )
    if isinstance(loss_func, nn.BCEWithLogitsLoss):
        return checked(Bernoulli(loss_func.reduction, loss_func.weight, loss_func.pos_weight))
    assert isinstance(loss_func, nn.MSELoss)
    return checked(SquaredError(loss_func.reduction))
