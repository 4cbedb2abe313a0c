"""Likelihoods against autograd's Hessians of the losses themselves."""

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from kfacopt.likelihoods import UnsupportedLossError, likelihood_of
from kfacopt.optim.watch.loss_calls import KNOWN_LOSSES, recognise_call

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
MC_SAMPLES = 1500
MC_SIGMAS = 6.0


def labels(*shape, classes=3):
    return torch.randint(classes, shape)


def case_table():
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    pos_weight = torch.tensor([3.0, 0.5], dtype=torch.float64)
    ce = nn.CrossEntropyLoss
    return {
        "ce": (lambda r: ce(reduction=r), (4, 3), lambda: labels(4)),
        "ce-weight": (lambda r: ce(weight, reduction=r), (4, 3), lambda: labels(4)),
        "ce-ignored": (
            lambda r: ce(ignore_index=1, reduction=r),
            (4, 3),
            lambda: torch.tensor([1, 0, 2, 1]),
        ),
        "ce-smoothed-weighted-ignored": (
            lambda r: ce(weight, ignore_index=2, label_smoothing=0.3, reduction=r),
            (4, 3),
            lambda: torch.tensor([1, 0, 2, 1]),
        ),
        "ce-probabilities": (
            lambda r: ce(weight, label_smoothing=0.1, reduction=r),
            (4, 3),
            lambda: torch.rand(4, 3).softmax(1),
        ),
        "ce-positions": (lambda r: ce(weight, reduction=r), (2, 3, 4), lambda: labels(2, 4)),
        "ce-grid": (lambda r: ce(reduction=r), (2, 3, 2, 2), lambda: labels(2, 2, 2)),
        "ce-one-datum": (lambda r: ce(reduction=r), (3,), lambda: labels()),
        "mse": (lambda r: nn.MSELoss(reduction=r), (4, 3), lambda: torch.rand(4, 3)),
        "mse-vector": (lambda r: nn.MSELoss(reduction=r), (4,), lambda: torch.rand(4)),
        "mse-positions": (
            lambda r: nn.MSELoss(reduction=r),
            (2, 3, 2),
            lambda: torch.rand(2, 3, 2),
        ),
        "mse-scalar": (lambda r: nn.MSELoss(reduction=r), (), lambda: torch.rand(())),
        "bce": (
            lambda r: nn.BCEWithLogitsLoss(reduction=r),
            (4, 2),
            lambda: labels(4, 2, classes=2),
        ),
        "bce-soft-weights": (
            lambda r: nn.BCEWithLogitsLoss(
                torch.tensor([[0.2], [1.0], [0.0], [3.0]]), pos_weight=pos_weight, reduction=r
            ),
            (4, 2),
            lambda: torch.rand(4, 2),
        ),
    }


CASES = case_table()


def exact_hessian(loss, z, y):
    y = y.to(z) if isinstance(loss, nn.BCEWithLogitsLoss) else y
    size = z.numel()
    return torch.autograd.functional.hessian(lambda x: loss(x, y), z).reshape(size, size)


