"""The curves of the comparison in equal time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.equal_time_tables import Row, last_loss, mean_loss
from benchmarks.figures import plt, style

COLUMNS, DPI = 4, 90
WORST = 1.5  # times the loss before training


def draw(given: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Draw training losses over CPU seconds: of each contestant at its best rate, the median run.

    Args:
        given: The problems.
        names: The contestants.
        path: The picture's file.
    """
    lines = -(-len(given) // COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(4 * COLUMNS, 3.1 * lines), squeeze=False)
    for axis in axes.flat[len(given) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, given, strict=False):
        lowest, first = np.inf, -np.inf
        for name in names:
            if name not in row.runs:
                continue
            runs = sorted(row.lowest(name, mean_loss), key=last_loss)
            curve = np.array(runs[len(runs) // 2]["curve"])
            if len(curve):
                axis.plot(curve[:, 1], curve[:, 2], **style(name))
                finite = curve[np.isfinite(curve[:, 2]), 2]
                lowest, first = min(lowest, finite.min()), max(first, finite[0])
        axis.axhline(row.target, color="black", linestyle=":", linewidth=1)
        axis.set_title(row.problem)
        if lowest > 0:
            axis.set_yscale("log")
            axis.set_ylim(top=min(axis.get_ylim()[1], WORST * first))
    handles = {h.get_label(): h for a in axes.flat for h in a.get_legend_handles_labels()[0]}
    axes.flat[0].legend(list(handles.values()), list(handles), fontsize="x-small")
    figure.supxlabel("CPU seconds of training")
    figure.supylabel("training loss")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
