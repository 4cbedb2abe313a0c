"""Pictures of a comparison: curves, performance profile, sensitivity. Colours of all pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.problems import PROBLEMS
from benchmarks.scoring import MAX_RATIO, Outcome, profile

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS, DPI = 3, 110
WORST = 3.0  # times the metric before training
COLOURS = {  # of the contestants, in all pictures, in the order of legends
    "SGD": "C7",
    "AdamW": "C1",
    "Muon": "C2",
    "SOAP": "C0",
    "Shampoo": "C5",
    "K-FAC": "C3",
    "EKFAC": "C4",
    "L-BFGS": "C9",
    "K-FAC auto": "C6",
}
OTHER = "black"  # K-FAC with a setting


def style(name: str) -> dict[str, object]:
    """Return colour, width and label of a contestant's lines; ours are thicker."""
    width = 2.2 if "K-FAC" in name or "EKFAC" in name else 1.2
    return {"color": COLOURS.get(name, OTHER), "linewidth": width, "label": name}


def draw_curves(
    found: Mapping[str, Mapping[str, Outcome]], targets: Mapping[str, float], path: Path
) -> None:
    """Draw the metric over seconds of training, for each problem and contestant.

    The line is the run of the median best metric, so that it is a run that happened.

    Args:
        found: Outcomes by problem and contestant.
        targets: By problem.
        path: The picture's file.
    """
    rows = -(-len(found) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (problem, row) in zip(axes.flat, found.items(), strict=False):
        for name, outcome in row.items():
            run = sorted(outcome.runs, key=lambda r: r.best)[len(outcome.runs) // 2]
            curve = np.array(run.curve)
            axis.plot(curve[1:, 1], curve[1:, 2], **style(name))
        axis.axhline(targets[problem], color="black", linestyle=":", linewidth=1)
        axis.set(title=problem, ylabel=PROBLEMS[problem].metric, xlabel="seconds of training")
        axis.set_xscale("log")
        axis.set_yscale("log")
        first = max(outcome.runs[0].curve[0][2] for outcome in row.values())
        axis.set_ylim(top=min(axis.get_ylim()[1], WORST * first))  # what diverged ends there
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    shown = [name for name in COLOURS if name in lines]  # not all enter the first problem
    axes.flat[0].legend([lines[name] for name in shown], shown, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_profiles(ratios: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Draw performance profiles side by side.

    Args:
        ratios: By title, contestant and problem.
        path: The picture's file.
    """
    figure, axes = plt.subplots(1, len(ratios), figsize=(6 * len(ratios), 4), squeeze=False)
    taus = np.linspace(1, MAX_RATIO, 301)
    for axis, (title, by_contestant) in zip(axes.flat, ratios.items(), strict=True):
        for name, own in by_contestant.items():
            axis.step(taus, [profile(own, tau) for tau in taus], where="post", **style(name))
        axis.set(title=title, xlabel="τ, time to target / best", ylabel="ρ(τ)", ylim=(-0.02, 1.02))
    axes.flat[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_sensitivity(shares: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw the share of trials that reach the target, per contestant: mean and each problem.

    Args:
        shares: By contestant and problem.
        path: The picture's file.
    """
    figure, axis = plt.subplots(figsize=(7, 4))
    for place, (name, own) in enumerate(shares.items()):
        values = list(own.values())
        axis.bar(place, np.mean(values), color=COLOURS[name], alpha=0.6)
        spread = np.linspace(-0.3, 0.3, len(values))
        axis.plot(place + spread, values, "k.", markersize=4)
    axis.set_xticks(range(len(shares)), list(shares))
    axis.set_ylabel("share of trials that reach the target")
    axis.set_title("mean over problems; dots: each problem")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
