"""`kfacopt.diagnose`: its numbers against dense matrices, and what it leaves as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from dense_curvature import ggn as dense_ggn
from dense_curvature import predictions, targets
from torch import nn
from torch.nn import functional as F

from kfacopt import (
    EKFACLinearOperator,
    KFACLinearOperator,
    KFACOptimizer,
    diagnose,
)
from kfacopt.diagnosis import exact

DAMPING = 0.02
# All oracles are dense, in float64; conjugate gradients stop at a relative residual of 1e-5, which
# the largest over the smallest eigenvalue of the damped matrix (below 100 here) multiplies.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
ITERATED = {"rtol": 1e-3, "atol": 1e-3}


class Tokens(nn.Module):
    """A network with positions, so that expand and reduce differ."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh().mean(1))


def cross_entropy_case():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    data = [(torch.randn(n, 5).double(), torch.randint(4, (n,))) for n in (8, 6)]
    return model, nn.CrossEntropyLoss(), data


def token_case():
    model = Tokens().double()
    data = [(torch.randn(9, 3, 4).double(), torch.randn(9, 3).double())]
    return model, nn.MSELoss(), data


CASES = {"cross entropy": cross_entropy_case, "tokens": token_case}


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient_of(model, loss_func, data):
    params = list(model.parameters())
    loss = loss_func(predictions(model, data), targets(data))
    return flat(torch.autograd.grad(loss, params)), loss.detach()


def kfac_matrices(model, loss_func, data):
    """K-FAC's and EKFAC's as dense matrices, and their damped inverses."""
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    options["check_deterministic"] = False
    params = list(model.parameters())
    found = {}
    for approx in ("expand", "reduce"):
        K = KFACLinearOperator(model, loss_func, params, data, kfac_approx=approx, **options)
        found["K-FAC" if approx == "expand" else "K-FAC reduce"] = K
    found["EKFAC"] = EKFACLinearOperator(model, loss_func, params, data, **options)
    return {name: (_dense(K), _dense(K.inverse(DAMPING))) for name, K in found.items()}


def _dense(operator):
    return operator @ torch.eye(operator.shape[1], dtype=torch.float64)


