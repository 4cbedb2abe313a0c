"""Every example runs, in its quick form, as its command line would start it."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("[0-9]*.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::lightning.*")  # theirs
@pytest.mark.parametrize("path", EXAMPLES, ids=[p.stem for p in EXAMPLES])
def test_example(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", "--output", str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    pictures = list(tmp_path.glob("*.png"))
    assert pictures
    assert all(p.stat().st_size > 10_000 for p in pictures)
