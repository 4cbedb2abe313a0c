"""Run the numerical tests on the code paths of other processors: `python -m tests.processors`.

What a product, a sum or a decomposition gives in its last digits depends on the instructions that
ATen, MKL and OpenBLAS choose for a processor, and on the number of threads. A test that passes with
those of one machine alone, or a branch of the library that round-off decides, shows itself here.
Every combination runs in a process of its own, two at a time with one thread each.

    python -m tests.processors                       all combinations, the numerical tests
    python -m tests.processors --list                the combinations and their settings
    python -m tests.processors --only baseline       one of them (may be repeated)
    python -m tests.processors --only baseline -- -m "not slow"
                                                     with arguments of pytest, for the whole suite
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
CORES = 2

# Everything else that compares numbers counts as numerical, so that a new file joins by itself.
NOT_NUMERICAL = (
    "test_benchmark_problems.py",
    "test_compare.py",
    "test_compile.py",
    "test_cuda.py",
    "test_defaults.py",
    "test_distributed.py",
    "test_docs.py",
    "test_examples.py",
    "test_import_rule.py",
    "test_operator_cost_smoke.py",
    "test_self_tuning_problems.py",
    "test_side_by_side.py",
    "test_step_cost.py",
    "test_trainers.py",
)


class Combination(NamedTuple):
    """Instructions of ATen, MKL and OpenBLAS, and the number of threads.

    Attributes:
        settings: Environment variables that choose other instructions than the machine's own.
        threads: Of every library.
        needs: What `torch.backends.cpu.get_cpu_capability` has to say, or more.
    """

    settings: dict[str, str]
    threads: int = 1
    needs: str = "DEFAULT"


def _instructions(aten: str, mkl: str, openblas: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "MKL_CBWR": mkl, "OPENBLAS_CORETYPE": openblas}


# ATen takes a capability that the processor lacks at its word and dies of an illegal instruction.
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
_BASELINE = _instructions("default", "COMPATIBLE", "Nehalem")
_HASWELL = _instructions("avx2", "AVX2", "Haswell")
_SKYLAKE = _instructions("avx512", "AVX512", "SkylakeX")
COMBINATIONS = {
    "machine": Combination({}),
    "machine-2": Combination({}, threads=2),
    "baseline": Combination(_BASELINE),
    "baseline-2": Combination(_BASELINE, threads=2),
    "haswell": Combination(_HASWELL, needs="AVX2"),
    "haswell-2": Combination(_HASWELL, threads=2, needs="AVX2"),
    "mixed": Combination(
        {
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "OPENBLAS_CORETYPE": "Haswell",
        },
        needs="AVX2",
    ),
    "skylake": Combination(_SKYLAKE, needs="AVX512"),
}
_VARIABLES = {name for c in COMBINATIONS.values() for name in c.settings}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Outcome(NamedTuple):
    """What one combination gave."""

    summary: str
    code: int
    seconds: float
    output: str


def environment(combination: Combination) -> dict[str, str]:
    """Return the variables of a process that runs a combination, free of the caller's choices."""
    kept = {k: v for k, v in os.environ.items() if k not in _VARIABLES}
    return {**kept, **combination.settings, **dict.fromkeys(_THREADS, str(combination.threads))}


def numerical_tests() -> list[str]:
    """Return the files whose tests compare computed numbers, and the examples in docstrings."""
    files = sorted(p.name for p in (ROOT / "tests").glob("test_*.py"))
    return ["kfacopt", *(f"tests/{name}" for name in files if name not in NOT_NUMERICAL)]


def fingerprint() -> str:
    """Return a digest of the last digits of some products: equal ones are the same code path."""
    rng, digest = np.random.default_rng(0), hashlib.sha1()
    matrix = rng.standard_normal((67, 53))
    for dtype in (torch.float32, torch.float64):
        X = torch.from_numpy(matrix).to(dtype)
        S = X.T @ X
        for values in (S, X.sum(), X.exp(), torch.linalg.qr(X).Q, torch.linalg.eigh(S)[1]):
            digest.update(values.numpy().tobytes())
    digest.update(np.linalg.eigh(matrix.T @ matrix)[1].tobytes())
    return digest.hexdigest()[:8]


def run(name: str, pytest_arguments: Sequence[str]) -> Outcome:
    """Run pytest under a combination; print its output if it fails."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *pytest_arguments]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as file:
        code = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(COMBINATIONS[name]),
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
        file.seek(0)
        output = file.read()
    lines = [line for line in output.splitlines() if re.search(r" in \d[\d.]*s", line)]
    summary = lines[-1].strip("= ") if lines else f"exit status {code}"
    outcome = Outcome(summary, code, time.perf_counter() - start, output)
    if code:
        print(f"== {name}\n{output}", flush=True)
    print(f"== {name}: {outcome.summary}", flush=True)
    return outcome


def run_all(names: Sequence[str], pytest_arguments: Sequence[str]) -> dict[str, Outcome]:
    """Run combinations side by side, as many as fit the cores with the threads that they have."""
    outcomes: dict[str, Outcome] = {}
    for threads in sorted({COMBINATIONS[name].threads for name in names}):
        alike = [name for name in names if COMBINATIONS[name].threads == threads]
        with ThreadPoolExecutor(max(1, CORES // threads)) as pool:
            found = pool.map(lambda name: run(name, pytest_arguments), alike)
            outcomes.update(zip(alike, found, strict=True))
    return outcomes


def _fingerprint_of(name: str) -> str:
    code = "from tests.processors import fingerprint; print(fingerprint())"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(COMBINATIONS[name]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()


def available() -> list[str]:
    """Return the combinations that this processor has."""
    own = CAPABILITIES.index(torch.backends.cpu.get_cpu_capability())
    return [name for name, c in COMBINATIONS.items() if CAPABILITIES.index(c.needs) <= own]


def another() -> str:
    """Return a combination that this processor has, with other instructions than its own."""
    return "haswell" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "baseline"


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the combinations and stop")
    parser.add_argument("--only", action="append", choices=COMBINATIONS, metavar="NAME")
    own, *rest = _split(arguments)
    options = parser.parse_args(own)
    if options.list:
        for name, (settings, threads, _) in COMBINATIONS.items():
            print(f"{name:12} threads={threads}", *(f"{k}={v}" for k, v in settings.items()))
        return 0
    here = available()
    names = options.only or list(COMBINATIONS)
    for name in names:
        if name not in here:
            print(f"== {name}: skipped, the processor lacks {COMBINATIONS[name].needs}")
    names = [name for name in names if name in here]
    outcomes = run_all(names, rest[0] if rest else numerical_tests())
    print(f"\n{'combination':14}{'digits':12}{'seconds':>8}  result")
    for name, outcome in outcomes.items():
        digits = _fingerprint_of(name)
        print(f"{name:14}{digits:12}{outcome.seconds:8.0f}  {outcome.summary}")
    return int(not outcomes or any(outcome.code for outcome in outcomes.values()))


def _split(arguments: Sequence[str]) -> list[list[str]]:
    """Cut a command line at its first `--`, if there is one."""
    if "--" not in arguments:
        return [list(arguments)]
    cut = list(arguments).index("--")
    return [list(arguments[:cut]), list(arguments[cut + 1 :])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
