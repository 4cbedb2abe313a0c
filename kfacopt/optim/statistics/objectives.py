"""The curvature of any scalar that is differentiated; that of known losses is in `collector`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge

from kfacopt.kfac.capture import would_be_pass
from kfacopt.likelihoods.graph_products import GraphPiece
from kfacopt.likelihoods.loss_parts import no_second_derivative
from kfacopt.likelihoods.parts import CurvaturePart, joint_vectors
from kfacopt.likelihoods.structure import KRYLOV_SAMPLES, find_parts
from kfacopt.optim.messages import log_objective
from kfacopt.optim.settings import CurvatureSettings
from kfacopt.optim.watch.forward_pass import ForwardPass
from kfacopt.optim.watch.objectives import Objective, Piece
from kfacopt.optim.watch.recorded_calls import ScalarTerm

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class FoundCurvature:
    """The curvature of an objective at tensors z, the outputs of models or of layers.

    Attributes:
        piece: The graph between the objective and z.
        numbers: Which of the piece's arrivals the tensors z are.
        gradients: ∂L/∂z.
        parts: The curvature.
        note: Why it is not that of a second derivative, if it is not.
    """

    piece: Piece
    numbers: Sequence[int]
    gradients: Sequence[Tensor]
    parts: Sequence[CurvaturePart]
    note: str = ""

    @property
    def edges(self) -> list[GradientEdge]:
        """Where backward passes from z to the layers start."""
        return [self.piece.arrivals[k].behind for k in self.numbers]

    @property
    def terms(self) -> Tensor:
        """The number of data, a scalar; not those whose targets are ignored."""
        counts = [_count_data(g, self.piece.ignored) for g in self.gradients]
        return torch.stack(counts).amax()

    def vectors(
        self, empirical: bool, settings: CurvatureSettings, generator: Generator
    ) -> Iterator[list[Tensor | None]]:
        """Yield v, one for each z, with Σ v vᵀ the curvature, or that on average.

        Args:
            empirical: Which parts count: those of the empirical Fisher, or the others.
            settings: Which curvature is collected.
            generator: Draws labels, or signs.
        """
        parts = [part for part in self.parts if part.empirical is empirical]
        if empirical and parts:  # as they are: data are told apart at the layers
            members = {k for part in parts for k in part.members}
            yield [g if k in members else None for k, g in enumerate(self.gradients)]
            return
        # Side by side they share passes; signs make their products vanish on average alone.
        alone = settings.fisher_type == "type-2"
        for own in [[part] for part in parts] if alone else [parts] if parts else []:
            drawn = (len(self.gradients), settings.fisher_type, settings.mc_samples, generator)
            for vectors in joint_vectors(own, *drawn):
                yield [
                    None if v is None else v.to(g.dtype)
                    for v, g in zip(vectors, self.gradients, strict=True)
                ]

    def product(self, vectors: Sequence[Tensor], loss_scale: float) -> list[Tensor]:
        """Return H⁺ v, one for each z, of the objective that was not multiplied.

        Args:
            vectors: v, likewise.
            loss_scale: What the objective was multiplied with.
        """
        products = [torch.zeros_like(v) for v in vectors]
        for part in self.parts:
            factor = self.terms / loss_scale**2 if part.empirical else 1 / loss_scale
            own = part.product([vectors[k] for k in part.members])
            for k, value in zip(part.members, own, strict=True):
                products[k] = products[k] + value * factor
        return products

    def term(self, objective: Objective, upstream: Tensor) -> ScalarTerm | None:
        """Return what evaluates the objective again; `None` if not all of it was recorded.

        Args:
            objective: The objective.
            upstream: The derivative that the backward pass started with.
        """
        arrivals = [self.piece.arrivals[k].source for k in self.numbers]
        sources = [source for source in arrivals if source is not None]
        if objective.source is None or objective.value is None or len(sources) < len(arrivals):
            return None
        at_z = (sources, self.gradients, self.product)
        return ScalarTerm(objective.source, objective.value, upstream, *at_z)

    def description(self) -> str:
        """Say what was found: the tensors z and the curvature of each part."""
        found = []
        for part in self.parts:
            shapes = [self.gradients[k].shape for k in part.members]
            found.append(f"{part.kind} at {' and '.join(map(_shape_in_words, shapes))}")
        return ", ".join(dict.fromkeys(found)) + (f" ({self.note})" if self.note else "")


def _count_data(gradient: Tensor, ignored: Sequence[Tensor]) -> Tensor:
    """Return how many rows of z are data; rows of ignored targets alone have no gradient.

    Args:
        gradient: ∂L/∂z.
        ignored: Which targets are ignored by losses, flat.
    """
    rows = gradient.shape[0] if gradient.ndim else 1
    total = torch.full((), float(rows), device=gradient.device)
    own = [x for x in ignored if rows and len(x) % rows == 0]
    if not own:
        return total
    live = (gradient != 0).reshape(rows, gradient.numel() // rows).any(1)
    count = live.sum()
    for x in own:  # rows may be 0 by accident, and in another order where there are more targets
        known = (live | ~x).sum() if len(x) == rows else rows - x.sum() * rows // len(x)
        count = torch.maximum(count, known)
    return count.to(total)


class ObjectiveLog:
    """What was differentiated so far, and which curvature was used for it.

    Attributes:
        curvature: For each objective its curvature, in words.
        partial: Whether one of them contained derivatives of the model beside terms that count.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.curvature: dict[str, str] = {}
        self._logged: set[tuple[str, str]] = set()
        self.partial = False

    def note_derived(self, found: FoundCurvature) -> None:
        """Take note of an objective that contains derivatives of the model."""
        self.partial = self.partial or bool(found.parts or found.piece.recognised)
        self.note(f"{found.piece.title}, of derivatives of the model", "not counted")

    def note_unseen(self, value: Tensor) -> None:
        """Take note of an objective of which nothing but gradients by outputs is known."""
        where = _shape_in_words(value.shape)
        self.note("unseen", f"empirical at {where} (between it and z tensors lost their kind)")

    def note(self, title: str, curvature: str) -> None:
        """Take note of an objective and its curvature, and log what was not logged before."""
        self.curvature[title] = curvature
        if (title, curvature) not in self._logged:
            self._logged.add((title, curvature))
            log_objective(title, curvature)


