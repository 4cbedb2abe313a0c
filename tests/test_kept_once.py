"""Symmetric factors and inverses are kept once: half of the numbers, and every step as before."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn import functional as F

from kfacopt import KFACOptimizer
from kfacopt.linalg import triangles
from kfacopt.linalg.kept_products import KeptProduct
from kfacopt.optim.state import running_averages

SIDES = (64, 65, 272, 273, 385, 513, 544, 545, 600, 1089)
STEPS = 7
INTERVALS = {"factor_update_interval": 2, "inverse_update_interval": 3}
HALF = {"factor_dtype": torch.bfloat16, "inverse_dtype": torch.bfloat16}
SETTINGS = {
    "factored": {},
    "blocks of their own": {"separate_weight_and_bias": True},
    "exact damping": {"damping_method": "exact"},
    "ekfac": {"preconditioner": "ekfac"},
    "lr auto": {"lr": "auto"},
    "diagonal sides": {"max_factor_dim": 100},
    "bfloat16": HALF,
    "inverses alone in bfloat16": {"inverse_dtype": torch.bfloat16},
    "split convolutions": {"conv_factor": "channels"},
    "split convolutions in bfloat16": {"conv_factor": "channels", **HALF},
}


def symmetric_matrices(*shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    return x + x.mT


@pytest.mark.parametrize("often", [None, 70, 500])
@pytest.mark.parametrize("d", SIDES)
def test_a_matrix_comes_back_as_it_was(d, often):
    whole = symmetric_matrices(2, d, d)
    kept = triangles.kept_once(whole, often)
    assert tuple(kept.shape) == triangles.kept_shape((2, d, d), often)
    assert triangles.whole_shape(tuple(kept.shape)) == (2, d, d)
    assert torch.equal(triangles.symmetric(kept), whole)
    assert triangles.kept_once(kept, often) is kept


@pytest.mark.parametrize("d", SIDES)
def test_it_takes_about_half_of_the_numbers(d):
    assert triangles.kept_shape((1, d, d))[-1] / d <= 0.52


def test_what_is_read_often_takes_more_the_wider_the_weight_is():
    """Beside 70 and beside 500 columns; small matrices are whole."""
    shares = {d: [triangles.kept_shape((1, d, d), n)[-1] / d for n in (70, 500)] for d in SIDES}
    for d, (few, many) in shares.items():
        assert few == many == 1 or d >= triangles.WHOLE_BELOW
        assert few == 1 or few <= (0.69 if d > triangles.SQUARES_FROM else 0.52)
        assert many == 1 or 0.749 < many < 0.76


def test_large_matrices_beside_few_columns_take_less_the_larger_they_are():
    shares = [triangles.kept_shape((1, d, d), 100)[-1] / d for d in (1000, 2000, 4000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.57


def test_blocks_of_a_split_factor_take_half_of_the_numbers():
    for d in (128, 200, 512):
        kept = triangles.kept_shape((1, 9, d, d), d)
        assert kept == triangles.kept_shape((1, 9, d, d))
        assert kept[-1] / d <= 0.52


def test_no_two_forms_have_the_same_shape():
    for d in range(triangles.LEAST_SIDE, 2500):
        columns = [triangles.kept_shape((1, d, d), n)[-1] for n in (None, 70, d)]
        allowed = {shape[-1] for shape in triangles.other_shapes((1, d, d))}
        assert {*columns} <= allowed
        assert len(allowed) == 3 + (d > triangles.SQUARES_FROM)


def test_of_what_is_symmetric_up_to_round_off_the_lower_triangle_is_kept():
    x = torch.randn(1, 300, 300)
    assert torch.equal(triangles.symmetric(triangles.kept_once(x)), x.tril() + x.tril(-1).mT)


@pytest.mark.parametrize("shape", [(1, 63, 63), (3, 100), (2, 1, 1)])
def test_small_matrices_and_diagonals_are_kept_as_they_are(shape):
    x = torch.ones(shape)
    assert triangles.kept_once(x) is x
    assert triangles.symmetric(x) is x


def test_what_is_multiplied_with_few_columns_is_kept_whole_and_loaded_so():
    """A of 301 beside 3 outputs is, and all of 65; beside 65 and 200 outputs it is kept once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 65), nn.Linear(65, 3))

    def step(model, optimizer):
        F.cross_entropy(model(torch.rand(8, 300)), torch.arange(8) % 3).backward()
        optimizer.step()

    optimizer = KFACOptimizer(model.parameters())
    step(model, optimizer)
    inverses = [
        {k: tuple(v.shape) for k, v in optimizer.state[layer.weight].items() if "_inverse" in k}
        for layer in (model[0], model[2], model[3])
    ]
    assert inverses[0] == {"grad_output_inverse": (1, 200, 151), "input_inverse": (1, 301, 226)}
    assert inverses[1] == {"grad_output_inverse": (1, 65, 65), "input_inverse": (1, 201, 101)}
    assert inverses[2] == {"grad_output_inverse": (1, 3, 3), "input_inverse": (1, 66, 66)}
    again = KFACOptimizer(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        for name, value in optimizer.state[p].items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, again.state[p][name])


