"""Weights and ignored targets: what matrices of a mean loss are, and that scaling weights is none.

With s_n a datum's summed loss and Z what the mean divides by, the empirical Fisher is
N / Z² Σ s sᵀ, where N counts the data that are not ignored, whatever their weight.
"""

import dense_curvature as dense
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import EFLinearOperator, EKFACLinearOperator, KFACLinearOperator, KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12  # of float64 sums of a few numbers of about 1
C, P = 3, 4  # classes, positions
SIZES = [2, 1, 5]
WEIGHT = [0.5, 2.0, 3.0]


class Head(nn.Module):
    """Classes of each datum `[N, C]`, or of each position `[N, C, P]`."""

    def __init__(self, log_softmax=False):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, C)
        self._log_softmax = log_softmax

    def forward(self, x):
        z = self.head(self.body(x).tanh())
        z = z if z.ndim == 2 else z.transpose(1, 2)
        return z.log_softmax(1) if self._log_softmax else z


def ce(scale=1.0, weight=WEIGHT, **options):
    return nn.CrossEntropyLoss(scale * torch.tensor(weight), **options)


def labels(y):
    return y


def probabilities(y):
    return F.one_hot(y, C).to(torch.float64) * 0.7 + 0.1


# name: (loss by a factor of its weights, targets, shape of a datum's targets,
#        Z of all labels at a factor of 1, the label that is ignored)
CASES = {
    "class weights": (ce, labels, (), lambda w: w.sum(), None),
    "ignored": (lambda c: ce(c, ignore_index=1), labels, (), lambda w: w.sum(), 1),
    "class of weight 0": (lambda c: ce(c, [0.0, *WEIGHT[1:]]), labels, (), None, None),
    "smoothed": (lambda c: ce(c, label_smoothing=0.2), labels, (), lambda w: w.sum(), None),
    "pixels": (ce, labels, (P,), lambda w: w.sum(), None),
    "pixels, ignored": (lambda c: ce(c, ignore_index=1), labels, (P,), lambda w: w.sum(), 1),
    "nll": (
        lambda c: nn.NLLLoss(c * torch.tensor(WEIGHT), ignore_index=0),
        labels,
        (),
        lambda w: w.sum(),
        0,
    ),
    "probabilities": (ce, probabilities, (), lambda w: w.numel(), None),
    "bce": (
        lambda c: nn.BCEWithLogitsLoss(torch.tensor(WEIGHT), pos_weight=torch.tensor(WEIGHT)),
        probabilities,
        (),
        lambda w: C * w.numel(),
        None,
    ),
}
SCALED = [name for name, case in CASES.items() if case[1] is labels]


def make(name, scale=1.0):
    """Return the model, the loss, batches, N and Z."""
    loss_of, target_of, positions, normalizer, ignored = CASES[name]
    model, loss = Head(name == "nll"), loss_of(scale)
    lead = (P, 4) if positions else (4,)
    y = [torch.randint(C, (n, *positions)) for n in SIZES]
    y[0].fill_(2)  # its Z is another one
    y[1].fill_(2)  # so that no batch is ignored as a whole
    kept = torch.cat(y) != ignored if ignored is not None else torch.ones_like(torch.cat(y))
    weights = torch.tensor(WEIGHT)
    if normalizer is None:
        normalizer, weights = torch.sum, torch.tensor([0.0, *WEIGHT[1:]])
    Z = normalizer((scale * weights)[torch.cat(y)][kept.bool()])
    N = kept.sum() / torch.Size(positions).numel()
    return model, loss, [(torch.randn(len(t), *lead), target_of(t)) for t in y], N, Z


def dense_of(operator):
    return operator @ torch.eye(operator.shape[1])


def bias_blocks(model, loss, data, fisher_type):
    """Yield K-FAC's and EKFAC's block of the last bias, which is exact."""
    for kind in (KFACLinearOperator, EKFACLinearOperator):
        options = {"fisher_type": fisher_type, "kfac_approx": "reduce"}
        yield dense_of(kind(model, loss, [model.head.bias], data, **options))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_empirical_fishers(name):
    model, loss, data, N, Z = make(name)
    params = list(model.parameters())
    expected = dense.weighted_empirical_fisher(model, loss, params, data, N, Z)
    close(dense_of(EFLinearOperator(model, loss, params, data)), expected)
    for block in bias_blocks(model, loss, data, "empirical"):
        close(block, expected[-C:, -C:])


@pytest.mark.parametrize("name", [name for name in CASES if name != "nll"])
def test_type_2_is_the_ggn(name):
    model, loss, data, _, _ = make(name)
    expected = dense.ggn(model, loss, [model.head.bias], data)
    for block in bias_blocks(model, loss, data, "type-2"):
        close(block, expected)


@pytest.mark.parametrize("name", SCALED)
def test_a_factor_of_all_class_weights_changes_nothing(name):
    """The mean divides by it."""
    matrices = []
    for scale in (1.0, 1e-3, 50.0):
        torch.manual_seed(0)
        model, loss, data, _, _ = make(name, scale)
        EF = EFLinearOperator(model, loss, list(model.parameters()), data)
        matrices.append([dense_of(EF), *bias_blocks(model, loss, data, "empirical")])
    for scaled in matrices[1:]:
        close(scaled, matrices[0])


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["class weights", "ignored", "smoothed", "probabilities", "nll"])
def test_the_optimizers_empirical_factors(name, preconditioner):
    """Of micro-batches with a Z of their own, whose means are averaged."""
    model, loss, data, _, _ = make(name)
    optimizer = KFACOptimizer(
        model.parameters(),
        lr=0.0,
        fisher_type="empirical",
        factor_update_interval=1,
        ema_decay=0.0,
        preconditioner=preconditioner,
    )
    for X, y in data:
        (loss(model(X), y) / len(data)).backward()
    optimizer.step()
    params, options = list(model.parameters()), {"fisher_type": "empirical"}
    parts = [KFACLinearOperator(model, loss, params, [batch], **options) for batch in data]
    for layer in ("body", "head"):
        want = sum(K.factors(layer).grad_output_factor for K in parts) / len(data)
        close(optimizer.factors(layer).grad_output_factor, want)


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_a_mean_over_no_terms_is_an_error(fisher_type):
    model, X = Head(), torch.randn(4, 4)
    for loss, y in (
        (nn.CrossEntropyLoss(ignore_index=2), torch.full((4,), 2)),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 0.0, 1.0])), torch.full((4,), 1)),
        (nn.MSELoss(), torch.zeros(0, C)),
    ):
        data = [(X[: len(y)], y)]
        K = KFACLinearOperator(model, loss, [model.head.bias], data, fisher_type=fisher_type)
        with pytest.raises(ValueError, match="mean over no terms"):
            K.trace()
    # one batch of several may be ignored
    loss, ignored = nn.CrossEntropyLoss(ignore_index=2), (X, torch.full((4,), 2))
    data = [(X, torch.tensor([0, 1, 1, 0]))]
    traces = [
        KFACLinearOperator(model, loss, [model.head.bias], d, fisher_type="type-2").trace()
        for d in (data, [ignored, *data])
    ]
    close(*traces)