def curvature_of(
    objective: Objective, upstream: Tensor, settings: CurvatureSettings, seed: int
) -> FoundCurvature:
    """Find the curvature of an objective, but for the known losses that it contains.

    Args:
        objective: The scalar, whose graph is alive.
        upstream: The derivative that the backward pass starts with.
        settings: Which curvature is collected.
        seed: Seeds what wide blocks are multiplied with.

    Returns:
        The curvature; without parts if no output lies behind the scalar, but for known losses.
    """
    piece = objective.piece()
    if not piece.arrivals:
        return FoundCurvature(piece, [], [], [])
    given = (upstream, settings, seed)
    with would_be_pass(), retained_gradients_kept(objective.passes):
        found = _curvature_at(piece, *given)
        for part in found.parts:
            # One number, as of a loss that a model returns, has no data to count.
            single = found.gradients[part.members[0]].numel() == 1
            if not part.empirical or (settings.fisher_type == "empirical" and not single):
                continue
            deeper = piece.deeper(objective.passes, found.numbers[part.members[0]])
            inner = None if deeper is None else _curvature_at(deeper, *given)
            if inner is None or not inner.parts:
                continue
            if single or not any(p.empirical for p in inner.parts):
                return inner
    return found


def _curvature_at(
    piece: Piece, upstream: Tensor, settings: CurvatureSettings, seed: int
) -> FoundCurvature:
    edges = [arrival.edge for arrival in piece.arrivals]
    note = ""
    twice = settings.fisher_type != "empirical"
    cut = [*piece.recognised, *piece.ended, *(edge.node for edge in piece.derived)]
    graph, failure = _attempt(lambda: GraphPiece(piece.edge, edges, upstream, cut, twice))
    if graph is None:
        note = failure
        graph = GraphPiece(piece.edge, edges, upstream, cut, False)
    numbers = [k for k, g in enumerate(graph.gradients) if g is not None]
    if not numbers:
        return FoundCurvature(piece, [], [], [])
    gradients = [g for g in graph.gradients if g is not None]
    arrivals = [piece.arrivals[k] for k in numbers]
    values = [a.known_value() if twice and not note else a.value for a in arrivals]

    def product(vectors: list[Tensor]) -> list[Tensor]:
        full: list[Tensor | None] = [None] * len(edges)
        for k, vector in zip(numbers, vectors, strict=True):
            full[k] = vector
        products = graph.product(full)
        return [products[k] for k in numbers]

    exact = settings.fisher_type == "type-2"
    count = KRYLOV_SAMPLES if exact else settings.mc_samples
    parts = None
    if twice and not note:
        options = (count, exact, seed)
        parts, note = _attempt(lambda: find_parts(values, gradients, product, *options))
        unknown = parts is not None and any(part.kind == "not finite" for part in parts)
        if unknown and all(bool(g.isfinite().all()) for g in gradients):  # as of |z| at z = 0
            parts, note = None, "its second derivative is not finite"
    if parts is None:
        parts = find_parts(values, gradients, None)
    return FoundCurvature(piece, numbers, gradients, parts, note)


def _shape_in_words(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, ('N', *shape[1:])))})"


def _attempt(function: Callable[[], T]) -> tuple[T | None, str]:
    """Return what a function of ours returns, or `None` and why there is no second derivative.

    The user's own backward pass may do without one: whatever a function on the way raises when it
    is asked for it, training goes on.
    """
    try:
        return function(), ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return None, no_second_derivative(error)


@contextmanager
def retained_gradients_kept(passes: Sequence[ForwardPass]) -> Iterator[None]:
    """Let `.grad` of tensors on which `retain_grad` was called be what it was."""
    with torch._C.DisableTorchFunctionSubclass():
        probed = [t for p in passes for t in p.probed_tensors() if t.retains_grad]
        kept = [(t, t.grad) for t in probed]
        for t in probed:
            t.grad = None
    try:
        yield
    finally:
        with torch._C.DisableTorchFunctionSubclass():
            for t, grad in kept:
                t.grad = grad
