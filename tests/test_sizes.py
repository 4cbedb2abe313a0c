"""No file, class or function of the library is larger than what one can read in one go."""

import ast
from pathlib import Path

import kfacopt

ROOT = Path(kfacopt.__file__).parent

# Lines; those of the docstring of a class or function are not counted.
LARGEST = {"file": 400, "class": 200, "function": 60}

OPTIMIZER = (
    "its docstring is the optimizer's public page, and what torch.optim.Optimizer has as methods "
    "must be methods of the one class"
)
EXCEPTIONS = {"optim/kfac.py": OPTIMIZER, "optim/kfac.py KFACOptimizer": OPTIMIZER}


def length(node: ast.ClassDef | ast.FunctionDef) -> int:
    """Count a class's lines, or those of a function's body, without the docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if isinstance(node, ast.ClassDef):
        docstring = (
            node.body[0].end_lineno - node.body[0].lineno + 1 if len(body) < len(node.body) else 0
        )
        return node.end_lineno - node.lineno + 1 - docstring
    return node.end_lineno - body[0].lineno + 1 if body else 0


def too_large(name: str, node: ast.AST) -> list[str]:
    """Name the classes and functions in a node that are too large, by the path to them."""
    found = []
    for child in ast.iter_child_nodes(node):
        own = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            own = f"{name}{'.' if ' ' in name else ' '}{child.name}"
            kind = "class" if isinstance(child, ast.ClassDef) else "function"
            found += [own] if length(child) > LARGEST[kind] else []
        found += too_large(own, child)
    return found


def all_too_large() -> set[str]:
    found = set()
    for path in ROOT.rglob("*.py"):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        found |= {name} if text.count("\n") > LARGEST["file"] else set()
        found.update(too_large(name, ast.parse(text)))
    return found


def test_nothing_is_too_large_but_what_is_named():
    assert all_too_large() - EXCEPTIONS.keys() == set()


def test_exceptions_are_those_that_are_needed():
    assert EXCEPTIONS.keys() - all_too_large() == set()


def test_what_is_too_large_is_found():
    lines = "\n".join(["    x = 0"] * 70)
    tree = ast.parse(f'def f():\n    """D."""\n{lines}\ndef g():\n    """{lines}"""\n')
    assert too_large("a.py", tree) == ["a.py f"]
