"""The library's docstrings are written to be read in a terminal; here they become reStructuredText.

An indented block behind a paragraph is a formula or code, and must look as it stands there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SECTIONS = {
    *("Args:", "Attributes:", "Example:", "Examples:", "Note:", "Raises:", "References:"),
    *("Returns:", "Yields:", "Warns:"),
}


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_literal(block: list[str]) -> bool:
    """Tell whether an indented block is more than a list or a doctest, which Sphinx knows."""
    return not re.match(r"\s*(>>>|- |\* |\d+\. |\.\. )", block[0])


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield the lines in groups: empty ones, and runs between them."""
    group: list[str] = []
    for line in lines:
        if not line.strip():
            if group:
                yield group
            yield [""]
            group = []
        else:
            group.append(line)
    if group:
        yield group


def escaped(line: str) -> str:
    """Escape what stands for absolute values, and is no code or doctest."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else p.replace("|", r"\|") for p in parts)


def literal_blocks(lines: list[str]) -> list[str]:
    """Mark indented blocks outside of sections as literal ones."""
    found: list[str] = []
    before = ""  # the last line that is not empty
    inside = False  # a literal block that goes on over an empty line
    for block in _blocks(lines):
        if block == [""]:
            found.append("")
            continue
        indented = all(_indent(line) >= 4 for line in block)
        if indented and (inside or (before and not _indent(before) and before not in SECTIONS)):
            if not inside and _is_literal(block):
                language = "python" if all(line.isascii() for line in block) else "text"
                found += [f".. code-block:: {language}", ""]
                inside = True
            found += block if inside else [escaped(line) for line in block]
            continue
        inside = False
        found += [escaped(line) for line in block]
        before = block[-1] if not _indent(block[-1]) else before
        if block[0] in SECTIONS:
            before = block[0]
    return found


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = literal_blocks(lines)


def setup(app: Any) -> dict[str, bool]:
    """Listen before napoleon does."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