@pytest.mark.parametrize("pair", [(0, triangles.FEW_COLUMNS), (triangles.FEW_COLUMNS, 0)])
def test_a_state_that_keeps_other_parts_is_loaded(pair, monkeypatch):
    """Versions may differ in what they keep whole; the steps that follow are the same."""
    monkeypatch.setattr(triangles, "WHOLE_BELOW", 0)
    model, ends = nn.Linear(70, 3).double(), []
    inputs = torch.linspace(-2, 2, 16 * 70).sin().reshape(16, 70).double()
    start = copy.deepcopy(model.state_dict())
    for few in (pair[0], pair[1]):
        monkeypatch.setattr(triangles, "FEW_COLUMNS", pair[0])
        model.load_state_dict(start)
        optimizer = KFACOptimizer(model.parameters())
        for step in range(8):
            if step == 4:
                saved = copy.deepcopy(optimizer.state_dict())
                monkeypatch.setattr(triangles, "FEW_COLUMNS", few)
                optimizer = KFACOptimizer(model.parameters())
                optimizer.load_state_dict(saved)
                columns = 71 if few else 36
                assert optimizer.state[model.weight]["input_inverse"].shape == (1, 71, columns)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), LABELS).backward()
            optimizer.step()
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_axes_and_dtypes_stay(dtype):
    whole = symmetric_matrices(2, 3, 70, 70).to(dtype)
    kept = triangles.kept_once(whole)
    assert kept.shape == (2, 3, 70, 36)
    assert torch.equal(triangles.symmetric(kept), whole)


@pytest.mark.parametrize("often", [None, 70, 500])
@pytest.mark.parametrize("d", [300, 600])
def test_gpus_take_the_same_matrix_by_an_index(d, often):
    """By the private function that they use, as there may be none here."""
    whole = symmetric_matrices(2, d, d)
    numbers, form = triangles._numbers(triangles.kept_once(whole, often))
    found = torch.empty_like(whole)
    triangles._write(numbers, found, form, triangles.GPU_LEAF)
    places = triangles._matrix_places(d, form, whole.device)
    assert torch.equal(found, whole)
    assert torch.equal(numbers[:, places.long()].view(whole.shape), whole)


# Products ----------------------------------------------------------------------------------------

# Outputs and inputs, such that both sides, the left one or the right one is kept as halves, and
# such that columns are cut, as their number is odd.
WIDTHS = [(200, 200), (300, 120), (120, 300), (301, 283), (513, 401), (200, 700)]
# Of sums of 700 products of numbers of about 2, twice, in float64.
ROUND_OFF = {"rtol": 1e-10, "atol": 1e-8}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("widths", WIDTHS)
def test_halves_are_multiplied_as_they_are(widths, bias, groups):
    G, A = (symmetric_matrices(groups, d, d).double() for d in widths)
    X = torch.randn(groups, *widths).double()
    kept = triangles.kept_once(G, widths[1]), triangles.kept_once(A, widths[0])
    columns = X.split([widths[1] - bias, bias] if bias else widths[1], dim=-1)
    want = (G @ X @ A).split([x.shape[-1] for x in columns], dim=-1)
    with torch.no_grad():
        found = KeptProduct(*kept).apply_columns([x.contiguous() for x in columns])
    for one, two in zip(found, want, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, two, **ROUND_OFF)
    torch.testing.assert_close(torch.cat(KeptProduct(*kept).apply_columns(columns), -1), G @ X @ A)


@pytest.mark.parametrize("shape", [(1, 200, 200), (1, 200, 101), (300, 200), (1, 600, 38)])
def test_what_is_kept_otherwise_has_no_halves(shape):
    """Whole matrices, triangles, diagonals of many groups, and what is of low rank."""
    assert triangles.halves_of(torch.ones(shape)) is None


