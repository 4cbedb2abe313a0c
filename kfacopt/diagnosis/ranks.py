"""Whether more data would fill the rank of factors: that of half of the data is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kfacopt.data import Batch
from kfacopt.diagnosis.candidates import factors_of
from kfacopt.diagnosis.report import LayerReport
from kfacopt.diagnosis.sample import divide, size_of
from kfacopt.diagnosis.spectra import spectrum_of
from kfacopt.diagnosis.subject import Subject
from kfacopt.linalg.kronecker import dense

SIDES = ("input_factor", "grad_output_factor")


def half_of(batches: Sequence[Batch]) -> list[Batch] | None:
    """Return the first half of the data; `None` if there is none, or if they cannot be cut."""
    sizes = [size_of(batch) for batch in batches]
    known = [n for n in sizes if n is not None]
    if len(known) < len(sizes) or sum(known) < 2:
        return None
    return divide(batches, len(batches), sum(known) // 2).batches


def with_ranks_of_half(
    subject: Subject, layers: tuple[LayerReport, ...]
) -> tuple[LayerReport, ...]:
    """Return the layers, those that lack rank with the ranks that half of the data have.

    Nothing is measured where no factor lacks any, or where there is no time left.
    """
    lacking = [any(getattr(x, side).lacks_rank for side in SIDES) for x in layers]
    if not any(lacking):
        return layers
    batches = half_of(subject.sample.batches)
    if batches is None:
        return layers
    if subject.clock.is_past():
        subject.clock.cut.append("ranks of half of the data")
        return layers
    given = (subject.model, subject.loss_func, batches)
    matrices = factors_of(subject.options.approx, subject.partition, given, subject.options)
    found = []
    for layer, matrix, lacks in zip(layers, matrices, lacking, strict=True):
        factors = (dense(matrix.input_factor), dense(matrix.grad_output_factor))
        new = {}
        for side, factor in zip(SIDES, factors, strict=True):
            own = getattr(layer, side)
            spectrum = spectrum_of(factor) if lacks and own.lacks_rank else None
            if spectrum is not None:
                new[side] = replace(own, rank_of_half=int((~spectrum[1]).sum()))
        found.append(replace(layer, **new))
    return tuple(found)
