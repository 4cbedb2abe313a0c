"""Run the checks in order and stop at the first that fails.

    python -m tests.run_checks           all of them, as CI does
    python -m tests.run_checks --fast    formatting, lint and the spine, while one works on the code

The spine is what everything else stands on: exactness of operators and factors, the plain loop, the
optimizer's step and its state. It runs first, on the machine's own code paths. Then the
documentation is built, warnings are errors, examples run in quick form; then the whole suite runs
on the code paths of another processor (`tests.processors`). Tests go in two processes with one
thread each, as many as the smallest machine has cores.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping

from tests.processors import COMBINATIONS, another, environment

SPINE = (
    *("test_likelihoods.py", "test_curvature_exact.py", "test_kfac_operator.py"),
    *("test_structured.py", "test_inverses.py", "test_eigenbasis.py", "test_moments.py"),
    *("test_plain_loop.py", "test_optimizer_step.py", "test_ekfac_optimizer.py"),
    *("test_faults.py", "test_state.py", "test_import_rule.py", "test_docs.py"),
)
PYTEST = ["pytest", "-n", "2", "--dist", "worksteal"]
SPHINX = ["sphinx", "-W", "--keep-going", "-E", "-q", "docs", "build/docs"]


def passed(name: str, command: list[str], variables: Mapping[str, str]) -> bool:
    """Run a module of Python; tell whether it exits with 0."""
    start = time.perf_counter()
    print(f"== {name}: {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], env=variables, check=False).returncode
    print(f"== {name}: exit {code} after {time.perf_counter() - start:.0f} s", flush=True)
    return code == 0


def main() -> int:
    """Run the checks that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="formatting, lint and the spine alone")
    fast = parser.parse_args().fast
    plain, own = dict(os.environ), environment(COMBINATIONS["machine"])
    spine = [*PYTEST, "-m", "not slow", *(f"tests/{name}" for name in SPINE)]
    checks = [
        ("formatting", ["ruff", "format", "--check", "."], plain),
        ("lint", ["ruff", "check", "."], plain),
        ("spine", spine, own),
    ]
    if not fast:
        other = another()
        checks.append(("types", ["mypy"], plain))
        checks.append(("documentation", SPHINX, own))
        checks.append((f"all tests as on {other}", PYTEST, environment(COMBINATIONS[other])))
    return int(not all(passed(*check) for check in checks))


if __name__ == "__main__":
    sys.exit(main())
