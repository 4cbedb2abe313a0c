"""docs/faults.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "faults.md").read_text()


def test_every_named_test_exists():
    source = "\n".join(path.read_text() for path in TESTS.glob("test_*.py"))
    names = set(re.findall(r"\btest_\w+\b(?!\.py)", PAGE))
    assert len(names) > 50
    assert {name for name in names if f"def {name}(" not in source} == set()
    files = set(re.findall(r"\btest_\w+\.py", PAGE))
    assert {name for name in files if not (TESTS / name).exists()} == set()
    assert "…" not in PAGE


def test_architecture_names_files_and_functions_that_exist():
    root = TESTS.parent
    page = (root / "ARCHITECTURE.md").read_text()
    paths = set(re.findall(r"`([\w/]+\.py)`", page))
    places = [root, root / "kfacopt", root / "kfacopt" / "optim"]
    assert len(paths) > 20
    assert {p for p in paths if not any((place / p).exists() for place in places)} == set()
    source = "\n".join(path.read_text() for path in (root / "kfacopt").rglob("*.py"))
    names = {name for found in re.findall(r"`([A-Za-z_.]+)`", page) for name in found.split(".")}
    names -= {"step", "kfacopt", "grad", ""}
    assert {n for n in names if not re.search(rf"\b{n}\b", source)} == set()