def trained_halves(monkeypatch, options, halves, steps=STEPS):
    """Train a network of which two inverses of 200 and 201 rows are kept as halves, or whole."""
    monkeypatch.setattr(triangles, "WHOLE_BELOW", 192 if halves else 10**9)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 100))
    model.append(nn.Linear(100, 3)).double()
    optimizer = KFACOptimizer(model.parameters(), **INTERVALS, **options)
    train(model, optimizer, steps, X.double())
    return model, optimizer


@pytest.mark.parametrize("name", ["factored", "blocks of their own", "lr auto"])
def test_steps_by_halves_are_as_if_all_were_kept_whole_up_to_round_off(name, monkeypatch):
    before, _ = trained_halves(monkeypatch, SETTINGS[name], False)
    after, optimizer = trained_halves(monkeypatch, SETTINGS[name], True)
    assert optimizer.state[after[3].weight]["input_inverse"].shape[-2] == 201 or "blocks" in name
    for p, q in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_a_state_of_halves_goes_on_bit_by_bit(monkeypatch):
    model, optimizer = trained_halves(monkeypatch, {}, True)
    assert optimizer.state[model[3].weight]["input_inverse"].shape == (1, 201, 151)
    loaded = copy.deepcopy(model)
    other = KFACOptimizer(loaded.parameters(), **INTERVALS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (loaded, other)):
        train(*pair, STEPS, X.double())
    assert same(model, loaded)


@pytest.mark.parametrize("d", [300, 600])
def test_what_earlier_versions_kept_is_made_halves(d):
    """Triangles, and squares above 544 rows, which beside few columns still are kept."""
    whole = symmetric_matrices(2, d, d)
    earlier = triangles.kept_once(whole, 70)
    assert tuple(earlier.shape) in triangles.other_shapes(triangles.kept_shape((2, d, d), d))
    assert torch.equal(triangles.kept_anew(earlier, d), triangles.kept_once(whole, d))
    assert triangles.kept_anew(earlier, d).shape[-1] > earlier.shape[-1]


# The optimizer ---------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(8, 12, 3, groups=2),
        nn.Tanh(),
        nn.Conv1d(12, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.Tanh(),
        nn.Linear(20, 3),
    )


X = torch.linspace(-2, 2, 16 * 64).sin().reshape(16, 8, 8)
LABELS = torch.arange(16) % 3


def train(model, optimizer, steps=STEPS, inputs=X):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), LABELS).backward()
        optimizer.step()


def trained(monkeypatch, least, **options):
    """Train with all sides from `least` on kept once, and written out: no round-off differs."""
    monkeypatch.setattr(triangles, "WHOLE_BELOW", 0)
    monkeypatch.setattr(triangles, "HALVES_UP_TO", 0)
    monkeypatch.setattr(triangles, "LEAST_SIDE", least)
    monkeypatch.setattr(triangles, "FEW_COLUMNS", 0)
    model = network()
    optimizer = KFACOptimizer(model.parameters(), **INTERVALS, **options)
    train(model, optimizer)
    return model, optimizer


def mirrored(x):
    """Return matrices with both triangles like the lower one."""
    return x.tril() + x.tril(-1).mT if x.ndim > 2 else x


def same(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_step_is_as_if_all_were_kept_whole(name, monkeypatch):
    with monkeypatch.context() as patch:
        if name in ("exact damping", "ekfac"):  # read both triangles, which round-off may tell
            patch.setattr(running_averages, "kept_once", mirrored)
        before, whole = trained(patch, 10**9, **SETTINGS[name])
    after, kept = trained(monkeypatch, 2, **SETTINGS[name])
    assert same(before, after)
    assert kept.describe().state_bytes < whole.describe().state_bytes


def test_wide_layers_step_as_if_they_were_kept_whole(monkeypatch):
    """With the thresholds as they are: 600 rows beside 65 columns have squares at the end."""
    models = []
    for least in (10**9, triangles.LEAST_SIDE):
        monkeypatch.setattr(triangles, "LEAST_SIDE", least)
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Flatten(), nn.Linear(64, 600), nn.Tanh(), nn.Linear(600, 3)))
        train(models[-1], KFACOptimizer(models[-1].parameters(), **INTERVALS))
    assert same(*models)


