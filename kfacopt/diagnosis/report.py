"""What `kfacopt.diagnose` returns, as data and as text; nothing is computed from tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kfacopt.diagnosis import text

GRADIENT, KFAC, EKFAC = "gradient", "K-FAC", "EKFAC"
OPTIMIZER, CLIPPED, BLOCKS = "optimizer", "clipped step", "exact blocks"
# A factor lacks rank where it has less than that share of its directions.
FULL = 0.9


@dataclass(frozen=True)
class SampleReport:
    """What was looked at.

    Attributes:
        num_batches: How many batches.
        num_data: How many data; `None` if the batches do not tell.
        held_out: Whether there were further data to try steps on.
        operations: About how many multiplications a forward pass takes.
        fisher_type: Of K-FAC and EKFAC.
        mc_samples: How many labels were drawn for each datum.
        seed: Of labels and probes.
        num_parameters: How many entries θ has: the parameters that K-FAC covers.
    """

    num_batches: int
    num_data: int | None
    held_out: bool
    operations: int
    fisher_type: str
    mc_samples: int
    seed: int
    num_parameters: int


@dataclass(frozen=True)
class FactorReport:
    """A Kronecker factor; what is `None` was not computed, as the factor is too wide.

    Attributes:
        side: d.
        groups: B, of independent blocks; eigenvalues are those of all.
        diagonal: Whether it is kept as its diagonal.
        mean: The mean eigenvalue, tr / d.
        damping: What is added to it, with factored damping; the mean over groups.
        rank: How many eigenvalues are not 0, but for round-off.
        largest: The largest eigenvalue.
        smallest: The smallest one.
        condition: Their ratio, in the worst group (of groups with one entry, over all); infinite if
            the rank is not full.
        damped_condition: The same with the damping.
        eigenvalues: At most 64, from the largest to the smallest, at equally spaced ranks.
        zeros: How many entries of its diagonal are 0: inputs that are always 0 (of A), outputs
            without any gradient (of G).
        blind: Whether it maps constants to 0, as cross entropy's G of logits does.
        rank_of_half: The rank of half of the data, where the rank is below 0.9 B d and that could
            be measured.
    """

    side: int
    groups: int
    diagonal: bool
    mean: float
    damping: float | None = None
    rank: int | None = None
    largest: float | None = None
    smallest: float | None = None
    condition: float | None = None
    damped_condition: float | None = None
    eigenvalues: tuple[float, ...] = ()
    zeros: int = 0
    blind: bool = False
    rank_of_half: int | None = None

    @property
    def full_rank(self) -> int:
        """B d."""
        return self.side * self.groups

    @property
    def lacks_rank(self) -> bool:
        """Whether directions are missing."""
        return self.rank is not None and self.rank < FULL * self.full_rank


@dataclass(frozen=True)
class DampingReport:
    """δ beside the spectrum of G ⊗ A.

    Attributes:
        damping: δ.
        pi: π of the split √δ/π and π√δ; `None` for exact damping.
        relative: δ over the mean eigenvalue of G ⊗ A.
        share_below: The share of the eigenvalues of G ⊗ A that are below δ.
        effective_dimension: Σ λ / (λ + δ) over these.
    """

    damping: float
    pi: float | None
    relative: float
    share_below: float
    effective_dimension: float


@dataclass(frozen=True)
class RunningReport:
    """What the optimizer keeps of a block.

    Attributes:
        drift: ‖Ḡ ⊗ Ā − G ⊗ A‖_F / ‖G ⊗ A‖_F, to the factors of the sample; `None` for EKFAC.
        condition: Of the damped curvature.
        factor_age: Steps since the factors were updated.
        inverse_age: Steps since the inverse was.
        input_factor: Ā; `None` for EKFAC.
        grad_output_factor: Ḡ; `None` for EKFAC.
    """

    drift: float | None
    condition: float
    factor_age: float
    inverse_age: float
    input_factor: FactorReport | None
    grad_output_factor: FactorReport | None


@dataclass(frozen=True)
class LayerReport:
    """A diagonal block of the GGN: a layer, or its weight or bias.

    Attributes:
        layer: Its name.
        size: How many parameters it has.
        estimator: How its exact block was measured: `"formed"`, `"16 probes"`, `"not measured"`.
        distance: By candidate ‖M − F‖_F / ‖F‖_F.
        distance_error: The standard errors; 0 where the block was formed.
        cosine: By step the cosine of its part to the exact step's.
        gradient_share: The share of the squared gradient.
        block_solve: How the exact block's step was found.
        input_factor: A.
        grad_output_factor: G.
        damping: δ beside both.
        running: What the optimizer keeps of it.
    """

    layer: str
    size: int
    estimator: str
    distance: dict[str, float]
    distance_error: dict[str, float]
    cosine: dict[str, float]
    gradient_share: float
    block_solve: SolveReport | None
    input_factor: FactorReport
    grad_output_factor: FactorReport
    damping: DampingReport
    running: RunningReport | None


@dataclass(frozen=True)
class StepReport:
    """A direction d beside the exact damped step; its length is that which its model likes best.

    The optimizer's clipped step alone has the length that the optimizer gives it: lr ν Δ, without
    momentum.

    Attributes:
        step: What it is.
        cosine: To the exact step; NaN where that was not found.
        decrease: The share of the best decrease of the damped quadratic model; likewise.
        ratio: What the loss of the sample falls by, over what the undamped model says.
        held_out_ratio: What the loss of the held-out data falls by, over the same.
        length: Its length, over that which its model likes best.
    """

    step: str
    cosine: float
    decrease: float
    ratio: float
    held_out_ratio: float | None
    length: float = 1.0


@dataclass(frozen=True)
class CostReport:
    """What a step costs, on the first batch, in forward and backward passes of the model.

    Steps are those of copies of model and optimizer.

    Attributes:
        pass_seconds: What a forward and a backward pass take; CPU time, or time on the GPU.
        step: What a step takes on average, its passes included, over those that pass.
        plain: What steps take where nothing is due; `None` where something always is.
        factors: What those take in which factors are updated and inverses are not; `None` if none.
        inverses: What those take in which factors are updated and inverses are renewed.
        adamw: What a step of AdamW takes.
    """

    pass_seconds: float
    step: float
    plain: float | None
    factors: float | None
    inverses: float
    adamw: float


@dataclass(frozen=True)
class SolveReport:
    """How the exact damped step was computed.

    Attributes:
        method: `"solved"` for a dense matrix, or `"CG"`.
        iterations: How many.
        residual: ‖g − (F + δI) x‖ / ‖g‖.
        converged: Whether that is below the tolerance.
        halfway: The cosine of the iterate after about half the iterations to the last one.
        enough_seconds: The `max_seconds` that would let all iterations run, if time ended them.
    """

    method: str
    iterations: int
    residual: float
    converged: bool
    halfway: float
    enough_seconds: float | None = None


@dataclass(frozen=True)
class OutsideReport:
    """The share of the GGN outside of its diagonal blocks, 1 − Σ_l ‖F_ll‖²_F / ‖F‖²_F.

    Attributes:
        share: The share.
        error: Its standard error; 0 if the matrix was formed.
    """

    share: float
    error: float


@dataclass(frozen=True)
class Advice:
    """A sentence that follows from a number.

    Attributes:
        topic: What it is about, in a word or two.
        sentence: The sentence, with the number.
        value: The number.
        layers: The layers that it is about; empty for the whole.
    """

    topic: str
    sentence: str
    value: float
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """K-FAC beside the exact GGN, on a sample of data; `print` shows it as tables.

    Attributes:
        loss: The loss of the sample.
        gradient_norm: The norm of its gradient by θ.
        settings: How K-FAC was set: `kfac_approx`, `damping_method`, and with an optimizer its
            `preconditioner` and intervals.
        sample: What was looked at.
        solve: How the exact step was looked for; `None` if there is none.
        steps: Directions beside it.
        layers: The diagonal blocks.
        outside: The share of curvature outside of these; `None` if it was not measured.
        uncovered: The names of trained parameters that are not in θ, with the reason.
        uncovered_share: Their share of all trained entries.
        notes: What was left out or cut short, and how the model was evaluated.
        advice: What follows.
        seconds: How long it took.
        cost: What a step costs; `None` without an optimizer, and where it was not measured.
        fallback_lr: At which AdamW trains those of the uncovered parameters that are the
            optimizer's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import kfacopt
        >>> _ = torch.manual_seed(0)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> report = kfacopt.diagnose(nn.Linear(4, 3), nn.CrossEntropyLoss(), data, damping=0.01)
        >>> [layer.layer for layer in report.layers], report.uncovered
        ([''], {})
    """

    loss: float
    gradient_norm: float
    settings: dict[str, Any]
    sample: SampleReport
    solve: SolveReport | None
    steps: tuple[StepReport, ...]
    layers: tuple[LayerReport, ...]
    outside: OutsideReport | None
    uncovered: dict[str, str]
    uncovered_share: float
    notes: tuple[str, ...]
    advice: tuple[Advice, ...]
    seconds: float
    cost: CostReport | None = None
    fallback_lr: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as dictionaries, lists, strings and numbers."""
        return {k: _plain(v) for k, v in asdict(self).items()}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw distances, cosines and spectra.

        Args:
            path: Where to save the picture, if anywhere.

        Returns:
            The `matplotlib` figure.

        Raises:
            ImportError: If `matplotlib` is not installed.
        """
        from kfacopt.diagnosis.picture import draw

        return draw(self, path)

    def __str__(self) -> str:
        """Return the tables and the advice."""
        return text.of(self)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    return [_plain(v) for v in x] if isinstance(x, list | tuple) else x
