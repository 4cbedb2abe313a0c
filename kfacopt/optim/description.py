"""What an optimizer does with each objective and parameter, as a table; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from torch.nn import Parameter

from kfacopt.kfac.layers import Block, Layer
from kfacopt.linalg.low_rank import is_low_rank
from kfacopt.optim.state.curvature_state import CurvatureState


@dataclass(frozen=True)
class DescribedObjective:
    """An objective that was differentiated.

    Attributes:
        objective: The known loss, or the first operations on the way back from the scalar.
        curvature: What was used for it, and at which tensors.
    """

    objective: str
    curvature: str


@dataclass(frozen=True)
class DescribedParameter:
    """A parameter and what preconditions its gradient.

    Attributes:
        parameter: Its name.
        shape: Its shape.
        layer: The layer that it belongs to, or `""`.
        curvature: `"Kronecker 32 × 11"`, or `"AdamW: ..."` with the reason.
        preconditioned: Whether it has curvature.
        state_bytes: What the optimizer keeps for it; factors count for a layer's first parameter.
        fallback_lr: The rate at which AdamW trains it, before a schedule scales it; `None` for what
            has curvature or is frozen.
    """

    parameter: str
    shape: tuple[int, ...]
    layer: str
    curvature: str
    preconditioned: bool
    state_bytes: int
    fallback_lr: float | None = None

    @property
    def treatment(self) -> str:
        """What the table says: the curvature, or the rate of AdamW and the reason."""
        if self.fallback_lr is None:
            return self.curvature
        return self.curvature.replace("AdamW", f"AdamW at {self.fallback_lr:g}", 1)


@dataclass(frozen=True)
class Description:
    """What `KFACOptimizer.describe` returns; `print` shows it as a table.

    Attributes:
        objectives: Each objective that was differentiated on a step with due factors.
        parameters: Each parameter.
        preconditioned_share: The share of all entries of matrices, but frozen ones, that have
            curvature.
        parameter_bytes: Of all parameters.
        state_bytes: Of the optimizer's state.
    """

    objectives: tuple[DescribedObjective, ...]
    parameters: tuple[DescribedParameter, ...]
    preconditioned_share: float
    parameter_bytes: int
    state_bytes: int

    def to_dict(self) -> dict[str, object]:
        """Return the same as dictionaries, lists, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the tables."""
        parts = []
        if self.objectives:
            rows = [(x.objective, x.curvature) for x in self.objectives]
            parts.append(_table(("objective", "curvature"), rows))
        own = [
            (p.parameter, _product(p.shape), p.layer, p.treatment, _size(p.state_bytes))
            for p in self.parameters
        ]
        parts.append(_table(("parameter", "shape", "layer", "curvature", "state"), own))
        ratio = self.state_bytes / max(self.parameter_bytes, 1)
        parts.append(
            f"{100 * self.preconditioned_share:.1f} % of the entries of trained matrices are "
            f"preconditioned; state {_size(self.state_bytes)}, {ratio:.1f} bytes for each byte of "
            "parameters"
        )
        return "\n\n".join(parts)


def describe(
    params: Sequence[Parameter],
    names: Mapping[int, str],
    curvature: CurvatureState,
    objectives: Mapping[str, str],
    undercounted: set[Layer],
    left_out: Mapping[int, str],
    reasons: Mapping[Parameter, str],
    rates: Mapping[Parameter, float],
) -> Description:
    """Return what an optimizer does with each objective and parameter.

    Args:
        params: The parameters.
        names: Their names by their `id`.
        curvature: Has the layers and the state.
        objectives: Objectives and their curvature.
        undercounted: Layers whose weights are used otherwise, too.
        left_out: Kinds of modules that are not among `layers=`, by the `id`s of their parameters.
        reasons: Why parameters are no layers by their entries.
        rates: At which AdamW trains those without curvature.
    """
    block_of = {p: block for block in curvature.blocks for p in block.parameters}
    rows = []
    for p in params:
        block, state = block_of.get(p), curvature.entries.get(p, {})
        text = _curvature(p, block, curvature, undercounted, left_out, reasons.get(p))
        layer = "" if block is None else block.layer.name
        size = sum(_bytes(x) for x in state.values() if isinstance(x, Tensor))
        active = not text.startswith("AdamW")
        rate = None if active or not p.requires_grad else rates[p]
        row = DescribedParameter(names[id(p)], tuple(p.shape), layer, text, active, size, rate)
        rows.append(row)
    matrices = [
        (p.numel(), row.preconditioned)
        for p, row in zip(params, rows, strict=True)
        if p.ndim > 1 and p.requires_grad
    ]
    total = sum(count for count, _ in matrices)
    share = sum(count for count, active in matrices if active) / total if total else 0.0
    return Description(
        tuple(DescribedObjective(*item) for item in objectives.items()),
        tuple(rows),
        share,
        sum(_bytes(p) for p in params),
        sum(row.state_bytes for row in rows),
    )


def _curvature(
    p: Parameter,
    block: Block | None,
    curvature: CurvatureState,
    undercounted: set[Layer],
    left_out: Mapping[int, str],
    reason: str | None,
) -> str:
    if not p.requires_grad:
        return "AdamW: frozen"
    if block is None and id(p) in left_out:
        return f"AdamW: {left_out[id(p)]} is not among layers="
    if block is None:
        past = "past the layers' modules; nn.Parameter among layers= may have it"
        unknown = past if p.ndim < 2 else "in no layer that K-FAC knows"
        return f"AdamW: {reason or unknown}"
    if block.layer in undercounted and reason is not None:
        return f"AdamW: {reason}"
    if block.layer in undercounted:
        return "AdamW: used in other ways than by calls of its module, too"
    if not curvature.has_statistics(block.layer):
        return "AdamW: no curvature so far"
    if block.layer.family.elementwise:
        return f"diagonal of the Fisher, {block.layer.groups}"
    groups = f"{block.layer.groups} × " if block.layer.groups > 1 else ""
    state = curvature.entries[block.layer.anchor]
    sides = []
    for side, width in (("grad_output_factor", block.layer.d_out), ("input_factor", block.d_in)):
        sides.append(
            f"{width}{_form(state[side])}{_split(block) if side == 'input_factor' else ''}"
        )
    return f"Kronecker {groups}{' × '.join(sides)}"


def _form(kept: Tensor) -> str:
    """Return what is kept of a factor, if it is not all of it."""
    if is_low_rank(kept):
        return f" (rank {kept.shape[-1] - 1} + diagonal)"
    return " (diagonal)" if kept.ndim == 2 else ""


def _split(block: Block) -> str:
    """Return how a block's A is split, if it is."""
    layer = block.layer
    if block.weight is None or not layer.positions:
        return ""
    bias = " + 1" if layer.joint else ""
    return f" ({layer.channels} channels × {layer.positions} positions{bias})"


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def _product(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) if shape else "scalar"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
