"""Every example runs, in its quick form, as a user would start it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("[0-9]*.py"))
TIME_LIMIT = 180


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=[p.stem for p in EXAMPLES])
def test_example(path, tmp_path):
    command = [sys.executable, str(path), "--quick", "--output", str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert result.returncode == 0, result.stderr
    pictures = list(tmp_path.glob("*.png"))
    assert pictures
    assert all(p.stat().st_size > 10_000 for p in pictures)
