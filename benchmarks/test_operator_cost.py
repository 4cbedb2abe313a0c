"""What a product with an exact operator costs, in units of one gradient evaluation.

Claim: on data in memory a product costs a few gradient evaluations per column, less than with
curvlinops. Run on an otherwise idle machine with

    pytest benchmarks/test_operator_cost.py --benchmark-only

Every round times one gradient evaluation over the data set and then one product, so that a drift
of the machine's speed cancels in their ratio. The first products, of 16 columns, fill caches and
are warm-up. Beside the time stands the number of floating point operations of matrix products and
convolutions, by torch's own formulas (`torch.utils.flop_counter`), in the same unit.
The peer's rows are skipped where it is not installed. Results go to where
KFACOPT_BENCHMARK_RESULTS says; else those of all rows to `benchmarks/results/operator_cost.json`,
and those of some, as with `-k`, to `benchmarks/results/part/`.
"""

import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import time
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import kfacopt
from benchmarks.environment import processor

ROUNDS, WARMUP = 15, 3
LIBRARIES = ("kfacopt", "curvlinops")
OPERATORS = ("Hessian", "GGN", "EF", "FisherMC", "Jacobian", "TransposedJacobian")
NUM_COLUMNS = (1, 16)
HERE = pathlib.Path(__file__).parent


class Transformer(nn.Module):
    """One encoder layer; positions are averaged before the head."""

    def __init__(self, width=64, classes=10):
        super().__init__()
        self.embedding = nn.Linear(32, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, X):
        """Map `[N, T, 32]` to `[N, classes]`."""
        return self.head(self.layer(self.embedding(X)).mean(1))


def mlp():
    """Return an MLP of 400,000 parameters."""
    widths = (256, 512, 512)
    hidden = [p for a, b in pairwise(widths) for p in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 10))


def cnn():
    """Return a CNN of 23,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 10),
    )


# name: (model, batch size, shape of a datum)
MODELS = {
    "mlp": (mlp, 128, (256,)),
    "cnn": (cnn, 32, (3, 16, 16)),
    "transformer": (Transformer, 32, (24, 32)),
}


def make_problem(model_name, device, batch_size=None, num_batches=2):
    """Return a model, its loss and its data.

    The model is in training mode, without dropout: in evaluation mode an encoder layer would take
    a fast path that has no forward mode.
    """
    torch.manual_seed(0)
    make_model, size, datum = MODELS[model_name]
    size = batch_size or size
    model = make_model().to(device)
    data = [
        (torch.randn(size, *datum, device=device), torch.randint(10, (size,), device=device))
        for _ in range(num_batches)
    ]
    return model, nn.CrossEntropyLoss(), data


def make_operator(library, name, model, loss_func, data):
    """Return an operator of a library, which must be installed."""
    source = kfacopt if library == "kfacopt" else pytest.importorskip(library)
    operator = getattr(source, f"{name}LinearOperator")
    params = list(model.parameters())
    loss = () if name.endswith("Jacobian") else (loss_func,)
    return operator(model, *loss, params, data, check_deterministic=False)


def synchronise(device):
    """Wait for the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device):
    """Return the seconds that a call takes."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


class OperationCounter(TorchDispatchMode):
    """Adds up operations; `FlopCounterMode` also tracks modules, which nested transforms break."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one operation."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            count = flop_registry[func.overloadpacket]
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def operations(function):
    """Return how many floating point operations a call takes in matrix products."""
    with OperationCounter() as counter:
        function()
    return counter.total


def gradient_evaluation(model, loss_func, data):
    """Return a function that evaluates the gradient over all data once."""
    params = list(model.parameters())

    def evaluate():
        for X, y in data:
            torch.autograd.grad(loss_func(model(X), y), params)

    return evaluate


def commit():
    """Return the commit that is checked out, or `None`."""
    command = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def environment(device):
    """Return what the numbers depend on."""
    try:
        peer = importlib.metadata.version("curvlinops-for-pytorch")
    except importlib.metadata.PackageNotFoundError:
        peer = None
    return {
        "version": kfacopt.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "curvlinops": peer,
        "device": torch.cuda.get_device_name(device) if device == "cuda" else processor(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "date": time.strftime("%Y-%m-%d"),
    }


@pytest.fixture(scope="session")
def device():
    """Return where to run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def output(rows):
    """Return where rows go: some must not replace what is published."""
    count = len(LIBRARIES) * len(NUM_COLUMNS) * len(OPERATORS) * len(MODELS)
    folder = HERE / "results" / ("" if len(rows) == count else "part")
    given = os.environ.get("KFACOPT_BENCHMARK_RESULTS")
    return pathlib.Path(given) if given else folder / "operator_cost.json"


@pytest.fixture(scope="session")
def results(device):
    """Collect rows, and write them when all benchmarks have run."""
    rows = []
    yield rows
    path = output(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**environment(device), "rows": rows}, indent=1) + "\n")


@pytest.mark.filterwarnings("default")  # the peer's are its own
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("num_columns", NUM_COLUMNS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("model", MODELS)
def test_cost(benchmark, results, device, model, operator, num_columns, library):
    """Time one product, and one gradient evaluation beside it."""
    network, loss_func, data = make_problem(model, device)
    # fused attention has no forward mode, which the peer does not get around by itself
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        A = make_operator(library, operator, network, loss_func, data)
        V = torch.randn(A.shape[1], num_columns, device=device)
        V = V[:, 0] if num_columns == 1 else V
        gradient = gradient_evaluation(network, loss_func, data)
        gradient_times, product_times = [], []
        for _ in range(WARMUP):
            A @ torch.randn(A.shape[1], max(NUM_COLUMNS), device=device)

        def product():
            product_times.append(timed(lambda: A @ V, device))

        benchmark.pedantic(
            product,
            setup=lambda: gradient_times.append(timed(gradient, device)),
            rounds=ROUNDS,
            warmup_rounds=WARMUP,
        )
        gradient_operations, product_operations = operations(gradient), operations(lambda: A @ V)
    pairs = zip(product_times[WARMUP:], gradient_times[WARMUP:], strict=True)
    ratios = sorted(p / g for p, g in pairs)
    row = {
        "model": model,
        "operator": operator,
        "columns": num_columns,
        "library": library,
        "gradients": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "operations": product_operations / gradient_operations,
        "milliseconds": 1e3 * statistics.median(product_times[WARMUP:]),
    }
    benchmark.extra_info.update(row)
    results.append(row)
