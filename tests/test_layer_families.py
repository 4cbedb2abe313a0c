"""Layers of users' own: registered once, in all operators and in the optimizer."""

import copy
import doctest
from pathlib import Path

import pytest
import torch
from dense import dense_ggn
from dense_curvature import ggn as whole_ggn
from kfac_cases import to_dense
from torch import nn

from kfacopt import (
    EKFACLinearOperator,
    KFACLinearOperator,
    KFACOptimizer,
    KFACWarning,
    LayerFamily,
    LinearFamily,
    default_layers,
    register_layer,
)
from kfacopt.kfac.layers import registry

pytestmark = pytest.mark.usefixtures("float64")

RELATIVE_TOLERANCE = 1e-10  # round-off of sums in another order, times a condition number of 1e3
ABSOLUTE_TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch):
    monkeypatch.setattr(registry, "ENTRIES", [*registry.ENTRIES])


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)


class InputsFirst(nn.Module):
    """z = x W + b with W `[d_in, d_out]`, as GPT-2 has it."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(d_in, d_out))
        self.shift = nn.Parameter(torch.randn(d_out))

    def forward(self, tokens):
        return tokens @ self.kernel + self.shift


@pytest.fixture
def twins():
    register_layer(InputsFirst, LinearFamily("kernel", "shift", inputs_first=True))
    torch.manual_seed(0)
    turned = nn.Sequential(InputsFirst(4, 5), nn.Tanh(), InputsFirst(5, 3))
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for mine, other in zip(turned.parameters(), plain.parameters(), strict=True):
            other.copy_(mine.mT if mine.ndim == 2 else mine)
    return turned, plain, torch.randn(8, 4), torch.randint(3, (8,))


def turned_back(tensors):
    return [x.mT if x.ndim == 2 else x for x in tensors]


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_operators_are_those_of_the_same_layer_in_the_usual_layout(twins, kind, separate):
    turned, plain, X, y = twins
    results = []
    for model in (turned, plain):
        options = {"fisher_type": "type-2", "separate_weight_and_bias": separate}
        params = list(model.parameters())
        operator = kind(model, nn.CrossEntropyLoss(), params, [(X, y)], **options)
        vector = [torch.cos(p * 3) for p in params]
        results.append([*(operator @ vector), *(operator.inverse(1e-2) @ vector)])
    assert_close(turned_back(results[0]), results[1])


def steps(model, optimizer, X, y, number=3):
    for _ in range(number):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimizer.step()


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_the_optimizer_takes_the_same_steps_and_is_resumed(twins, preconditioner):
    turned, plain, X, y = twins
    for model in (turned, plain):
        options = {"fisher_type": "type-2", "preconditioner": preconditioner}
        optimizer = KFACOptimizer(model.parameters(), **options)
        steps(model, optimizer, X, y)
        twin = copy.deepcopy(model)
        resumed = KFACOptimizer(twin.parameters(), **options)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for net, own in ((model, optimizer), (twin, resumed)):
            steps(net, own, X, y)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert_close(turned_back(turned.parameters()), plain.parameters())


# A family in ten lines --------------------------------------------------------------------------


class Squares(nn.Module):
    """z = U [x, x²] + V cos x: two matrices of one module, neither of them x's own."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.U = nn.Parameter(torch.randn(d_out, 2 * d_in))
        self.V = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x):
        return torch.cat([x, x.square()], dim=-1) @ self.U.mT + x.cos() @ self.V.mT


class OfSquares(LayerFamily):
    datum_axes, weight_name, bias_name = 1, "U", None

    def inputs(self, module, x, reduce):
        a = torch.cat([x, x.square()], dim=-1)
        return a.reshape(1, len(x), 1, -1), 1

    def grad_outputs(self, module, g):
        return g.reshape(1, len(g), 1, -1)


class OfCosines(LinearFamily):
    def inputs(self, module, x, reduce):
        return super().inputs(module, x.cos(), reduce)


def test_a_module_with_two_matrices_is_exact_in_each():
    register_layer(Squares, OfSquares())
    register_layer(Squares, OfCosines("V", None))
    model, loss = nn.Sequential(nn.Linear(2, 3), Squares(3, 2)), nn.MSELoss()
    X, y, params = torch.rand(6, 2), torch.rand(6, 2), [model[1].U, model[1].V]
    kfac = KFACLinearOperator(model, loss, params, [(X, y)], fisher_type="type-2")
    assert kfac.layer_names == ["1.U", "1.V"]
    assert kfac.factors("1.U").input_factor.shape == (6, 6)
    ggn, size = dense_ggn(model, loss, params, X, y), params[0].numel()
    expected = torch.block_diag(ggn[:size, :size], ggn[size:, size:])
    torch.testing.assert_close(
        to_dense(kfac), expected, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE
    )
    optimizer = KFACOptimizer(model.parameters())
    nn.functional.mse_loss(model(X), y).backward()
    optimizer.step()
    statistics = optimizer.statistics()
    assert statistics["fallback_parameters"] == 0.0
    assert {"0/condition", "1.U/condition", "1.V/condition"} <= statistics.keys()


class Doubled(nn.Linear):
    """A subclass that computes something else: none of nn.Linear's factors fit."""

    def forward(self, x):
        return super().forward(2 * x)


