"""The curvature that is found for any loss, against autograd's dense Hessians at z."""

import pytest
import torch
from loss_cases import (
    BINARY,
    CASES,
    CLASS_WEIGHTS,
    DTYPE,
    EMPIRICAL_CASES,
    KEPT,
    LABELS,
    SOFT,
    C,
    Case,
    N,
    Y,
    log_prob,
    smoothed,
)
from torch import Generator, nn
from torch.nn import functional as F

from kfacopt.likelihoods import CrossEntropy, SquaredError, likelihood_of
from kfacopt.likelihoods.loss_parts import parts_of_loss
from kfacopt.likelihoods.parts import joint_vectors
from kfacopt.likelihoods.roots import KrylovSpace, lanczos_rows

pytestmark = pytest.mark.usefixtures("float64")

# Round-off of products, eigendecompositions and Cholesky's method: 1e-14 at most, in blocks of 24.
TOLERANCE = 1e-12
# Eigenvalues of the rest of H, I / |z| beside seven directions, to round-off of 24 steps.
LANCZOS_ERROR = 1e-8
MC_SAMPLES = 1000
MC_SIGMAS = 6.0
# Of the largest entry, beside the dtype's own error of what autograd computes (measured: 2 units).
LOW_PRECISION = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def found(loss, zs, samples=8):
    zs = [z.clone().requires_grad_() for z in zs]
    parts, _ = parts_of_loss(loss(*zs), zs, samples)
    return parts


def dense(loss, zs):
    """Return gradient and Hessian over all entries of all z, in float64."""
    sizes = [z.numel() for z in zs]

    def flat(x):
        pieces = zip(x.split(sizes), zs, strict=True)
        return loss(*[piece.reshape(z.shape) for piece, z in pieces])

    x = torch.cat([z.double().flatten() for z in zs])
    derivatives = torch.autograd.functional
    return derivatives.jacobian(flat, x), derivatives.hessian(flat, x)


def positive_part(H):
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    return (vectors * values.clamp(min=0)) @ vectors.T


def flattened(zs, members, tensors):
    """Bring tensors of some of the z to a vector over all entries, 0 elsewhere."""
    full = [torch.zeros(z.shape) for z in zs]
    for k, tensor in zip(members, tensors, strict=True):
        full[k] = tensor.double()
    return torch.cat([x.flatten() for x in full])


def matrix_of(parts, zs):
    columns = []
    for k, z in enumerate(zs):
        (part,) = [part for part in parts if k in part.members]
        for i in range(z.numel()):
            unit = [torch.zeros(zs[m].shape, dtype=part.output.dtype) for m in part.members]
            unit[part.members.index(k)].view(-1)[i] = 1
            columns.append(flattened(zs, part.members, part.product(unit)))
    return torch.stack(columns, 1)


def row_numbers(part, zs):
    """Number the rows of a part that are independent of each other."""
    if part.layout is not None:
        numbers = torch.arange(len(part.output)).unsqueeze(1).expand(part.output.shape)
        return part.layout.split(numbers.double())
    z = zs[part.members[0]]
    if not part.likelihood.has_data_axis(part.output):
        return [torch.zeros(z.shape)]
    return [torch.arange(z.shape[0]).reshape(-1, *[1] * (z.ndim - 1)).expand(z.shape)]


def same_rows(part, zs):
    """Return 1 for pairs of entries in one row of a part, else 0."""
    rows = flattened(zs, part.members, [1.0 + x for x in row_numbers(part, zs)])
    return ((rows[:, None] == rows[None, :]) & (rows > 0)).double()


def largest_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_positive_part(name):
    case = CASES[name]
    zs = case.z()
    expected = positive_part(dense(case.fisher or case.loss, zs)[1])
    parts = found(case.loss, zs)
    assert [part.kind for part in parts] == list(case.kinds)
    assert largest_error(matrix_of(parts, zs), expected) < TOLERANCE
    generator = Generator().manual_seed(3)
    for part in parts:
        mask = same_rows(part, zs)
        vectors = part.vectors("type-2", 1, generator)
        root = torch.stack([flattened(zs, part.members, v) for v in vectors])
        assert float((root.T @ root * mask - expected * mask).abs().max()) < TOLERANCE * float(
            expected.abs().max()
        )


