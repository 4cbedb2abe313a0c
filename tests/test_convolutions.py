"""Convolutions of one to three dimensions and transposed ones, with hyperparameters that are drawn.

Where theory says so, K-FAC is the exact block of the GGN: with expand for a layer whose every
position is an output, with reduce where a mean over positions follows. Elsewhere EKFAC's trace is
that of the exact block, which sees whether each position's a meets its own g.
"""

import copy

import pytest
import torch
from dense import block_mask, dense_ggn
from kfac_cases import grouped_mask, to_dense
from torch import nn

from kfacopt import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator, KFACOptimizer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
]

TOLERANCE = 1e-10
EXAMPLES = 25
drawn = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

ORDINARY = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class PositionsLast(nn.Module):
    """[N, C, *spatial] -> [N, S, C]: every position is an output of its own."""

    def forward(self, x):
        return x.flatten(2).mT


class Average(nn.Module):
    """[N, C, *spatial] -> [N, C]."""

    def forward(self, x):
        return x.flatten(2).mean(2)


def sizes(draw, dims, least, most):
    return tuple(draw(st.integers(least, most)) for _ in range(dims))


@st.composite
def ordinary(draw):
    """Return a convolution and the spatial shape of an input that it takes."""
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    kernel, dilation = sizes(draw, dims, 1, 3), sizes(draw, dims, 1, 2)
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    options = {"padding_mode": mode, "groups": groups, "dilation": dilation}
    same = draw(st.booleans())
    options["padding"] = "same" if same else sizes(draw, dims, 0, 2)
    options["stride"] = 1 if same else sizes(draw, dims, 1, 2)
    options["bias"] = draw(st.booleans())
    # Reflection needs an input wider than the padding, a kernel one as wide as itself.
    shape = tuple(
        max(3, d * (k - 1) + 1) + e
        for d, k, e in zip(dilation, kernel, sizes(draw, dims, 0, 1), strict=True)
    )
    return ORDINARY[dims](2 * groups, groups * draw(st.integers(1, 2)), kernel, **options), shape


@st.composite
def transposed(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    kernel, dilation, stride = (sizes(draw, dims, 1, 3) for _ in range(3))
    padding = sizes(draw, dims, 0, 2)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    shape = sizes(draw, dims, 2, 3)
    lengths = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(shape, stride, padding, dilation, kernel, extra, strict=True)
    ]
    hypothesis.assume(min(lengths) > 0)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
    options |= {"output_padding": extra, "bias": draw(st.booleans())}
    return TRANSPOSED[dims](2 * groups, groups * draw(st.integers(1, 2)), kernel, **options), shape


def rebuilt(case):
    """Return the layer with weights of its own: hypothesis draws the configuration alone."""
    layer, shape = case
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    layer.reset_parameters()
    return layer, torch.rand(3, layer.in_channels, *shape)


def blocks(model, params, separate):
    owners = [name.rsplit(".", 1)[0] for name, _ in model.named_parameters()]
    own = list(range(len(params))) if separate else [owners.index(owner) for owner in owners]
    return block_mask(params, own) * grouped_mask(model, params)


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joint"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("strategy", [ordinary, transposed])
def test_type_2_is_the_exact_block_of_linear_nets(strategy, approx, separate):
    @drawn
    @hypothesis.given(strategy())
    def check(case):
        layer, X = rebuilt(case)
        behind = PositionsLast() if approx == "expand" else Average()
        head = nn.Linear(layer.out_channels, 2)
        model = nn.Sequential(layer, behind, *([head] if approx == "reduce" else []))
        params, loss = list(model.parameters()), nn.MSELoss()
        data = [(X, torch.rand_like(model(X)))]
        options = {"kfac_approx": approx, "separate_weight_and_bias": separate}
        kfac = KFACLinearOperator(model, loss, params, data, fisher_type="type-2", **options)
        ggn = to_dense(GGNLinearOperator(model, loss, params, data))
        expected = ggn * blocks(model, params, separate)
        torch.testing.assert_close(to_dense(kfac), expected, rtol=TOLERANCE, atol=TOLERANCE)

    check()