class OfDoubled(LinearFamily):
    def inputs(self, module, x, reduce):
        return super().inputs(module, 2 * x, reduce)


def test_a_subclass_that_overrides_forward_is_what_was_registered_or_what_the_graph_says():
    model, X, y = nn.Sequential(Doubled(3, 2)), torch.rand(6, 3), torch.rand(6, 2)
    loss, params = nn.MSELoss(), list(model.parameters())
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    for name in ("0.weight", "0"):
        kfac = KFACLinearOperator(model, loss, params, [(X, y)], **options)
        assert kfac.layer_names == [name]
        torch.testing.assert_close(to_dense(kfac), dense_ggn(model, loss, params, X, y))
        register_layer(Doubled, OfDoubled())


def test_what_is_registered_anew_replaces_what_was():
    register_layer(Doubled, LinearFamily())  # forgets the factor 2
    register_layer(Doubled, OfDoubled())
    X = torch.rand(6, 3)
    model, data = Doubled(3, 2), [(X, torch.rand(6, 2))]
    kfac = KFACLinearOperator(model, nn.MSELoss(), [model.weight], data, fisher_type="type-2")
    torch.testing.assert_close(kfac.factors("weight").input_factor, 4 * X.T @ X / 6)
    assert sum(kind is Doubled for kind in default_layers()) == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((Doubled(3, 2), LinearFamily()), "kind must be"), ((Doubled, LinearFamily), "family must")],
)
def test_what_cannot_be_registered(arguments, match):
    with pytest.raises(ValueError, match=match):
        register_layer(*arguments)


# Which kinds an optimizer preconditions ----------------------------------------------------------


class Mixed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4), InputsFirst(4, 3))


CHOICES = {
    # name: (layers=, what is preconditioned)
    "default": (None, {"0", "2", "3"}),
    "one": ([nn.Linear], {"2"}),
    "more": ((InputsFirst, nn.Conv1d), {"0", "3"}),
    "none": ([], set()),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.filterwarnings("ignore:.*none of the parameters is in what layers= names")
def test_the_layers_that_are_chosen_have_factors(name):
    register_layer(InputsFirst, LinearFamily("kernel", "shift", inputs_first=True))
    kinds, expected = CHOICES[name]
    model, X, y = Mixed(), torch.randn(8, 2, 4), torch.randint(3, (8,))
    optimizer = KFACOptimizer(model.parameters(), layers=kinds)
    steps(model, optimizer, X, y)
    found = {key.split("/")[0] for key in optimizer.statistics() if "/" in key}
    assert found == expected
    assert optimizer.statistics()["fallback_parameters"] == 2.0 * (3 - len(expected))
    twin = copy.deepcopy((model, optimizer))  # copies choose as their originals
    steps(*twin, X, y)
    steps(model, optimizer, X, y)
    assert all(map(torch.equal, model.parameters(), twin[0].parameters()))


def test_a_kind_that_is_no_default_has_to_be_named():
    register_layer(InputsFirst, LinearFamily("kernel", "shift", inputs_first=True), default=False)
    assert InputsFirst not in default_layers()
    model = InputsFirst(4, 3)
    with pytest.warns(KFACWarning, match="in a layer that K-FAC knows"):
        KFACOptimizer(model.parameters())
    KFACOptimizer(model.parameters(), layers=[*default_layers(), InputsFirst])


@pytest.mark.parametrize("layers", ["Linear", nn.Linear, [nn.Module], [nn.Linear(2, 2)], [nn.Tanh]])
def test_layers_that_are_none_are_refused_by_name(layers):
    with pytest.raises(ValueError, match="layers must be None or"):
        KFACOptimizer(nn.Linear(2, 2).parameters(), layers=layers)


def test_the_page_that_says_how_does_what_it_says():
    page = Path(__file__).parent.parent / "docs" / "layers.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 8
    assert failed == 0


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
def test_an_elementwise_family_says_a_and_g_alone(shape):
    class LayerScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return x * self.gamma

    class LayerScaleFamily(LayerFamily):
        elementwise, datum_axes, weight_name, bias_name = True, len(shape), "gamma", None

        def inputs(self, module, x, reduce):
            rows = x.reshape(len(x), -1, 4).permute(2, 0, 1).unsqueeze(3)
            return rows.mean(2, keepdim=True) if reduce else rows, rows.shape[2]

        def grad_outputs(self, module, g):
            return g.reshape(len(g), -1, 4).permute(2, 0, 1).unsqueeze(3)

    register_layer(LayerScale, LayerScaleFamily())
    torch.manual_seed(0)
    model, loss, X = LayerScale(), nn.MSELoss(), torch.randn(6, 3, *shape)
    params, data = list(model.parameters()), [(X, torch.zeros_like(X))]
    exact = whole_ggn(model, loss, params, data)
    for kind in (KFACLinearOperator, EKFACLinearOperator):
        K = to_dense(kind(model, loss, params, data, fisher_type="type-2"))
        assert_close([K], [exact])
    optimizer = KFACOptimizer(params, lr=0.0, fisher_type="type-2", factor_update_interval=1)
    loss(model(X), data[0][1]).backward()
    optimizer.step()
    assert_close([optimizer.factors(params[0]).grad_output_factor.flatten()], [exact.diagonal()])