# 1,000 draws of a label do not show how often the rarest of 80 classes is drawn.
DRAWN = [name for name in CASES if "many classes" not in name]


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_vectors_are_unbiased(name):
    case = CASES[name]
    zs = case.z()
    expected = positive_part(dense(case.fisher or case.loss, zs)[1])
    drawn = joint_vectors(
        found(case.loss, zs), len(zs), "mc", MC_SAMPLES, Generator().manual_seed(1)
    )
    samples = torch.stack([flattened(zs, range(len(zs)), v) for v in drawn]) * MC_SAMPLES**0.5
    assert len(samples) == MC_SAMPLES
    products = samples.unsqueeze(2) * samples.unsqueeze(1)
    allowed = MC_SIGMAS * products.std(0) / MC_SAMPLES**0.5 + TOLERANCE
    assert bool(((products.mean(0) - expected).abs() <= allowed).all())
    largest = expected.diagonal().argmax()
    assert allowed[largest, largest] < 0.5 * expected[largest, largest]


@pytest.mark.parametrize("name", EMPIRICAL_CASES)
def test_empirical_fisher_where_there_is_no_curvature(name):
    case = EMPIRICAL_CASES[name]
    zs = [z.requires_grad_() for z in case.z()]
    parts = found(case.loss, zs)
    assert [part.kind for part in parts] == list(case.kinds)
    gradients = torch.autograd.grad(case.loss(*zs), zs)
    expected = torch.block_diag(*[torch.outer(x, x) for g in gradients for x in g.flatten(1)])
    assert torch.allclose(matrix_of(parts, zs), expected, rtol=TOLERANCE, atol=0)
    for fisher_type in ("mc", "type-2"):
        for part, gradient in zip(parts, gradients, strict=True):
            ((vector,),) = part.vectors(fisher_type, 3, Generator())
            assert torch.equal(vector.abs(), gradient.abs())


