"""Losses as people write them, functions of z alone, with the structure that their Hessian has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributions
from torch.nn import functional as F

DTYPE = torch.float64
N, C = 6, 4

_draws = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=_draws, dtype=DTYPE)


def uniform(*shape):
    return torch.rand(*shape, generator=_draws, dtype=DTYPE)


Y, WEIGHTS, SIGNED = normal(N, C), uniform(N, C) + 0.1, normal(N)
LABELS = torch.randint(C, (N,), generator=_draws)
BINARY = (uniform(N, C) > 0.5).to(DTYPE)
COUNTS = Y.abs().round()
SOFT = normal(N, C).softmax(-1)
CLASS_WEIGHTS = uniform(C) + 0.1
KEPT = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=DTYPE)
SEQUENCES = torch.randint(C, (N, 3, 1), generator=_draws)
PIXELS = torch.randint(C, (3, 1, 2, 2), generator=_draws)
OLD_LOG_PROBS = normal(N, C).log_softmax(-1)[range(N), LABELS]
PAIRED = torch.tensor([1, -1, 1, -1, 1, 1])


@dataclass(frozen=True)
class Case:
    """A loss.

    Attributes:
        loss: Maps tensors z to a scalar.
        shapes: Of z.
        kinds: What is found, part by part.
        fisher: Maps z to a scalar whose Hessian is the curvature, where that is not the loss's: a
            policy gradient's with |w| for w.
    """

    loss: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    fisher: Callable[..., Tensor] | None = None

    def z(self, dtype=DTYPE, scale=1.0, seed=1):
        draws = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(s, generator=draws, dtype=DTYPE) for s in self.shapes]
        return [(scale * x).to(dtype) for x in drawn]


def log_prob(z):
    return z.log_softmax(-1)[range(N), LABELS]


def categorical_log_prob(z):
    return distributions.Categorical(logits=z).log_prob(LABELS)


def normal_log_prob(z):
    return distributions.Independent(distributions.Normal(z, 0.5), 1).log_prob(Y)


def masked(z):
    """Forbid an action that is not the label's, for each row."""
    return z.scatter(1, (LABELS[:, None] + 1) % C, -torch.inf)


def at_pixels(z):
    return z.log_softmax(1).gather(1, PIXELS)


def smoothed(z):
    log_p = z.log_softmax(-1)
    return -(0.9 * log_p[range(N), LABELS] + 0.1 * log_p.mean(-1)).mean()


def focal(z):
    p = z.sigmoid()
    p = p * BINARY + (1 - p) * (1 - BINARY)
    return (-((1 - p) ** 2) * p.log()).mean()


def focal_of_classes(z):
    return -((1 - log_prob(z).exp()) ** 2 * log_prob(z)).mean()


def ctc(z):
    targets = torch.tensor([[1, 2], [3, 1], [2, 2]])
    return F.ctc_loss(z.log_softmax(-1).transpose(0, 1), targets, (5, 5, 5), (2, 2, 2))


def contrastive(queries, keys):
    scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / 0.5
    return -scores.log_softmax(-1).diagonal().mean()


def dice(z):
    p = z.sigmoid()
    return 1 - 2 * (p * BINARY).sum() / (p.sum() + BINARY.sum())


