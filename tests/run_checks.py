"""Run every check, in order, and stop at the first that fails: `python -m tests.run_checks`."""

import subprocess
import sys
import time

CHECKS = {
    "formatting": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "tests": ["pytest"],
}


def main() -> int:
    for name, command in CHECKS.items():
        start = time.perf_counter()
        print(f"== {name}: {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        print(f"== {name}: exit {code} after {time.perf_counter() - start:.0f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