def test_factors_and_statistics_are_of_whole_matrices(monkeypatch):
    model, kept = trained(monkeypatch, 2)
    _, whole = trained(monkeypatch, 10**9)
    for name in ("0", "2", "4"):
        for one, two in zip(kept.factors(name), whole.factors(name), strict=True):
            assert one.shape == two.shape
            assert torch.equal(one.tril(), two.tril())
            assert torch.equal(one, one.mT)
    assert kept.statistics() == pytest.approx(whole.statistics())
    assert kept.state[model[4].weight]["input_factor"].shape == (1, 49, 25)


@pytest.mark.parametrize("name", ["factored", "bfloat16", "split convolutions"])
def test_a_state_that_was_kept_whole_is_loaded_and_goes_on_bit_by_bit(name, monkeypatch):
    before, whole = trained(monkeypatch, 10**9, **SETTINGS[name])
    state = copy.deepcopy(whole.state_dict())
    monkeypatch.setattr(triangles, "LEAST_SIDE", 2)
    after = copy.deepcopy(before)
    kept = KFACOptimizer(after.parameters(), **INTERVALS, **SETTINGS[name])
    kept.load_state_dict(state)
    assert kept.describe().state_bytes < whole.describe().state_bytes
    train(after, kept)
    monkeypatch.setattr(triangles, "LEAST_SIDE", 10**9)
    train(before, whole)
    assert same(before, after)


def test_states_files_and_copies_go_on_bit_by_bit(monkeypatch):
    model, optimizer = trained(monkeypatch, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(model)
    other = KFACOptimizer(loaded.parameters(), **INTERVALS)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied, twin = copy.deepcopy((model, optimizer))
    for pair in ((model, optimizer), (loaded, other), (copied, twin)):
        train(*pair)
    assert same(model, loaded)
    assert same(model, copied)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoints_go_on_bit_by_bit(monkeypatch, tmp_path):
    model, optimizer = trained(monkeypatch, 2)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_state_dict(model, optimizer, options=options)
    dcp.save(dict(zip("mo", saved, strict=True)), checkpoint_id=tmp_path)
    fresh = network()
    other = KFACOptimizer(fresh.parameters(), **INTERVALS)
    loaded = dict(zip("mo", get_state_dict(fresh, other, options=options), strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path)
    states = {"model_state_dict": loaded["m"], "optim_state_dict": loaded["o"]}
    set_state_dict(fresh, other, **states, options=options)
    train(model, optimizer)
    train(fresh, other)
    assert same(model, fresh)


@pytest.mark.parametrize("share", [0.4, 0.6, 2.0])
def test_another_number_of_columns_is_refused(share, monkeypatch):
    _model, optimizer = trained(monkeypatch, 2)
    state = copy.deepcopy(optimizer.state_dict())
    own = state["state"][4]
    own["input_inverse"] = torch.ones(1, 49, int(49 * share))
    with pytest.raises(
        ValueError, match=r"input_inverse .* must be a tensor of shape \(1, 49, 25\)"
    ):
        optimizer.load_state_dict(state)


def test_a_whole_state_that_is_not_symmetric_is_refused(monkeypatch):
    _model, optimizer = trained(monkeypatch, 10**9)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][4]["input_factor"] = torch.ones(1, 49, 49).tril()
    monkeypatch.setattr(triangles, "LEAST_SIDE", 2)
    with pytest.raises(ValueError, match=r"input_factor .* must be symmetric"):
        optimizer.load_state_dict(state)


def test_it_follows_its_parameters_to_another_dtype(monkeypatch):
    model, optimizer = trained(monkeypatch, 2)
    model.double()
    optimizer.zero_grad()
    F.cross_entropy(model(X.double()), LABELS).backward()
    optimizer.step()
    A = optimizer.state[model[4].weight]["input_factor"]
    assert A.dtype == torch.float64
    assert A.shape == (1, 49, 25)


# Bytes of state for each byte of parameters that the benchmarks' models may take, by default and in
# bfloat16; whole matrices took 5.6, 8.4 and 6.8, and 3.3, 4.7 and 3.9.
LIMITS = {"mlp": (4.0, 3.0), "transformer": (5.0, 4.0), "cnn": (10.0, 7.0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_the_benchmarks_models_take_less_memory(name):
    from benchmarks.workloads import make_workload

    model = make_workload(name, "stated", "cpu").model
    for options, limit in zip(({}, HALF), LIMITS[name], strict=True):
        optimizer = KFACOptimizer(model.parameters(), **options)
        optimizer.state_dict()  # makes all of it
        seen = optimizer.describe()
        assert seen.state_bytes <= limit * seen.parameter_bytes