def correlation(z):
    a, b = z - z.mean(0), Y - Y.mean(0)
    return -((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean()


def barlow_twins(one, other):
    one, other = ((x - x.mean(0)) / x.std(0) for x in (one, other))
    products = one.T @ other / len(one)
    return (products - torch.eye(products.shape[0])).square().sum()


def clipped_policy(z):
    ratio = (log_prob(z) - OLD_LOG_PROBS).exp()
    return -torch.min(ratio * SIGNED, ratio.clamp(0.8, 1.2) * SIGNED).mean()


def actor_critic(z, value):
    entropy = distributions.Categorical(logits=z).entropy().mean()
    critic = (value[:, 0] - SIGNED).square().mean()
    return -(log_prob(z) * SIGNED).mean() + critic / 2 - 0.01 * entropy


def kl_to_normal(mean, log_variance):
    return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()


NC, N1 = (N, C), (N, 1)
ELEMENTWISE = {
    "mean square": lambda z: ((z - Y) ** 2).mean(),
    "half the sum of squares": lambda z: (z - Y).square().sum() / 2,
    "weighted squares": lambda z: (WEIGHTS * (z - Y) ** 2).sum(),
    "weighted rows": lambda z: (KEPT * (z - Y).square().mean(1)).sum() / KEPT.sum(),
    "huber": lambda z: F.huber_loss(z, Y),
    "smooth l1": lambda z: F.smooth_l1_loss(z, Y, beta=0.5),
    "log-cosh": lambda z: (z - Y).cosh().log().mean(),
    "poisson": lambda z: F.poisson_nll_loss(z, COUNTS),
    "bce on a sigmoid": lambda z: F.binary_cross_entropy(z.sigmoid(), BINARY),
    "bce by hand": lambda z: (F.softplus(z) - z * BINARY).mean(),
    "focal": focal,
    "soft margin": lambda z: F.soft_margin_loss(z, 2 * BINARY - 1),
    "multilabel soft margin": lambda z: F.multilabel_soft_margin_loss(z, BINARY),
    "Bernoulli": lambda z: -distributions.Bernoulli(logits=z).log_prob(BINARY).mean(),
    "Poisson": lambda z: -distributions.Poisson(z.exp()).log_prob(COUNTS).mean(),
    "Normal": lambda z: -distributions.Normal(z, WEIGHTS).log_prob(Y).mean(),
    "Independent(Normal), weighted": lambda z: -(normal_log_prob(z) * SIGNED.abs()).mean(),
    "Independent(Normal), signed": lambda z: -(normal_log_prob(z) * SIGNED).mean(),
    "squares and l1": lambda z: (z - Y).square().mean() + (z - Y).abs().mean(),
    "squares of some rows": lambda z: z[:3].square().mean() + z[3:].sum(),
}
SOFTMAX = {
    "gather": lambda z: -z.log_softmax(-1).gather(1, LABELS[:, None]).mean(),
    "indexing": lambda z: -log_prob(z).mean(),
    "logsumexp": lambda z: (z.logsumexp(-1) - z[range(N), LABELS]).mean(),
    "class weights": lambda z: -(CLASS_WEIGHTS[LABELS] * log_prob(z)).sum(),
    "ignored rows": lambda z: -(KEPT * log_prob(z)).sum() / KEPT.sum(),
    "smoothing": smoothed,
    "kl_div": lambda z: F.kl_div(z.log_softmax(-1), SOFT, reduction="batchmean"),
    "Categorical": lambda z: -categorical_log_prob(z).mean(),
    "temperature": lambda z: F.cross_entropy(z / 3, SOFT),
    "distillation": lambda z: 9 * F.kl_div((z / 3).log_softmax(-1), SOFT, reduction="batchmean"),
    "logits with a prior": lambda z: -log_prob(z + CLASS_WEIGHTS.log()).mean(),
    "Categorical, weighted": lambda z: -(categorical_log_prob(z) * SIGNED.abs()).mean(),
}
ROWS = {
    "gaussian, one tensor": (lambda z: F.gaussian_nll_loss(z[:, :2], Y[:, :2], z[:, 2:].exp()), NC),
    "focal of classes": (focal_of_classes, NC),
    "reverse kl": (lambda z: (z.softmax(-1) * (z.log_softmax(-1) - SOFT.log())).sum(-1).mean(), NC),
    "cosine": (lambda z: (1 - F.cosine_similarity(z, Y)).mean(), NC),
    "distance": (lambda z: (z - Y).norm(dim=-1).mean(), NC),
    "ppo": (clipped_policy, NC),
    "squares and cross entropy": (lambda z: (z - Y).square().mean() - log_prob(z).mean(), NC),
    "sine of a difference of two": (lambda z: (3 * (z[:, 0] - z[:, 1])).sin().mean(), (N, 2)),
    "gaussian, two tensors": (lambda m, s: F.gaussian_nll_loss(m, Y, s.exp()), NC, NC),
    "Normal, two tensors": (
        lambda m, s: -distributions.Normal(m, s.exp()).log_prob(Y).mean(),
        NC,
        NC,
    ),
    "cosine embedding": (lambda a, b: F.cosine_embedding_loss(a, b, PAIRED), NC, NC),
    "triplet": (lambda a, p, n: F.triplet_margin_loss(a, p, n), NC, NC, NC),
}
MIXED = {
    "contrastive": (lambda z: contrastive(z[:3], z[3:]), NC),
    "contrastive, two tensors": (contrastive, (3, C), (3, C)),
    "dice": (dice, NC),
    "correlation": (correlation, NC),
    "barlow twins": (barlow_twins, (N, 3), (N, 3)),
    "root of a mean": (lambda z: (z - Y).square().mean().sqrt(), NC),
    "variance over the batch": (lambda z: z.var(0).sum(), NC),
    "softmax over the batch": (lambda z: -z.log_softmax(0)[1].mean(), NC),
    "pairs of entries": (lambda z: F.softplus(z[3:] - z[:3]).mean(), (N,)),
}
EMPIRICAL = {
    "l1": (lambda z: F.l1_loss(z, Y), NC),
    "hinge": (lambda z: F.relu(1 - z * (2 * BINARY - 1)).mean(), NC),
    "quantile": (lambda z: torch.max(0.9 * (Y - z), 0.1 * (z - Y)).mean(), NC),
    "critic": (lambda z: z[:3].mean() - z[3:].mean(), N1),
    "critic, two tensors": (lambda a, b: a.mean() - b.mean(), N1, (3, 1)),
    "multi_margin": (lambda z: F.multi_margin_loss(z, LABELS), NC),
    "ctc": (ctc, (3, 5, C)),
    "concave": (lambda z: -(z**2).mean(), NC),
    "concave rows": (lambda z: z.logsumexp(-1)[:3].sum() * -1 + z[3:].sum(), NC),
}
OTHERS = {
    "cross entropy, last axis": Case(
        lambda z: -z.log_softmax(-1).gather(-1, SEQUENCES).mean(), ((N, 3, C),), ("categorical",)
    ),
    "cross entropy, axis 1": Case(
        lambda z: -z.log_softmax(1).gather(1, PIXELS).mean(), ((3, C, 2, 2),), ("categorical",)
    ),
    "cross entropy, axis 1 as long as the last": Case(
        lambda z: -z.log_softmax(1)[:, 1].mean(), ((2, C, C),), ("categorical",)
    ),
    "focal, axis 1": Case(
        lambda z: -((1 - at_pixels(z).exp()) ** 2 * at_pixels(z)).mean(),
        ((3, C, 2, 2),),
        ("blocks",),
    ),
    "gaussian of two images": Case(
        lambda m, s: F.gaussian_nll_loss(m.sum(1), PIXELS[:, 0].double(), s[:, 0].exp()),
        ((3, 2, 2, 2), (3, 1, 2, 2)),
        ("blocks",),
    ),
    "cross entropy of one datum": Case(lambda z: -z.log_softmax(0)[1], ((C,),), ("categorical",)),
    "policy gradient": Case(
        lambda z: -(log_prob(z) * SIGNED).mean(),
        (NC,),
        ("categorical",),
        lambda z: -(log_prob(z) * SIGNED.abs()).mean(),
    ),
    "policy gradient with masked actions": Case(
        lambda z: -(log_prob(masked(z)) * SIGNED).mean(),
        (NC,),
        ("categorical",),
        lambda z: -(log_prob(masked(z)) * SIGNED.abs()).mean(),
    ),
    "temperature, many classes": Case(
        lambda z: -(z / 2).log_softmax(-1)[range(2), (3, 70)].mean(), ((2, 80),), ("categorical",)
    ),
    "actor and critic": Case(actor_critic, (NC, N1), ("blocks", "diagonal")),
    "kl of an elbo": Case(kl_to_normal, (NC, NC), ("diagonal",) * 2),
    "elbo": Case(
        lambda x, m, s: F.binary_cross_entropy_with_logits(x, BINARY) + kl_to_normal(m, s),
        (NC, (N, 2), (N, 2)),
        ("diagonal",) * 3,
    ),
    "least squares critics": Case(
        lambda a, b: (a - 1).square().mean() + b.square().mean(), (N1, (3, 1)), ("diagonal",) * 2
    ),
    "product of two of twelve": Case(
        lambda *z: sum(x.square().sum() for x in z) + 3 * (z[2] * z[7]).sum(),
        ((2, 1),) * 12,
        ("blocks",),
    ),
}
CASES = {
    **{name: Case(loss, (NC,), ("diagonal",)) for name, loss in ELEMENTWISE.items()},
    **{name: Case(loss, (NC,), ("categorical",)) for name, loss in SOFTMAX.items()},
    **{name: Case(loss, shapes, ("blocks",)) for name, (loss, *shapes) in ROWS.items()},
    **{name: Case(loss, shapes, ("mixed rows",)) for name, (loss, *shapes) in MIXED.items()},
    **OTHERS,
}
EMPIRICAL_CASES = {
    name: Case(loss, shapes, ("empirical",) * len(shapes))
    for name, (loss, *shapes) in EMPIRICAL.items()
}
