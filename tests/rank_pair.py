"""One pair of processes on gloo meets what all files ask of two ranks.

Starting it costs more than everything that it does. A file's `obligations(rank)` yields names with
what is to be called on each rank; its tests find the results under these names.
"""

import datetime
import importlib
import os
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

FILES = (
    "test_ranks",
    "test_distributed",
    "test_any_loss_ranks",
    "test_products",
    "test_trust_region",
    "test_intervals",
    "test_entry_training",
)
WORLD = 2
COLLECTIVE_LIMIT = datetime.timedelta(seconds=60)
PAIR_LIMIT = 300.0  # seconds


def run_rank(rank, folder):
    """Meet the obligations of all files; save the results, or the errors that were raised."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=WORLD, timeout=COLLECTIVE_LIMIT)
    results = {}
    try:
        for file in FILES:
            for name, obligation in importlib.import_module(file).obligations(rank):
                torch.manual_seed(0)
                try:
                    results[file, name] = obligation()
                except Exception as error:  # the test that asks for it shows it
                    results[file, name] = f"{type(error).__name__}: {error}"
                dist.barrier()
        torch.save(results, f"{folder}/rank{rank}.pt")
        dist.barrier()  # gloo aborts a rank that still talks to one that is gone
    finally:
        dist.destroy_process_group()


def results_of_ranks(folder: Path):
    """Return each rank's results; of several workers the first starts the pair, the others wait."""
    finished = folder / "finished"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + PAIR_LIMIT
        while not finished.exists():
            assert time.monotonic() < end, "the pair of ranks that another worker started hangs"
            time.sleep(0.1)
    else:
        try:
            mp.spawn(run_rank, (str(folder),), nprocs=WORLD)
        finally:
            finished.touch()
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(WORLD)]


def shared_folder(own: Path) -> Path:
    """Return the folder of a run: below pytest-xdist's, each worker has one of its own."""
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "ranks"
