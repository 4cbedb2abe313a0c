"""Say on the examples' pages that their pictures come from a smoke run, where they do."""

from __future__ import annotations

import re
from typing import Any

NOTE = """
.. note::

   These pages were built with ``--quick``: the numbers and pictures are those of a smoke run of
   seconds, which proves that the script works and nothing else. ``python -m sphinx -t full
   docs build/docs`` runs the examples in full. What was measured is in :doc:`/results`.
"""


def _add_note(app: Any, docname: str, source: list[str]) -> None:
    if re.match(r"gallery/\d", docname) and not app.tags.has("full"):
        source[0] = re.sub(r"\n(={4,})\n", lambda m: f"\n{m[1]}\n{NOTE}\n", source[0], count=1)


def setup(app: Any) -> dict[str, bool]:
    """Listen to pages as they are read."""
    app.connect("source-read", _add_note)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
