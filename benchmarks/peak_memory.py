"""The peak memory of a few steps, measured in a process of its own.

    python -m benchmarks.peak_memory WORKLOAD SIZE DEVICE [CONTESTANT KIND]

prints the bytes by which the process grew at most, from before the model was made. Without a
contestant it runs forward and backward passes alone. On the CPU this is the high-water mark of the
resident set (`VmHWM`: `ru_maxrss` would count the parent's); on a GPU, which counts by itself, no
process is needed.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.step_contestants import contestants
from benchmarks.workloads import make_workload

STEPS = 3


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def growth(workload: str, size: str, device: str, contestant: str = "", kind: str = "") -> int:
    """Run some steps and return by how many bytes the process grew at most.

    Args:
        workload: Its name.
        size: Its size.
        device: Where to run.
        contestant: Its name; empty for forward and backward passes alone.
        kind: Which of its steps.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _resident("VmRSS")
    work = make_workload(workload, size, device)
    optimizer = None
    if contestant:
        by_name = {c.name: c for c in contestants(workload, work.terms)}
        optimizer = by_name[contestant].kinds[kind](work.model)
    for _ in range(STEPS):
        if optimizer is None:
            work.model.zero_grad()
        else:
            optimizer.zero_grad()
        work.loss(work.model).backward()
        if optimizer is not None:
            optimizer.step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")
    return peak - before


def measured_apart(*arguments: str) -> int | None:
    """Call `growth` in a new process, or here for a GPU; `None` where the system has no `/proc`.

    Args:
        arguments: Those of `growth`.
    """
    if "cuda" in arguments:
        return growth(*arguments)
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-m", "benchmarks.peak_memory", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr}")
    return int(found.stdout.splitlines()[-1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable()
    print(growth(*sys.argv[1:]))
