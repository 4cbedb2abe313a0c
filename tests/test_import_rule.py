"""The folders are layers: each imports only from those above it (design.md)."""

import ast
from pathlib import Path

import pytest

import kfacopt

ROOT = Path(kfacopt.__file__).parent

# What each part may import, besides itself.
BASE = {"argument_checks"}
ALLOWED = {
    "argument_checks": set(),
    "linalg": BASE,
    "estimators": BASE | {"linalg"},
    "likelihoods": BASE | {"linalg"},
    "data": BASE | {"linalg"},
    "module_search": set(),
    "curvature": BASE | {"linalg", "likelihoods", "data", "module_search"},
    "kfac": BASE | {"linalg", "likelihoods", "data"},
    "optim": BASE | {"linalg", "likelihoods", "data", "module_search", "curvature", "kfac"},
    "experimental": {"curvature"},
}


def imported_parts(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    inside = [name.split(".") for name in names if name and name.split(".")[0] == "kfacopt"]
    return {parts[1] for parts in inside if len(parts) > 1}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_imports_only_from_above(path):
    part = part_of(path)
    assert part in ALLOWED, f"say in this test what {part} may import"
    assert imported_parts(path) <= ALLOWED[part] | {part}


def test_every_part_exists_or_is_planned():
    assert {part_of(p) for p in FILES} >= {"linalg", "likelihoods", "curvature", "kfac", "optim"}