def datum_mask(z):
    """Ones where two entries of z belong to the same datum (a vector of 3 is one of 3 classes)."""
    rows = z.shape[0] if z.ndim > 1 or z.numel() > 3 else 1
    datum = torch.arange(rows).repeat_interleave(z.numel() // rows)
    return (datum[:, None] == datum[None, :]).to(z)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_hessian_root_and_samples(name, reduction):
    make, shape, target = CASES[name]
    loss, z, y = make(reduction), torch.randn(shape), target()
    expected = exact_hessian(loss, z, y)
    likelihood = likelihood_of(loss)
    weights = likelihood.curvature_weights(z, y)
    mask = datum_mask(z)

    root = torch.stack(list(likelihood.hessian_root(z, weights, Generator()))).reshape(
        -1, z.numel()
    )
    assert torch.allclose(root.T @ root * mask, expected, atol=TOLERANCE)

    v = torch.randn_like(z)
    product = likelihood.hessian_product(z, weights, v)
    assert torch.allclose(product.flatten(), expected @ v.flatten(), atol=TOLERANCE)

    generator = Generator().manual_seed(1)
    samples = torch.stack(
        [likelihood.sample_gradient(z, weights, generator) for _ in range(MC_SAMPLES)]
    ).reshape(-1, z.numel())
    products = samples.unsqueeze(2) * samples.unsqueeze(1)
    error = (products.mean(0) - expected).abs()
    allowed = MC_SIGMAS * products.std(0) / MC_SAMPLES**0.5 + TOLERANCE
    assert bool((error <= allowed).all())
    # and the bound is not so wide that a factor of 2 would pass
    largest = expected.diagonal().argmax()
    assert allowed[largest, largest] < 0.5 * expected[largest, largest]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nll_after_log_softmax_is_cross_entropy(reduction):
    weight = torch.tensor([0.5, 2.0, 1.5])
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
    expected = exact_hessian(
        nn.CrossEntropyLoss(weight, ignore_index=1, reduction=reduction), logits, y
    )
    nll = likelihood_of(nn.NLLLoss(weight, ignore_index=1, reduction=reduction))
    z = logits.log_softmax(1)
    weights = nll.curvature_weights(z, y)
    jacobian = torch.func.jacrev(lambda x: x.log_softmax(1))(logits).reshape(12, 12)
    root = torch.stack(list(nll.hessian_root(z, weights, Generator()))).flatten(1) @ jacobian
    assert torch.allclose(root.T @ root * datum_mask(z), expected, atol=TOLERANCE)
    draws = Generator().manual_seed(0)
    samples = torch.stack([nll.sample_gradient(z, weights, draws) for _ in range(MC_SAMPLES)])
    moved = samples.flatten(1) @ jacobian
    products = moved.unsqueeze(2) * moved.unsqueeze(1)
    allowed = MC_SIGMAS * products.std(0) / MC_SAMPLES**0.5 + TOLERANCE
    assert bool(((products.mean(0) - expected).abs() <= allowed).all())


def test_nll_of_logits_is_refused():
    nll = likelihood_of(nn.NLLLoss())
    with pytest.raises(UnsupportedLossError, match="log-probabilities"):
        nll.sample_gradient(torch.randn(4, 3), torch.ones(4), Generator())


@pytest.mark.parametrize("scale", [0.25, -3.0])
def test_upstream_factor_scales_the_curvature(scale):
    z, y = torch.randn(4, 3), labels(4)
    likelihood = likelihood_of(nn.CrossEntropyLoss())
    plain = likelihood.curvature_weights(z, y)
    scaled = likelihood.curvature_weights(z, y, torch.tensor(scale))
    assert torch.allclose(scaled, abs(scale) * plain)


def test_unreduced_losses_take_a_factor_for_each_term():
    z, y, mask = torch.randn(4, 3), labels(4), torch.tensor([1.0, 0.0, 2.0, 1.0])
    expected = torch.autograd.functional.hessian(
        lambda x: (F.cross_entropy(x, y, reduction="none") * mask).sum() / mask.sum(), z
    ).reshape(12, 12)
    likelihood = likelihood_of(nn.CrossEntropyLoss(reduction="none"))
    weights = likelihood.curvature_weights(z, y, mask / mask.sum())
    root = torch.stack(list(likelihood.hessian_root(z, weights, Generator()))).reshape(
        -1, z.numel()
    )
    assert torch.allclose(root.T @ root * datum_mask(z), expected, atol=TOLERANCE)


def test_type_2_columns():
    """One for each entry of a datum: classes times positions."""
    ce = likelihood_of(nn.CrossEntropyLoss())
    for shape, columns in (((5, 3), 3), ((5, 3, 4), 12)):
        z = torch.randn(shape)
        root = list(ce.hessian_root(z, ce.term_weights(z, None), Generator()))
        assert len(root) == columns


# Calls of functions ----------------------------------------------------------------------------

Y = torch.tensor([0, 2, 1, 0])
CALLS = {
    "ce-positional-weight": (F.cross_entropy, (Y, torch.tensor([1.0, 2.0, 3.0]).double()), {}),
    "ce-legacy-sum": (F.cross_entropy, (Y,), {"size_average": False}),
    "ce-smoothing": (F.cross_entropy, (Y,), {"label_smoothing": 0.2, "ignore_index": 0}),
    "mse-broadcast": (F.mse_loss, (torch.zeros(1, 3).double(),), {}),
    "mse-sum": (F.mse_loss, (torch.zeros(4, 3).double(),), {"reduction": "sum"}),
    "bce": (F.binary_cross_entropy_with_logits, (torch.rand(4, 3).double().round(),), {}),
    "bce-weight": (
        F.binary_cross_entropy_with_logits,
        (torch.ones(4, 3).double(), torch.rand(4, 1).double()),
        {"pos_weight": torch.tensor([1.0, 2.0, 3.0]).double(), "reduction": "sum"},
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:size_average", "ignore:Using a target size")
def test_recognised_calls_have_the_hessian_of_the_call(name):
    function, args, kwargs = CALLS[name]
    z = torch.randn(4, 3)
    expected = torch.autograd.functional.hessian(lambda x: function(x, *args, **kwargs), z)
    call = recognise_call(function, (z, *args), kwargs)
    weights = call.likelihood.curvature_weights(call.output, call.target)
    root = list(call.likelihood.hessian_root(call.output, weights, Generator()))
    root = torch.stack(root).flatten(1)
    assert torch.allclose(root.T @ root * datum_mask(z), expected.reshape(12, 12), atol=TOLERANCE)


def test_swapped_and_twofold_outputs_of_mse():
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    call = recognise_call(F.mse_loss, (a, b), {})
    grads = torch.autograd.grad(call.output.sum(), (a, b))
    assert torch.equal(grads[0], torch.ones(4, 3))
    assert torch.equal(grads[1], -torch.ones(4, 3))


def test_unknown_and_unsupported():
    z = torch.randn(4, 3)
    assert F.l1_loss not in KNOWN_LOSSES
    with pytest.raises(UnsupportedLossError, match="L1Loss is not supported; give one"):
        likelihood_of(nn.L1Loss())
    with pytest.raises(UnsupportedLossError, match="negative weights"):
        likelihood_of(nn.CrossEntropyLoss(torch.tensor([1.0, -1.0, 1.0])))
    target = torch.rand(4, 3).softmax(1).requires_grad_()
    with pytest.raises(UnsupportedLossError, match="detach it"):
        recognise_call(F.cross_entropy, (z, target), {})
    with pytest.raises(ValueError, match="reduction must be"):
        recognise_call(F.mse_loss, (z, z), {"reduction": "average"})
    weighted = likelihood_of(nn.CrossEntropyLoss(torch.ones(3)))
    with pytest.raises(UnsupportedLossError, match="class weights need the targets"):
        weighted.curvature_weights(z, None)
