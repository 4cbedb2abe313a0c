"""The peak of the memory that torch allocates in a few steps.

    python -m benchmarks.peak_memory WORKLOAD SIZE DEVICE [CONTESTANT KIND]

prints it in bytes, counted from before the model is made. Without a contestant it runs forward and
backward passes alone. A GPU's allocator keeps the figure; on the CPU it is the highest total that
torch's profiler notes at an allocation, in a process of its own, as it counts garbage of earlier
models that is still to be collected. (The resident set of a process also depends on how the heap
lies: for the same steps it was seen to grow by 304 to 350 MiB.)
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_contestants import contestants
from benchmarks.workloads import make_workload

STEPS = 3


def _run(workload: str, size: str, device: str, contestant: str, kind: str) -> None:
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


def peak_memory(workload: str, size: str, device: str, contestant: str = "", kind: str = "") -> int:
    """Run some steps and return the peak of what torch allocated for them, in bytes.

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
        _run(workload, size, device, contestant, kind)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        _run(workload, size, device, contestant, kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")


def measured_apart(*arguments: str) -> int:
    """Call `peak_memory` in a new process, or here for a GPU.

    Args:
        arguments: Those of `peak_memory`.
    """
    if "cuda" in arguments:
        return peak_memory(*arguments)
    command = [sys.executable, "-m", "benchmarks.peak_memory", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr}")
    return int(found.stdout.splitlines()[-1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable()
    print(peak_memory(*sys.argv[1:]))
