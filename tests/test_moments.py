"""Second moments without copies of the rows that they sum, against these copies in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACLinearOperator, KFACOptimizer
from kfacopt.kfac.layers import patches
from kfacopt.linalg import gram

pytestmark = pytest.mark.usefixtures("float64")

RELATIVE_TOLERANCE = 1e-13

CONVOLUTIONS = {
    # name: (arguments, height and width of the input, whether there is a fast path)
    "3x3": ({"kernel_size": 3, "padding": 1}, (8, 7), True),
    "3x3-no-padding": ({"kernel_size": 3}, (6, 5), True),
    "5x3-two-groups": ({"kernel_size": (5, 3), "padding": (2, 0), "groups": 2}, (9, 4), True),
    "depthwise": ({"kernel_size": 3, "padding": 1, "groups": 4}, (5, 5), True),
    "circular": (
        {"kernel_size": (2, 3), "padding": 1, "padding_mode": "circular"},
        (5, 6),
        True,
    ),
    "same-uneven": ({"kernel_size": (4, 2), "padding": "same"}, (6, 5), True),
    "dilated": ({"kernel_size": 3, "dilation": 2, "padding": 2}, (7, 6), True),
    "dilated-as-high-as-the-output": ({"kernel_size": 3, "dilation": 2}, (8, 7), True),
    "stride-along-width": ({"kernel_size": 3, "stride": (1, 2), "padding": 1}, (6, 9), True),
    "1x1": ({"kernel_size": 1}, (3, 4), True),
    "1x1-strided": ({"kernel_size": 1, "stride": 2}, (5, 6), True),
    "1x3-strided": ({"kernel_size": (1, 3), "stride": (3, 2), "dilation": (2, 1)}, (8, 7), True),
    "stride": ({"kernel_size": 3, "stride": 2, "padding": 1}, (8, 7), False),
    "as-high-as-output": ({"kernel_size": (4, 2)}, (7, 5), True),
    "higher-than-output": ({"kernel_size": (4, 2)}, (5, 5), False),
}


def dense_patches(module, x):
    """Patches [B, N S, d] from `F.unfold` of the input that the module pads itself."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
    per_group = columns.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2)
    return per_group.flatten(1, 2)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_of_a_convolution(name):
    arguments, shape, fast = CONVOLUTIONS[name]
    module, x = nn.Conv2d(4, 8, **arguments), torch.randn(3, 4, *shape)
    x[:, :, 0] *= 1e3  # a border that is left out must leave no trace, not even as round-off
    rows = dense_patches(module, x)
    expected = rows.mT @ rows
    found = patches.patch_moment(module, x)
    assert (found is not None) == fast
    if found is not None:
        scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
        bound = RELATIVE_TOLERANCE * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        assert ((found - expected).abs() <= bound).all()
    sums, positions = patches.patch_sums(module, x)
    assert positions * 3 == rows.shape[1]
    assert torch.allclose(sums.sum(0).reshape(module.groups, -1), rows.sum(1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 7, "padding": 3},
        {"kernel_size": 5, "padding": 2, "stride": 2},
        {"kernel_size": 5, "padding": 2, "padding_mode": "circular"},
        {"kernel_size": (7, 3), "padding": (4, 1), "dilation": (2, 1)},
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 4)])
def test_depthwise_convolutions_of_small_inputs(arguments, shape):
    module = nn.Conv2d(4, 8, groups=4, **arguments)
    if module.padding_mode == "circular" and min(shape) < 2:
        pytest.skip("torch pads no further than the input is wide")
    x = torch.randn(3, 4, *shape)
    try:
        rows = dense_patches(module, x)
    except RuntimeError:
        pytest.skip("the kernel is larger than the padded input")
    one = dense_patches(module, x[:1])
    for found, own in (
        (patches.depthwise_moment(module, x), rows),
        (patches.depthwise_moment(module, x[0]), one),
    ):
        moment, sums, count = found
        torch.testing.assert_close(moment, own.mT @ own)
        torch.testing.assert_close(sums, own.sum(1))
        assert count == own.shape[1]
    assert patches.depthwise_moment(nn.Conv2d(4, 8, 7, padding=3), x) is None
    assert patches.depthwise_moment(module, torch.randn(3, 4, 8, 8)) is None


