"""The library's docstrings are written to be read in a terminal; here they become reStructuredText.

An indented block behind a paragraph is a formula or code, and must look as it stands there. Names
of what is not exported become links, and operators have the signature of their `__init__`, not of
the `__new__` that they have from SciPy.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import kfacopt
from kfacopt.curvature.risk import EmpiricalRiskLinearOperator
from kfacopt.linalg.operator import LinearOperator

SECTIONS = {
    *("Args:", "Attributes:", "Example:", "Examples:", "Note:", "Raises:", "References:"),
    *("Returns:", "Yields:", "Warns:"),
}


# In docs/named_elsewhere.md.
ELSEWHERE = {
    "EmpiricalRiskLinearOperator": "kfacopt.curvature.risk",
    "CGReport": "kfacopt.linalg.conjugate_gradients",
    "Factors": "kfacopt.kfac.factors",
    "UnsupportedLossError": "kfacopt.likelihoods.interface",
    "DecompositionError": "kfacopt.linalg.kronecker",
    "TrustStatistics": "kfacopt.optim.steps.trust_region",
    "block_statistics": "kfacopt.optim.monitoring",
}


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_literal(block: list[str]) -> bool:
    """Tell whether an indented block is more than a list or a doctest, which Sphinx knows."""
    return not re.match(r"\s*(>>>|- |\* |\d+\. |\.\. )", block[0])


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield the lines in groups: empty ones, and runs between them."""
    group: list[str] = []
    for line in lines:
        if not line.strip():
            if group:
                yield group
            yield [""]
            group = []
        else:
            group.append(line)
    if group:
        yield group


def escaped(line: str) -> str:
    """Escape what stands for absolute values, and is no code or doctest."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(_linked(p) if p.startswith("`") else p.replace("|", r"\|") for p in parts)


def _linked(code: str) -> str:
    name = code.strip("`")
    return f"`~{ELSEWHERE[name]}.{name}`" if name in ELSEWHERE else code


def literal_blocks(lines: list[str]) -> list[str]:
    """Mark indented blocks outside of sections as literal ones."""
    found: list[str] = []
    before = ""  # the last line that is not empty
    inside = False  # a literal block that goes on over an empty line
    for block in _blocks(lines):
        if block == [""]:
            found.append("")
            continue
        indented = all(_indent(line) >= 4 for line in block)
        if indented and (inside or (before and not _indent(before) and before not in SECTIONS)):
            if not inside and _is_literal(block):
                language = "python" if all(line.isascii() for line in block) else "text"
                found += [f".. code-block:: {language}", ""]
                inside = True
            found += block if inside else [escaped(line) for line in block]
            continue
        inside = False
        found += [escaped(line) for line in block]
        before = block[-1] if not _indent(block[-1]) else before
        if block[0] in SECTIONS:
            before = block[0]
    return found


def _is_code(lines: list[str]) -> bool:
    try:
        compile(textwrap.dedent("\n".join(lines)), "example", "exec")
    except SyntaxError:
        return False
    return True


def _code_blocks(lines: list[str]) -> list[str]:
    """Mark code in sections of examples, where it is no doctest."""
    found: list[str] = []
    for block in _blocks(lines):
        if block[0] == "Example:" and block[1:] and _is_code(block[1:]):
            block = [block[0], "    .. code-block:: python", "", *("    " + x for x in block[1:])]
        found += block
    return found


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _code_blocks(literal_blocks(lines))


def _give_signatures(app: Any) -> None:
    for name in kfacopt.__all__:
        _give_signature(getattr(kfacopt, name))
    _give_signature(EmpiricalRiskLinearOperator)


def _give_signature(kind: Any) -> None:
    """Let a class of SciPy's show the arguments of its own `__init__`."""
    if inspect.isclass(kind) and issubclass(kind, LinearOperator):
        own = inspect.signature(kind.__init__)
        kind.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])


def setup(app: Any) -> dict[str, bool]:
    """Listen before napoleon does."""
    app.connect("builder-inited", _give_signatures)
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
