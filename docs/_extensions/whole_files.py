"""Pages that stand elsewhere in the repository are shown whole, with their links turned to here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

INCLUDE = re.compile(r"\A<!-- the whole of (\S+) -->\s*\Z")
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#:]+)(#[^)\s]*)?\)")


def _turned(text: str, file: Path, docs: Path, shown: dict[Path, str]) -> str:
    """Return a text whose links go to pages from where its file stands."""

    def turn(link: re.Match[str]) -> str:
        target = (file.parent / link[2]).resolve()
        anchor = link[3] or ""
        if target in shown:
            return f"{link[1]}{shown[target]}{anchor})"
        if target.parent == docs.parent / "examples":
            return f"{link[1]}gallery/{'index' if target.stem == 'README' else target.stem}.rst)"
        if file.parent == docs:
            return link[0]
        path = os.path.relpath(target, docs)
        here = link[1].startswith("!") or not path.startswith("..")
        return f"{link[1]}{'' if here else 'path:'}{path}{anchor if here else ''})"

    return LINK.sub(turn, text)


def _put_in(app: Any, docname: str, source: list[str]) -> None:
    docs = Path(app.srcdir)
    shown = {}
    for page in docs.glob("*.md"):
        whole = INCLUDE.match(page.read_text())
        if whole:
            shown[(docs / whole[1]).resolve()] = page.name
    file, found = docs / docname, INCLUDE.match(source[0])
    if found:
        file = (docs / found[1]).resolve()
        app.env.note_dependency(str(file))
        source[0] = file.read_text()
    if "/" not in docname:
        source[0] = _turned(source[0], file, docs, shown)


def setup(app: Any) -> dict[str, bool]:
    """Listen to pages as they are read."""
    app.connect("source-read", _put_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