TWINS = {
    "mean square": (lambda z: ((z - Y) ** 2).mean(), nn.MSELoss(), Y),
    "sum of squares": (lambda z: (z - Y).square().sum(), nn.MSELoss(reduction="sum"), Y),
    "indexing": (lambda z: -log_prob(z).mean(), nn.CrossEntropyLoss(), LABELS),
    "weights": (
        lambda z: -(CLASS_WEIGHTS[LABELS] * log_prob(z)).sum() / CLASS_WEIGHTS[LABELS].sum(),
        nn.CrossEntropyLoss(CLASS_WEIGHTS),
        LABELS,
    ),
    "ignored": (
        lambda z: -(KEPT * log_prob(z)).sum() / KEPT.sum(),
        nn.CrossEntropyLoss(),
        LABELS.where(KEPT > 0, -100),
    ),
    "smoothing": (smoothed, nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "soft targets": (
        lambda z: F.kl_div(z.log_softmax(-1), SOFT, reduction="batchmean"),
        nn.CrossEntropyLoss(),
        SOFT,
    ),
    "bce": (
        lambda z: (F.softplus(z) - z * BINARY).mean(),
        nn.BCEWithLogitsLoss(),
        BINARY,
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_losses_by_hand_have_the_vectors_of_their_named_twins(name):
    by_hand, named, target = TWINS[name]
    (z,) = Case(by_hand, ((N, C),), ()).z()
    (part,) = found(by_hand, [z])
    likelihood = likelihood_of(named)
    weights = likelihood.curvature_weights(z, target)
    one, other = Generator().manual_seed(5), Generator().manual_seed(5)
    roots = zip(
        part.vectors("type-2", 1, one), likelihood.hessian_root(z, weights, other), strict=True
    )
    for (found_column,), column in roots:
        assert torch.allclose(found_column, column, rtol=0, atol=TOLERANCE)
    if isinstance(likelihood, CrossEntropy | SquaredError):  # Bernoulli's gradients are not normal
        (drawn,) = next(part.vectors("mc", 1, one))
        twin = likelihood.sample_gradient(z, weights, other)
        assert torch.allclose(drawn, twin, rtol=0, atol=TOLERANCE)


IN_LOW_PRECISION = (
    "mean square",
    "huber",
    "poisson",
    "Bernoulli",
    "gather",
    "indexing",
    "cross entropy, last axis",
    "cross entropy, axis 1",
    "reverse kl",
    "focal of classes",
    "cosine",
    "distance",
    "gaussian, two tensors",
    "squares and cross entropy",
    "contrastive",
    "dice",
    "product of two of twelve",
)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", IN_LOW_PRECISION)
def test_low_precision(name, dtype):
    """What is close to a softmax or a diagonal in low precision alone is not taken for one."""
    case = CASES[name]
    zs = case.z(dtype)

    def loss(*z):
        return in_dtype(case.loss, *z)

    expected = positive_part(dense(case.fisher or case.loss, zs)[1])
    assert largest_error(matrix_of(found(loss, zs), zs), expected) < LOW_PRECISION[dtype]


def in_dtype(loss, *z):
    """Evaluate a loss with its float64 constants in the dtype of z."""
    constants = {k: v for k, v in loss.__globals__.items() if isinstance(v, torch.Tensor)}
    narrow = {k: v.to(z[0].dtype) for k, v in constants.items() if v.is_floating_point()}
    loss.__globals__.update(narrow)
    try:
        return loss(*z)
    finally:
        loss.__globals__.update(constants)


def softmax_loss(labels, axis=-1):
    def loss(z):
        return -z.log_softmax(axis).gather(axis, labels.unsqueeze(axis)).mean()

    return loss


CONFIDENT = 50.0 * torch.eye(C, dtype=DTYPE)[LABELS]
MOSTLY_CONFIDENT = torch.cat([Y[:2], CONFIDENT[2:]])
ODD = {
    "logits of 50": (softmax_loss(LABELS), 50 + Y, "categorical"),
    "confident rows": (softmax_loss(LABELS), MOSTLY_CONFIDENT, "categorical"),
    "bce at 50": (lambda z: (F.softplus(z) - z * BINARY.to(z)).mean(), 50 * Y, "diagonal"),
    "dice at 50": (
        lambda z: 1 - 2 * (z.sigmoid() * BINARY.to(z)).sum() / (z.sigmoid() + BINARY.to(z)).sum(),
        50 * Y,
        "mixed rows",
    ),
    "targets of 1e6": (lambda z: (z - 1e6 * Y.to(z)).square().mean(), Y, "diagonal"),
    "distances of 1e6": (lambda z: (z - 1e6 * Y.to(z)).norm(dim=1).mean(), Y, "blocks"),
    "outputs of 1e-4": (lambda z: (z - Y.to(z)).square().mean(), 1e-4 * Y, "diagonal"),
    "logits of 1e-4": (softmax_loss(LABELS), 1e-4 * Y, "categorical"),
    "cosine of 1e-4": (lambda z: 1 - F.cosine_similarity(z, Y.to(z)).mean(), 1e-4 * Y, "blocks"),
    "logits of 0": (softmax_loss(LABELS), torch.zeros(N, C, dtype=DTYPE), "categorical"),
    "equal outputs": (
        lambda z: (z - 0.3).square().mean(),
        torch.zeros(3, 200, dtype=DTYPE),
        "diagonal",
    ),
    "many classes": (
        softmax_loss(torch.arange(3)),
        torch.zeros(3, 200, dtype=DTYPE),
        "categorical",
    ),
    "confident rows at a temperature": (
        lambda z: F.cross_entropy(z / 2, LABELS),
        15 * torch.randn(N, 12, generator=Generator().manual_seed(2), dtype=DTYPE),
        "categorical",
    ),
    "small variances": (
        lambda z: (z[:, 1] + (z[:, 0] - 1e-4).square() * (-2 * z[:, 1]).exp() / 2).sum(),
        torch.tensor([[0.0, -9.2], [0.5e-4, -9.0]], dtype=DTYPE),
        "blocks",
    ),
    "one row": (lambda z: (z - Y[:1].to(z)).square().mean(), Y[:1], "diagonal"),
    "one row of logits": (softmax_loss(LABELS[:1]), Y[:1], "categorical"),
    "one class": (softmax_loss(torch.zeros(N, dtype=torch.long)), Y[:, :1], "empirical"),
    "vector": (lambda z: (z - Y[:, 0].to(z)).square().mean(), Y[:, 1], "diagonal"),
    "column against a vector": (
        lambda z: (z - Y[:, 0].to(z)).square().mean(),
        Y[:, 1:2],
        "diagonal",
    ),
    "number": (lambda z: (z - 1).square(), Y[0, 0], "diagonal"),
    "scores over positions": (softmax_loss(LABELS[:, None] % 3, 1), Y[:, :3, None], "categorical"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ODD)
def test_odd_values_and_shapes(name, dtype):
    loss, z, kind = ODD[name]
    z = z.to(dtype)
    (part,) = found(loss, [z])
    if dtype != torch.bfloat16:  # there what couples entries, and is far smaller, is not seen
        assert part.kind == kind
    expected = positive_part(dense(loss, [z])[1])
    error = matrix_of([part], [z]) - expected
    # Where the loss is computed of saturated values in bfloat16, its own error is 15 %.
    share = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.15}[dtype]
    assert float(error.abs().max()) <= share * float(expected.abs().max())
    for fisher_type in ("mc", "type-2"):
        for vectors in part.vectors(fisher_type, 2, Generator()):
            assert all(bool(v.isfinite().all()) for v in vectors)


@pytest.mark.parametrize("loss", [lambda z: (z**2).sum(), lambda z: z.logsumexp(-1).sum()])
def test_no_data(loss):
    (part,) = found(loss, [torch.zeros(0, 3)])
    assert [[v.shape for v in vectors] for vectors in part.vectors("mc", 1, Generator())] == [
        [(0, 3)]
    ]


@pytest.mark.parametrize("name", ["indexing", "reverse kl", "contrastive", "log-cosh"])
def test_nan_stays_nan(name):
    z = Y.clone()
    z[1, 2] = torch.nan
    (part,) = found(CASES[name].loss, [z])
    for fisher_type in ("mc", "type-2"):
        total = sum(v.square().sum() for (v,) in part.vectors(fisher_type, 1, Generator()))
        assert bool(total.isnan())


SHAPES = [(5,), (1, 1), (4, 1), (3, 2, 4), (2, 3, 3), (2, 1, 3, 2), (17, 2), (1, 2, 1, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    (z,) = Case(None, (shape,), ()).z()
    couplings = {
        "entries": lambda z: z.square().sum() + z.exp().sum(),
        "rows": lambda z: z.logsumexp(-1).square().sum() + z.square().sum(),
        "data": lambda z: (z.flatten(1) if z.ndim > 1 else z).sum(-1).exp().sum() + (z**2).sum(),
        "all": lambda z: z.sum().square() + z.square().sum(),
    }
    for loss in couplings.values():
        expected = positive_part(dense(loss, [z])[1])
        parts = found(loss, [z])
        assert largest_error(matrix_of(parts, [z]), expected) < TOLERANCE


@pytest.mark.parametrize("rows", [2, 5, 16, 40])
def test_no_two_rows_that_see_each_other_hide(rows):
    """Two of many rows, whose signs a random look would make equal every second time."""
    z = torch.randn(rows, 3)
    for i, j in [(0, 1), (0, rows - 1), (rows // 2 - 1, rows // 2)]:

        def loss(z, i=i, j=j):
            return (z[:, 0] * z[:, 1]).sum() + (z**4).sum() + (z[i] * z[j]).sum()

        (part,) = found(loss, [z])
        assert part.kind.startswith("mixed rows")


def test_no_two_tensors_that_see_each_other_hide():
    zs = [torch.randn(2) for _ in range(11)]
    for i in range(11):
        for j in range(i):

            def loss(*z, i=i, j=j):
                return sum(x.square().sum() for x in z) + (z[i] * z[j]).sum()

            assert len(found(loss, zs)) == 1


def test_detached_factors_are_no_second_derivative():
    (part,) = found(lambda z: (z.softmax(-1).detach() * z.roll(1, -1).square()).sum(), [Y])
    assert part.kind == "diagonal"
    (part,) = found(lambda z: (z.sum(-1, keepdim=True).detach() * z).sum(), [Y])
    assert part.kind == "empirical"
    (part,) = found(lambda z: RolledGradient.apply(z).sum(), [Y])
    assert part.kind == "empirical (second derivative not symmetric)"


class RolledGradient(torch.autograd.Function):
    """The identity, whose gradient is that of no function."""

    @staticmethod
    def forward(context, z):
        context.save_for_backward(z)
        return z.clone()

    @staticmethod
    def backward(context, gradient):
        (z,) = context.saved_tensors
        return gradient * z.roll(1, -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_confident_rows_alone_have_no_curvature(dtype):
    for labels in (LABELS, (LABELS + 1) % C):
        z = CONFIDENT.to(dtype)
        parts = found(softmax_loss(labels), [z])
        (gradient,) = torch.autograd.grad(softmax_loss(labels)(z.requires_grad_()), z)
        # Nothing, or the empirical Fisher of rows whose labels are wrong.
        assert float(matrix_of(parts, [z]).norm()) <= 1e-6 + float(gradient.norm()) ** 2


def test_wide_blocks_by_lanczos():
    """What is drawn is √H⁺ s for signs s; products are right where the rest of H is c I."""
    z = torch.randn(2, 40)

    def loss(z):
        return (z.norm(dim=-1) + z[:, :5].exp().sum(-1) + 3 * z[:, 0] * z[:, 1]).sum()

    expected = positive_part(dense(loss, [z])[1])
    (part,) = found(loss, [z])
    assert part.kind == "blocks, 24 Lanczos steps"
    v = torch.randn(2, 40)
    (product,) = part.product([v])
    assert largest_error(product.flatten(), expected @ v.flatten()) < LANCZOS_ERROR

    blocks = torch.stack([expected[:40, :40], expected[40:, 40:]])
    s = torch.randn(2, 40).sign()
    space = KrylovSpace.of(
        *lanczos_rows(lambda x: torch.einsum("rcd,rd->rc", blocks, x), s, 24), TOLERANCE
    )
    values, vectors = torch.linalg.eigh(blocks)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT
    drawn = torch.einsum("rcd,rd->rc", root, s)
    assert largest_error(space.root_times_start(s), drawn) < LANCZOS_ERROR