def block_ranges(model):
    """The entries of each layer, whose weight and bias are neighbours."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    sizes = [sum(p.numel() for p in m.parameters()) for m in layers]
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]


def probed(monkeypatch):
    """Let no matrix be formed."""
    monkeypatch.setattr(exact, "FORMED", 0)


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]()


# Numbers ------------------------------------------------------------------------------------------


def test_distances_are_those_of_dense_blocks(case):
    model, loss_func, data = case
    exact_matrix = dense_ggn(model, loss_func, list(model.parameters()), data)
    candidates = kfac_matrices(model, loss_func, data)
    report = diagnose(model, loss_func, data, damping=DAMPING)
    assert [layer.estimator for layer in report.layers] == ["formed", "formed"]
    for layer, own in zip(report.layers, block_ranges(model), strict=True):
        block = exact_matrix[own, own]
        for name, distance in layer.distance.items():
            expected = (candidates[name][0][own, own] - block).norm() / block.norm()
            np.testing.assert_allclose(distance, expected, **CLOSE)
            assert layer.distance_error[name] == 0
        assert ("K-FAC reduce" in layer.distance) == isinstance(model, Tokens)


def test_share_outside_is_that_of_the_dense_matrix(case):
    model, loss_func, data = case
    matrix = dense_ggn(model, loss_func, list(model.parameters()), data)
    own = sum(matrix[r, r].square().sum() for r in block_ranges(model))
    report = diagnose(model, loss_func, data)
    np.testing.assert_allclose(report.outside.share, 1 - own / matrix.square().sum(), **CLOSE)


def dense_steps(model, loss_func, data):
    """All directions, by dense solves, and the exact one."""
    matrix = dense_ggn(model, loss_func, list(model.parameters()), data)
    gradient, _ = gradient_of(model, loss_func, data)
    identity = torch.eye(len(matrix)).double()
    steps = {"gradient": gradient}
    for name, (_, inverse) in kfac_matrices(model, loss_func, data).items():
        steps[name] = inverse @ gradient
    parts = [
        torch.linalg.solve(matrix[r, r] + DAMPING * identity[r, r], gradient[r])
        for r in block_ranges(model)
    ]
    steps["exact blocks"] = torch.cat(parts)
    damped = matrix + DAMPING * identity
    return steps, torch.linalg.solve(damped, gradient), gradient, matrix, damped


@pytest.mark.parametrize("way", ["formed", "iterated"])
def test_steps_are_those_of_dense_matrices(case, way, monkeypatch):
    model, loss_func, data = case
    if way == "iterated":
        probed(monkeypatch)
    close = CLOSE if way == "formed" else ITERATED
    steps, best, gradient, _, damped = dense_steps(model, loss_func, data)
    report = diagnose(model, loss_func, data, damping=DAMPING)
    assert report.solve.converged
    assert report.solve.method == ("solved" if way == "formed" else "CG")
    names = [step.step for step in report.steps]
    assert set(names) >= {"gradient", "K-FAC", "EKFAC", "exact blocks"}
    for step in report.steps:
        d = steps[step.step]
        expected = F.cosine_similarity(d, best, dim=0)
        np.testing.assert_allclose(step.cosine, expected, **close)
        decrease = (gradient @ d) ** 2 / (d @ damped @ d) / (gradient @ best)
        np.testing.assert_allclose(step.decrease, decrease, **close)
    for layer, own in zip(report.layers, block_ranges(model), strict=True):
        for name, value in layer.cosine.items():
            expected = F.cosine_similarity(steps[name][own], best[own], dim=0)
            np.testing.assert_allclose(value, expected, **close)
        share = gradient[own].square().sum() / gradient.square().sum()
        np.testing.assert_allclose(layer.gradient_share, share, **CLOSE)


def test_what_the_loss_does_is_what_it_does(case):
    model, loss_func, data = case
    later = [(torch.randn_like(data[0][0]), data[0][1])]
    steps, _, gradient, matrix, damped = dense_steps(model, loss_func, data)
    report = diagnose(model, loss_func, data + later, damping=DAMPING, max_batches=len(data))
    assert report.sample.held_out
    for step in report.steps:
        d = steps[step.step]
        d = d * (gradient @ d) / (d @ damped @ d)
        predicted = gradient @ d - 0.5 * d @ matrix @ d
        moved = copy.deepcopy(model)
        sizes = [p.numel() for p in moved.parameters()]
        with torch.no_grad():
            for p, part in zip(moved.parameters(), d.split(sizes), strict=True):
                p -= part.reshape(p.shape)
        for batches, ratio in ((data, step.ratio), (later, step.held_out_ratio)):
            losses = [loss_func(predictions(m, batches), targets(batches)) for m in (model, moved)]
            np.testing.assert_allclose(ratio, (losses[0] - losses[1]).item() / predicted, rtol=1e-7)


def test_loss_and_gradient_are_those_of_the_sample(case):
    model, loss_func, data = case
    gradient, loss = gradient_of(model, loss_func, data)
    report = diagnose(model, loss_func, data)
    np.testing.assert_allclose(report.loss, loss, **CLOSE)
    np.testing.assert_allclose(report.gradient_norm, gradient.norm(), **CLOSE)


def test_spectra_are_those_of_the_factors(case):
    model, loss_func, data = case
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    K = KFACLinearOperator(model, loss_func, list(model.parameters()), data, **options)
    report = diagnose(model, loss_func, data, damping=DAMPING)
    for layer in report.layers:
        A, G = K.factors(layer.layer)
        pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
        added = (pi * DAMPING**0.5, DAMPING**0.5 / pi)
        np.testing.assert_allclose(layer.damping.pi, pi, **CLOSE)
        reports = (layer.input_factor, layer.grad_output_factor)
        for side, delta, found in zip((A, G), added, reports, strict=True):
            values = np.linalg.eigvalsh(side.numpy())
            # Softmax is blind to a shift of all logits.
            shifted = side is G and isinstance(loss_func, nn.CrossEntropyLoss) and len(G) == 4
            rank = len(side) - shifted
            assert found.rank == rank
            np.testing.assert_allclose(found.eigenvalues, values[::-1].clip(0), atol=1e-12)
            np.testing.assert_allclose(found.mean, values.mean(), **CLOSE)
            np.testing.assert_allclose(found.damping, delta, **CLOSE)
            ratio = values[-1] / values[0] if rank == len(side) else math.inf
            np.testing.assert_allclose(found.condition, ratio, rtol=1e-6)
            damped = (values[-1] + delta) / (max(values[0], 0) + delta)
            np.testing.assert_allclose(found.damped_condition, damped, **CLOSE)
        products = np.linalg.eigvalsh(torch.kron(G, A).numpy())
        assert layer.damping.share_below == (products < DAMPING).mean()
        np.testing.assert_allclose(layer.damping.relative, DAMPING / products.mean(), **CLOSE)
        effective = (products / (products + DAMPING)).sum()
        np.testing.assert_allclose(layer.damping.effective_dimension, effective, **CLOSE)


def test_probes_are_right_on_average_and_know_their_error(monkeypatch):
    torch.manual_seed(0)
    model, loss_func, data = cross_entropy_case()
    truth = diagnose(model, loss_func, data, damping=DAMPING)
    probed(monkeypatch)
    seeds = range(16)
    reports = [diagnose(model, loss_func, data, damping=DAMPING, seed=s) for s in seeds]

    def z_scores(expected, found, errors):
        found, errors = np.array(found), np.array(errors)
        assert (errors > 0).all()
        return (found.mean() - expected) / found.std(ddof=1), errors.mean() / found.std(ddof=1)

    def look(pick):
        expected, _ = pick(truth)
        found, errors = zip(*(pick(r) for r in reports), strict=True)
        bias, ratio = z_scores(expected, found, errors)
        # The bias of a ratio of means is below a standard error, which the jackknife knows to a
        # factor of 2; the mean of 16 is known to 1/4 of one.
        assert abs(bias) < 1
        assert 0.5 < ratio < 2

    look(lambda r: (r.outside.share, r.outside.error))
    for i in (0, 1):
        for name in ("K-FAC", "EKFAC"):
            look(lambda r, i=i, n=name: (r.layers[i].distance[n], r.layers[i].distance_error[n]))


def test_groups_of_an_optimizer_have_their_own_damping():
    torch.manual_seed(0)
    model, loss_func, data = cross_entropy_case()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "damping": 0.5}]
    optimizer = KFACOptimizer(groups, damping=DAMPING, damping_method="exact")
    report = diagnose(model, loss_func, data, optimizer)
    assert [layer.damping.damping for layer in report.layers] == [DAMPING, 0.5]
    matrix = dense_ggn(model, loss_func, list(model.parameters()), data)
    gradient, _ = gradient_of(model, loss_func, data)
    delta = torch.tensor([DAMPING] * 36 + [0.5] * 28, dtype=torch.float64)
    best = torch.linalg.solve(matrix + delta.diag(), gradient)
    expected = F.cosine_similarity(gradient, best, dim=0)
    np.testing.assert_allclose(report.steps[0].cosine, expected, **CLOSE)
    K = KFACLinearOperator(
        model,
        loss_func,
        list(model.parameters()),
        data,
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    parts = [_dense(K.inverse(d, method="exact")) @ gradient for d in (DAMPING, 0.5)]
    step = torch.cat([parts[0][:36], parts[1][36:]])
    expected = F.cosine_similarity(step, best, dim=0)
    np.testing.assert_allclose(report.steps[1].cosine, expected, **CLOSE)


def test_where_k_fac_is_exact_it_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    data = [(torch.randn(12, 4).double(), torch.randn(12, 3).double())]
    report = diagnose(model, nn.MSELoss(), data)
    for layer in report.layers:
        assert all(distance < 1e-7 for distance in layer.distance.values())