@pytest.mark.parametrize("strategy", [ordinary, transposed])
def test_ekfac_has_the_trace_of_the_exact_block_of_any_net(strategy):
    @drawn
    @hypothesis.given(strategy())
    def check(case):
        layer, X = rebuilt(case)
        model = nn.Sequential(layer, nn.Tanh(), nn.Flatten())
        model.append(nn.Linear(model(X).shape[1], 2))
        params, loss = list(layer.parameters()), nn.CrossEntropyLoss()
        y = torch.randint(2, (3,))
        ekfac = EKFACLinearOperator(model, loss, params, [(X, y)], fisher_type="type-2")
        trace = dense_ggn(model, loss, params, X, y).trace()
        torch.testing.assert_close(ekfac.trace(), trace, rtol=TOLERANCE, atol=0.0)

    check()


NETS = {
    # name: (layers of a net that is linear where the layers are, shape of a datum)
    "conv1d": (lambda: [nn.Conv1d(2, 4, 2, stride=2), nn.Conv1d(4, 3, 1)], (2, 6)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2, stride=2), nn.Conv3d(3, 2, 1)], (2, 4, 2, 2)),
    "transposed": (
        lambda: [nn.ConvTranspose2d(2, 4, 2, stride=2, groups=2), nn.Conv2d(4, 3, 1)],
        (2, 2, 3),
    ),
}


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("name", NETS)
def test_deep_linear_nets_of_several_convolutions(name, kind):
    make, shape = NETS[name]
    model = nn.Sequential(*make(), PositionsLast())
    params, loss = list(model.parameters()), nn.MSELoss()
    data = [(X, torch.rand_like(model(X))) for X in (torch.rand(4, *shape), torch.rand(3, *shape))]
    operator = kind(model, loss, params, data, fisher_type="type-2")
    ggn = to_dense(GGNLinearOperator(model, loss, params, data)) * blocks(model, params, True)
    torch.testing.assert_close(to_dense(operator), ggn, rtol=TOLERANCE, atol=TOLERANCE)


class Decoder(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 3, 3, stride=2)

    def forward(self, x):
        return self.up(x, output_size=[8]).flatten(2).mT


def test_an_output_size_that_the_call_asks_for():
    model = Decoder()
    params, loss, X = list(model.parameters()), nn.MSELoss(), torch.rand(2, 2, 3)
    data = [(X, torch.rand_like(model(X)))]
    kfac = KFACLinearOperator(model, loss, params, data, fisher_type="type-2")
    ggn = to_dense(GGNLinearOperator(model, loss, params, data)) * blocks(model, params, True)
    torch.testing.assert_close(to_dense(kfac), ggn, rtol=TOLERANCE, atol=TOLERANCE)


class Tied(nn.Module):
    """An encoder and a decoder of one weight, which is another matrix for each."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(3, 2, 2)
        self.up.weight = self.down.weight

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


def test_a_weight_that_is_two_matrices_has_no_layer():
    model, X = Tied(), torch.rand(4, 2, 5)
    with pytest.raises(NotImplementedError, match=r"'up\.weight' is in an unsupported layer"):
        KFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), [(X, X)])
    optimizer = KFACOptimizer(model.parameters())
    nn.functional.mse_loss(model(X), X).backward()
    optimizer.step()
    assert optimizer.statistics()["fallback_parameters"] == 1.0


UNBATCHED = {
    "conv1d": (nn.Conv1d(2, 3, 2), (2, 4)),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 3, 3, 2)),
    "transposed1d": (nn.ConvTranspose1d(2, 3, 2), (2, 4)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), (2, 2, 2, 2)),
}


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", UNBATCHED)
def test_one_datum_without_its_axis_takes_the_same_steps(name, preconditioner):
    layer, shape = UNBATCHED[name]
    X, results = torch.rand(shape), []
    for x in (X, X.unsqueeze(0)):
        model = copy.deepcopy(layer).double()
        optimizer = KFACOptimizer(
            model.parameters(), preconditioner=preconditioner, fisher_type="empirical"
        )
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x).flatten(), model(x).detach().flatten() + 1).backward()
            optimizer.step()
        assert optimizer.statistics()["fallback_parameters"] == 0.0
        results.append(list(model.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("lr", [0.07, "auto"])
@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_the_optimizer_trains_them_all(preconditioner, lr):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.ConvTranspose1d(4, 4, 3, stride=2, output_padding=1, groups=2),
        nn.Tanh(),
        nn.Unflatten(2, (1, 3, 4)),
        nn.Conv3d(4, 3, (1, 2, 2), stride=(1, 1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    X, y = torch.randn(16, 2, 5), torch.randint(3, (16,))
    optimizer = KFACOptimizer(model.parameters(), lr=lr, preconditioner=preconditioner)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.statistics()["fallback_parameters"] == 0.0
    assert losses[-1] < 0.7 * losses[0]
