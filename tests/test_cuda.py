"""What must hold on a GPU as well: the CPU's values, and steps that do not wait for the device."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from benchmarks.architectures import LanguageModel, resnet
from kfacopt import (
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    KFACOptimizer,
    default_layers,
)
from kfacopt.kfac.matrix_uses import graph_parents, matrix_uses
from kfacopt.kfac.unrolled import unrolled
from kfacopt.linalg.gram import gram

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

MODELS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)),
        torch.randn(12, 6),
        torch.randint(5, (12,)),
    ),
    "cnn": lambda: (resnet(3, 5, (4, 8), 1), torch.randn(6, 3, 8, 8), torch.randint(5, (6,))),
    "transformer": lambda: (
        LanguageModel(11, 16, 2, 7, 2),
        torch.randint(11, (6, 7)),
        torch.randint(11, (6, 7)),
    ),
    "other-layers": lambda: (
        nn.Sequential(
            nn.Embedding(11, 4),
            nn.LayerNorm(4),
            nn.Conv1d(7, 6, 3, padding="same"),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.ConvTranspose1d(6, 4, 3, stride=2),
            nn.Flatten(),
            nn.Linear(36, 5),
        ),
        torch.randint(11, (12, 7)),
        torch.randint(5, (12,)),
    ),
}
OTHER_LAYERS = [*default_layers(), nn.Embedding, nn.LayerNorm, nn.BatchNorm1d]


def loss_of(model, X, y):
    return F.cross_entropy(model(X).flatten(0, -2), y.flatten())


def trained(model, X, y, device, steps=6, **settings):
    """Return the parameters after some steps on a device."""
    model = copy.deepcopy(model).to(device)
    X, y = X.to(device), y.to(device)
    # No labels are drawn, so that both devices compute the same.
    optimizer = KFACOptimizer(
        model.parameters(),
        factor_update_interval=1,
        inverse_update_interval=2,
        **{"fisher_type": "empirical"} | settings,
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, X, y).backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


# Where a factor has an eigenvalue more than once, as 0 here, EKFAC's basis is not unique.
STEPS = [(name, {"kfac_approx": approx}) for name in MODELS for approx in ("expand", "reduce")]
STEPS += [("mlp", {"preconditioner": "ekfac"}), ("cnn", {"damping_method": "exact"})]
STEPS += [("other-layers", {"layers": OTHER_LAYERS})]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "settings"), STEPS)
def test_steps_are_those_of_the_cpu(name, settings):
    case = MODELS[name]()
    for actual, expected in zip(
        trained(*case, "cuda", **settings), trained(*case, "cpu", **settings), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bad", [-1e6, float("nan")])
def test_an_inverse_that_fails_leaves_the_others_alone(bad):
    model, X, y = (x.to("cuda") for x in MODELS["transformer"]())
    optimizer = KFACOptimizer(model.parameters(), inverse_update_interval=1, lr=0.0)

    def step():
        optimizer.zero_grad()
        loss_of(model, X, y).backward()
        optimizer.step()

    step()
    broken, sound = (optimizer.state[block.up.weight] for block in model.blocks)
    kept = broken["input_inverse"].clone()
    broken["input_factor"].fill_(bad)
    step()
    assert torch.equal(broken["input_inverse"], kept)
    assert (broken["inverse_failures"], sound["inverse_failures"]) == (1, 0)


@pytest.mark.parametrize("d", [40, 512, 1200])
def test_symmetric_products(d):
    X = torch.randn(1, d, 4097, device="cuda").mT
    expected = (X.double().mT @ X.double()).float()
    for rows in (X, X.contiguous()):
        torch.testing.assert_close(gram(rows), expected, rtol=1e-4, atol=5e-3)


@pytest.mark.usefixtures("float64")
def test_self_tuned_steps_are_those_of_the_cpu():
    case, settings = MODELS["mlp"](), {"lr": "auto", "fisher_type": "type-2"}
    for actual, expected in zip(
        trained(*case, "cuda", **settings), trained(*case, "cpu", **settings), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [GGNLinearOperator, HessianLinearOperator, KFACLinearOperator])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_operators_are_those_of_the_cpu(name, kind):
    model, X, y = MODELS[name]()
    model.eval()
    options = {"fisher_type": "type-2"} if kind is KFACLinearOperator else {}
    found = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device)
        data = [(X.to(device), y.to(device))]
        params = [p for p in own.parameters() if p.ndim > 1]
        operator = kind(own, nn.CrossEntropyLoss(), params, data, **options)
        identity = torch.eye(operator.shape[1], device=device)
        found.append((operator @ identity).cpu())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_a_step_without_new_statistics_waits_for_the_device_once(preconditioner):
    """To know whether the gradients are finite; see `are_finite`."""
    model, X, y = (x.to("cuda") for x in MODELS["transformer"]())
    optimizer = KFACOptimizer(model.parameters(), preconditioner=preconditioner)

    def step():
        optimizer.zero_grad()
        loss_of(model, X, y).backward()
        optimizer.step()

    step()
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchroniz" in str(w.message)]) == 1


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_grad_scaler_and_autocast(fisher_type):
    model, X, y = (x.to("cuda") for x in MODELS["transformer"]())
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loss_of(model, X, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_a_resumed_run_goes_on_bit_by_bit(preconditioner):
    model, X, y = (x.to("cuda") for x in MODELS["mlp"]())
    make = partial(KFACOptimizer, preconditioner=preconditioner, factor_update_interval=2)

    def steps(own, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(own, X, y).backward()
            optimizer.step()

    optimizer = make(model.parameters())
    steps(model, optimizer, 3)
    other = copy.deepcopy(model)
    resumed = make(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 4)
    steps(other, resumed, 4)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_labels_are_drawn_on_the_device_of_the_model():
    model, X, y = (x.to("cuda") for x in MODELS["mlp"]())
    optimizer = KFACOptimizer(model.parameters())
    loss_of(model, X, y).backward()
    optimizer.step()
    tensors = [v for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v)]
    assert {t.device.type for t in tensors if t.ndim > 0} == {"cuda"}
    model.to("cpu")  # a model that moves takes the state along
    optimizer.zero_grad()
    loss_of(model, X.cpu(), y.cpu()).backward()
    optimizer.step()
    assert all(p.device.type == "cpu" for p in model.parameters())


RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_recurrent_module_is_unrolled_where_factors_are_due(kind, batch_first):
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    module = RECURRENT[kind](3, 4, **options, device="cuda", dtype=torch.float64)
    x = torch.randn(6, 5, 3, device="cuda", dtype=torch.float64)
    fused, _ = module(x)
    with unrolled([module]):
        looped, _ = module(x)
    # Sums of less than 300 terms of order 1, in another order.
    assert torch.allclose(looped, fused, rtol=0, atol=300 * torch.finfo(torch.float64).eps)
    assert looped.stride() == fused.stride()
    matrices = {p for p in module.parameters() if p.ndim == 2}
    assert matrix_uses(graph_parents([get_gradient_edge(looped)], {}), matrices).keys() == matrices
