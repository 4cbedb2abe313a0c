"""The results of the stock architectures as tables."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.step_tables import markdown

ENOUGH = 0.9  # of the entries of matrices
HEADER = ["", "parameters", "preconditioned", "not, and why", "loss", "K-FAC", "AdamW 1e-3"]
HEADER += ["1e-2", "state"]


def _loss(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def _left(result: dict[str, Any]) -> str:
    parts = sorted(result["left"].items(), key=lambda item: -item[1])
    return "; ".join(f"{why}: {100 * n / result['matrices']:.2g} %" for why, n in parts)


def row(result: dict[str, Any]) -> list[str]:
    """Return an architecture's row."""
    if result["error"]:
        return [result["name"], "", "", result["error"], *[""] * 5]
    share = f"{100 * result['share']:.1f} %"
    return [
        result["name"],
        f"{result['parameters']:,}".replace(",", " "),
        share if result["share"] >= ENOUGH else f"**{share}**",
        _left(result),
        *(_loss(x) for x in (result["first"], result["last"], *result["adamw"])),
        f"{result['state']:.1f}",
    ]


def summary(results: list[dict[str, Any]]) -> str:
    """Return how many do what they should."""
    run = [r for r in results if not r["error"]]
    falls = sum(r["last"] < r["first"] for r in run)
    enough = sum(r["share"] >= ENOUGH for r in run)
    silent = sum(not r["warnings"] for r in run)
    return (
        f"{len(results)} architectures: {len(results) - len(run)} raise an error, in {falls} the "
        f"loss falls, {silent} train without a warning, and in {enough} at least "
        f"{100 * ENOUGH:.0f} % of the entries of matrices are preconditioned."
    )


def tables(content: dict[str, Any]) -> str:
    """Return a summary, a table for each package, and the warnings.

    Args:
        content: Of the file of results.
    """
    results, where = list(content["results"].values()), content["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    parts = [
        f"{summary(results)} {where['date']}, kfacopt {where['version']} at "
        f"{(where['commit'] or '?')[:9]}, torch {where['torch']}, {packages}, {where['device']}."
    ]
    for package in dict.fromkeys(r["package"] for r in results):
        own = [r for r in results if r["package"] == package]
        parts += [f"### {package}", markdown(HEADER, [row(r) for r in own])]
    said = [f"- {r['name']}: {text}" for r in results for text in r.get("warnings", ())]
    return "\n\n".join(parts + (["### Warnings", "\n".join(said)] if said else []))
