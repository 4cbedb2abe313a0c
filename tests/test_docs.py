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
