"""A report as a picture; matplotlib is imported here, when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kfacopt.diagnosis.report import BLOCKS, EKFAC, GRADIENT, KFAC, OPTIMIZER, Diagnosis
from kfacopt.diagnosis.text import title_of

COLORS = {
    GRADIENT: "tab:gray",
    KFAC: "tab:blue",
    EKFAC: "tab:green",
    OPTIMIZER: "tab:red",
    BLOCKS: "black",
}


def draw(report: Diagnosis, path: str | Path | None) -> Any:
    """Draw distances, cosines and spectra; see `Diagnosis.plot`."""
    from matplotlib.figure import Figure

    height = max(4.0, 0.25 * len(report.layers) + 2)
    figure = Figure(figsize=(12, height + 3), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(height, 4))
    _by_layer(figure.add_subplot(grid[0, 0]), report, "distance")
    _by_layer(figure.add_subplot(grid[0, 1]), report, "cosine")
    for column, (side, title) in enumerate((("input_factor", "A"), ("grad_output_factor", "G"))):
        _spectra(figure.add_subplot(grid[1, column]), report, side, title)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _by_layer(axes: Any, report: Diagnosis, what: str) -> None:
    places = list(range(len(report.layers)))
    names = list(dict.fromkeys(n for layer in report.layers for n in getattr(layer, what)))
    for name in names:
        color = COLORS.get(name, "tab:orange")  # K-FAC with the other of expand and reduce
        values = [getattr(layer, what).get(name, float("nan")) for layer in report.layers]
        axes.plot(values, places, "o", label=name, markersize=5, color=color, alpha=0.8)
    axes.set_yticks(places, [title_of(layer.layer) for layer in report.layers])
    axes.invert_yaxis()
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    distance = "relative distance to the exact block"
    axes.set_xlabel(distance if what == "distance" else "cosine to the exact step's part")
    axes.grid(alpha=0.3)
    if names:
        axes.legend(fontsize="small")


def _spectra(axes: Any, report: Diagnosis, side: str, title: str) -> None:
    for layer in report.layers:
        factor = getattr(layer, side)
        values = [x for x in factor.eigenvalues if x > 0]
        count = len(factor.eigenvalues)
        if values:
            ranks = [i / max(count - 1, 1) for i in range(len(values))]
            axes.semilogy(ranks, values, linewidth=1, label=title_of(layer.layer))
    axes.set_xlabel(f"rank of the eigenvalue of {title}, from 0 to 1")
    axes.set_ylabel("eigenvalue")
    axes.grid(alpha=0.3)
    if 0 < len(report.layers) <= 8:
        axes.legend(fontsize="small")
