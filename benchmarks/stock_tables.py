"""The results of the stock architectures as tables."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.step_tables import markdown

ENOUGH = 0.9  # of the entries of matrices
HEADER = ["", "parameters", "preconditioned", "loss", "K-FAC", "AdamW 1e-3", "1e-2", "state"]


def _loss(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def _left(result: dict[str, Any]) -> str:
    parts = sorted(result["left"].items(), key=lambda item: -item[1])
    return "; ".join(f"{why} {100 * n / result['matrices']:.2g} %" for why, n in parts)


def _left_out(results: list[dict[str, Any]]) -> str:
    """Return the reasons as a list, each line with the architectures that have them."""
    lines = [f"- {r['name']}: {_left(r)}" for r in results if not r["error"] and r["left"]]
    return "Left to AdamW, and why:\n\n" + "\n".join(lines) if lines else ""


def row(result: dict[str, Any]) -> list[str]:
    """Return an architecture's row."""
    if result["error"]:
        return [result["name"], "", result["error"], *[""] * 5]
    share = f"{100 * result['share']:.1f} %"
    return [
        result["name"],
        f"{result['parameters']:,}".replace(",", " "),
        share if result["share"] >= ENOUGH else f"**{share}**",
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


def _wheres(results: list[dict[str, Any]]) -> str:
    """Return of what versions rows are, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for result in results:
        where = result["environment"]
        packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
        text = (
            f"{where['date']}, kfacopt {where['version']} at {(where['commit'] or '?')[:9]}, torch "
            f"{where['torch']}, {packages}, {where['device']}"
        )
        groups.setdefault(text, []).append(result["name"])
    first, *others = sorted(groups, key=lambda text: -len(groups[text]))
    common = [part for part in first.split(", ") if all(part in t.split(", ") for t in others)]
    parts = [f"Rows are of {first}"]
    for text in others:
        differs = ", ".join(part for part in text.split(", ") if part not in common)
        parts.append(f"{'; '.join(groups[text])} of {differs or text}")
    return ". ".join(parts) + "."


def tables(content: dict[str, Any]) -> str:
    """Return a summary, a table for each package, and the warnings.

    Args:
        content: Of the file of results.
    """
    results = list(content["results"].values())
    parts = [f"{summary(results)} {_wheres(results)}"]
    for package in dict.fromkeys(r["package"] for r in results):
        own = [r for r in results if r["package"] == package]
        parts += [f"### {package}", markdown(HEADER, [row(r) for r in own]), _left_out(own)]
    said = [f"- {r['name']}: {text}" for r in results for text in r.get("warnings", ())]
    parts += ["### Warnings", "\n".join(said)] if said else []
    return "\n\n".join(part for part in parts if part)
