"""Pages name what exists: tests, files, functions, settings."""

import inspect
import re
from pathlib import Path

from kfacopt import KFACOptimizer
from kfacopt.optim.settings import GROUP_SETTINGS, WHOLE_SETTINGS

TESTS = Path(__file__).parent
PAGES = {path.name: path.read_text() for path in (TESTS.parent / "docs").glob("*.md")}


def test_every_named_test_exists():
    source = "\n".join(path.read_text() for path in TESTS.glob("test_*.py"))
    text = "\n".join(PAGES.values())
    names = set(re.findall(r"(?<![-\w])test_\w+\b(?!\.py)", text))
    assert len(names) > 50
    assert {name for name in names if f"def {name}(" not in source} == set()
    files = set(re.findall(r"\btest_\w+\.py", text))
    assert {name for name in files if not (TESTS / name).exists()} == set()
    assert "…" not in PAGES["faults.md"]


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


def test_the_table_of_settings_is_that_of_the_constructor_and_its_docs():
    signature = inspect.signature(KFACOptimizer).parameters
    assert {*GROUP_SETTINGS, *WHOLE_SETTINGS} == set(signature) - {"params"}
    may_set = re.search(r"Groups\s+may set (.*?)\.\s", KFACOptimizer.__doc__, re.DOTALL).group(1)
    assert set(re.findall(r"`(\w+)`", may_set)) == set(GROUP_SETTINGS)
