"""What is released: the archives' contents, and the wheel alone, outside of the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import kfacopt

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/quick_start.md"]
CAN_BUILD = find_spec("hatchling") is not None

pytestmark = pytest.mark.skipif(
    not CAN_BUILD and "CI" not in os.environ, reason="hatchling is not installed"
)

EVERY_NAME = """
import kfacopt, pathlib, sys
assert pathlib.Path(kfacopt.__file__).is_relative_to(sys.prefix), kfacopt.__file__
assert [name for name in kfacopt.__all__ if not hasattr(kfacopt, name)] == []
from kfacopt import *
print(kfacopt.__version__)
"""


def run(command, folder):
    """Run Python as a user does, without this checkout on its path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind, source, folder):
    run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)], source)
    (archive,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_has_the_package_its_types_and_the_licence_alone(wheel):
    assert wheel.name.startswith(f"kfacopt-{kfacopt.__version__}-py3-none-any")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"kfacopt-{kfacopt.__version__}.dist-info"
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kfacopt").rglob("*.py")}
    others = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert names == modules | others | {"kfacopt/py.typed"}


@pytest.mark.slow
def test_the_source_archive_has_the_tests_and_builds_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for folder in ("tests", "examples", "docs", "benchmarks"):
        there = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.py")}
        assert {p for p in there if "gallery" not in p.parts and not (source / p).exists()} == set()
    assert (source / "tests" / "states" / "0.1.0.pt").exists()
    assert (source / "constraints.txt").exists()
    (tmp_path / "again").mkdir()
    assert build("wheel", source, tmp_path / "again").read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_the_wheel_alone_runs_the_quick_start(wheel, tmp_path):
    home = tmp_path / "environment"
    # Without pip, and with this environment's packages, of which its own come first.
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    (own,) = home.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", str(wheel)], tmp_path)

    assert run([python, "-c", EVERY_NAME], tmp_path).strip() == kfacopt.__version__
    for name in [*PAGES, "tests/test_pages.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    pytest_run = [python, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    said = run([*pytest_run, "tests/test_pages.py", "-k", "python_in_pages"], tmp_path)
    assert f"{len(PAGES)} passed" in said
