"""The folders are layers: each imports only from those above it (ARCHITECTURE.md)."""

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
    "module_calls": set(),
    "elementwise_derivatives": set(),
    "taylor_mode": {"elementwise_derivatives"},
    "curvature": BASE | {"linalg", "likelihoods", "data", "module_search", "module_calls"},
    "kfac": BASE | {"linalg", "likelihoods", "data", "taylor_mode"},
    "optim": BASE | {"linalg", "likelihoods", "data", "module_search", "module_calls", "kfac"},
    "experimental": {"curvature"},
    # The one part that sees both sides, to compare them: K-FAC (and an optimizer) with the oracle.
    "diagnosis": BASE
    | {"linalg", "estimators", "likelihoods", "data", "curvature", "kfac", "optim"},
}

# Folders in a part, in an order: a file in one imports, of its own part, what is in this folder, in
# those before it, or in the files that are named beside them. Nothing else: not what joins them.
ROOMS = {
    "kfac": ("layers",),
    "optim": ("watch", "statistics", "state", "steps"),
}
BESIDE = {"optim": {"settings", "group_settings", "messages"}}


def imported_names(path: Path) -> list[list[str]]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return [name.split(".")[1:] for name in names if name and name.startswith("kfacopt.")]


def imported_parts(path: Path) -> set[str]:
    return {parts[0] for parts in imported_names(path)}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=short)
def test_imports_only_from_above(path):
    part = part_of(path)
    assert part in ALLOWED, f"say in this test what {part} may import"
    assert imported_parts(path) <= ALLOWED[part] | {part}


def in_rooms(part: str) -> list[Path]:
    return [p for room in ROOMS[part] for p in sorted((ROOT / part / room).rglob("*.py"))]


@pytest.mark.parametrize("path", [p for part in ROOMS for p in in_rooms(part)], ids=short)
def test_rooms_import_only_from_those_before_them(path):
    part, room = path.relative_to(ROOT).parts[:2]
    rooms = ROOMS[part]
    allowed = {*rooms[: rooms.index(room) + 1], *BESIDE.get(part, set())}
    own = {names[1] for names in imported_names(path) if names[0] == part and len(names) > 1}
    assert own <= allowed


def test_every_part_exists_or_is_planned():
    assert {part_of(p) for p in FILES} >= {"linalg", "likelihoods", "curvature", "kfac", "optim"}