def test_patches_of_one_image_and_of_none():
    module, x = nn.Conv2d(4, 8, 3, padding=1), torch.randn(4, 6, 5)
    one = patches.patch_moment(module, x)
    assert torch.equal(one, patches.patch_moment(module, x.unsqueeze(0)))
    none = patches.patch_moment(module, x.new_empty(0, 4, 6, 5))
    assert torch.equal(none, torch.zeros_like(one))


@pytest.mark.parametrize("d", [1, gram.BLOCK_WIDTH, gram.BLOCK_WIDTH + 1, 3 * gram.BLOCK_WIDTH])
@pytest.mark.parametrize("transposed", [False, True])
def test_gram(d, transposed):
    rows = torch.randn(2, d, 7).mT if transposed else torch.randn(2, 7, d)
    expected = torch.einsum("bni,bnj->bij", rows, rows)
    found = gram.gram(rows)
    assert torch.allclose(found, expected, rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE)


def test_gram_within_a_larger_matrix():
    rows, out = torch.randn(2, 7, 300), torch.zeros(2, 302, 301)
    gram.gram(rows, out=out[:, 1:301, :300])
    assert torch.allclose(out[:, 1:301, :300], rows.mT @ rows)
    assert not out[:, 0].any()
    assert not out[:, 301].any()
    assert not out[..., 300].any()


# Part of a batch --------------------------------------------------------------------------------


def small_network():
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, groups=1), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3, bias=False)
    )


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_factors_of_part_of_a_batch_are_unbiased(approx, fisher_type):
    """Each step's factors are those of one of the six pairs of four data; all pairs occur."""
    model, X, y = small_network(), torch.randn(4, 2, 3, 2), torch.tensor([0, 2, 1, 0])
    params, options = list(model.parameters()), {"fisher_type": fisher_type, "kfac_approx": approx}
    options["separate_weight_and_bias"] = False

    def factors_of(X, y):
        operator = KFACLinearOperator(model, nn.CrossEntropyLoss(), params, [(X, y)], **options)
        return torch.cat([f.flatten() for n in ("0", "3") for f in operator.factors(n)])

    pairs = [list(pair) for pair in itertools.combinations(range(4), 2)]
    of_pairs = torch.stack([factors_of(X[pair], y[pair]) for pair in pairs])
    assert torch.allclose(of_pairs.mean(0), factors_of(X, y))  # equally likely, so unbiased
    optimizer = KFACOptimizer(
        params,
        lr=0.0,
        ema_decay=0.0,
        fisher_type=fisher_type,
        kfac_approx=approx,
        factor_batch_fraction=0.5,
        factor_update_interval=1,
    )
    drawn = []
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
        found = torch.cat([f.flatten() for n in ("0", "3") for f in optimizer.factors(n)])
        same = [torch.allclose(found, pair) for pair in of_pairs]
        assert sum(same) == 1
        drawn.append(same.index(True))
    assert set(drawn) == set(range(6))


def test_part_of_a_batch_for_ekfac_and_for_a_single_datum():
    model, X, y = small_network(), torch.randn(2, 3, 2), torch.tensor([1])
    steps = []
    for fraction in (1.0, 0.25):
        torch.manual_seed(0)
        optimizer = KFACOptimizer(
            model.parameters(),
            lr=0.0,
            preconditioner="ekfac",
            fisher_type="type-2",
            factor_batch_fraction=fraction,
        )
        F.cross_entropy(model(X.expand(4, 2, 3, 2)), y.expand(4)).backward()
        optimizer.step()
        steps.append(optimizer.state[model[0].weight]["second_moments"])
    assert torch.allclose(*steps)  # all data are the same: one of four tells what all do
