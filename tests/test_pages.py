"""Pages do what they say: all Python in them is run, and every public name has its own."""

import doctest
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import kfacopt

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block in a comment is not shown: it makes what the others take for granted.
BLOCK = re.compile(
    r"^<!-- needs (?P<package>\w+) -->|^```(?:python|py)\n(?P<shown>.*?)^```|"
    r"^<!-- python\n(?P<hidden>.*?)^-->",
    re.DOTALL | re.MULTILINE,
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run_doctests(text: str, namespace: dict, page: Path, line: int) -> None:
    test = doctest.DocTestParser().get_doctest(text, namespace, page.name, str(page), line)
    if not test.examples:
        return
    test.globs = namespace  # a copy else
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    failed, _ = runner.run(test, out=said.append, clear_globs=False)
    assert failed == 0, "".join(said)


def run_page(page: Path) -> None:
    """Run doctests and blocks from top to bottom, in one namespace."""
    text, namespace, end, missing = page.read_text(), {"__name__": "page"}, 0, False
    for block in BLOCK.finditer(text):
        run_doctests(text[end : block.start()], namespace, page, text.count("\n", 0, end))
        end = block.end()
        if block["package"] is not None:
            missing = find_spec(block["package"]) is None
            continue
        source = block["hidden"] if block["shown"] is None else block["shown"]
        line = text.count("\n", 0, block.start()) + 1
        if ">>>" in source:
            run_doctests(source, namespace, page, line)
        elif not missing:
            exec(compile("\n" * line + source, str(page), "exec"), namespace)
        missing = False
    run_doctests(text[end:], namespace, page, text.count("\n", 0, end))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_python_in_pages_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_every_public_name_is_in_the_reference_and_has_a_doctest():
    listed = re.findall(r"^   (\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(kfacopt.__all__)
    objects = [getattr(kfacopt, name) for name in kfacopt.__all__]
    told = [o for o in objects if not (inspect.isclass(o) and issubclass(o, Exception))]
    told = [o for o in told if not inspect.ismodule(o)]
    assert [o.__name__ for o in told if ">>> " not in inspect.getdoc(o)] == []


def test_pages_link_to_pages_and_files_that_exist():
    for page in [*PAGES, *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
