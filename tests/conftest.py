import gc
import os
from pathlib import Path

import pytest
import torch
from rank_pair import results_of_ranks, shared_folder

# Ranks find each other on a machine without a network, too.
if Path("/sys/class/net/lo").exists():
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def pytest_collection_finish():
    """Leave what is there before the tests out of all searches among the living objects.

    An optimizer looks for its parameters' modules there, at each construction: with the objects of
    all test files that is most of the suite's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Build everything in float64, the precision of the oracles."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def _results_of_ranks(tmp_path_factory):
    return results_of_ranks(shared_folder(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def ranks(request, _results_of_ranks):
    """What each of two ranks got for the obligations of the test's file, by name."""
    own = request.module.__name__
    return [
        {name: found for (file, name), found in results.items() if file == own}
        for results in _results_of_ranks
    ]
