"""Draw the README's picture from the comparison's results.

    python -m benchmarks.overview [--output FILE]

Left, on how many problems a contestant is within a factor of the fastest; then the curves of a
problem that K-FAC wins and of one that it loses. No run is made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.compare import RESULTS
from benchmarks.contestants import all_contestants
from benchmarks.figures import plt, style
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import Comparison, Options
from benchmarks.scoring import MAX_RATIO, outcome, profile

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "time_to_target.png"
PALETTE = 64  # a small file
SHOWN = ("AdamW", "Muon", "SOAP", "K-FAC")
CURVES = {
    "friedman-small": (
        "a win: regression, Friedman's function",
        "error on other data",
        (0.01, None),
    ),
    "pinn-heat": ("a loss: PINN, heat equation", "relative error", (0.03, None)),
}


def draw(folder: Path, path: Path) -> None:
    """Draw the picture.

    Args:
        folder: Of the comparison's results.
        path: The picture's file.
    """
    summary = json.loads((folder / "summary.json").read_text())["scores"]
    ratios = summary["tuned, ratios to the best"]
    chosen = json.loads((folder / "sessions.json").read_text())[-1]["options"]
    sizes = {key: chosen[key] for key in ("trials", "seeds", "scale")}
    comparison = Comparison(Options(folder, tuple(CURVES), SHOWN, **sizes), map)
    figure, axes = plt.subplots(1, 1 + len(CURVES), figsize=(10, 2.9))
    factors = np.linspace(1, MAX_RATIO, 301)
    for name in SHOWN:
        own = {p: np.inf if r is None else r for p, r in ratios[name].items()}
        shares = [100 * profile(own, factor) for factor in factors]
        axes[0].step(factors, shares, where="post", **style(name))
    axes[0].set(
        title="share of problems at the target", ylabel="%", xlabel="time / the fastest's time"
    )
    axes[0].set_ylim(-3, 103)
    for axis, (problem, (title, label, (left, right))) in zip(
        axes[1:], CURVES.items(), strict=True
    ):
        for name in SHOWN:
            found = outcome(comparison, problem, all_contestants()[name], tuned=True)
            assert found is not None, f"{problem}: runs of {name} are missing in {folder}"
            run = sorted(found.runs, key=lambda r: r.best)[len(found.runs) // 2]
            curve = np.array(run.curve)
            axis.loglog(curve[1:, 1], curve[1:, 2], **style(name))
        axis.axhline(comparison.target(problem)["value"], color="black", linestyle=":", linewidth=1)
        axis.set(title=title, ylabel=label, xlabel="seconds of training")
        axis.set_xlim(left, right or PROBLEMS[problem].budget)
    axes[1].legend(fontsize="small", frameon=False)
    for axis in axes:
        axis.title.set_fontsize("medium")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=PICTURE, help="the picture's file")
    path = parser.parse_args(arguments).output
    draw(RESULTS / "compare", path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
