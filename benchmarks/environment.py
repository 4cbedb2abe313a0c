"""What a measurement depends on, to be written beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import kfacopt

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PEERS = ("pytorch-optimizer", "singd", "scikit-learn")


def installed(package: str) -> str | None:
    """Return the version of an installed package, or `None`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(HERE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@cache
def commit() -> str | None:
    """Return the commit of the code that runs.

    Where the code was copied without its repository, `KFACOPT_COMMIT` says it.
    """
    return os.environ.get("KFACOPT_COMMIT") or _git("rev-parse", "HEAD") or None


def processor() -> str:
    """Return the processor's name; virtual machines hide its model, so family and model follow."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))
    found = {key.strip(): value.strip() for key, _, value in pairs}
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{k} {found[k]}" for k in ("cpu family", "model", "stepping") if k in found]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def environment(device: str) -> dict[str, Any]:
    """Return version, commit, packages, machine, dtype and threads.

    Args:
        device: `"cpu"` or `"cuda"`.
    """
    return {
        "version": kfacopt.__version__,
        "commit": commit(),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--", "kfacopt", "benchmarks/*.py")
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: installed(name) for name in PEERS},
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def folder_of(name: str, whole: bool, output: Path | None = None) -> Path:
    """Return where a command's results go.

    Args:
        name: Of the folder of what is published.
        whole: Whether the command runs what is published, all of it.
        output: What the user wants.

    Returns:
        The user's folder; else that of what is published, which a part of the runs, or others, must
        not replace: they go to `results/part`.
    """
    return output or (RESULTS / name if whole else RESULTS / "part" / name)


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], device: str) -> float:
    """Return how long a call takes on the device."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start
