"""Any scalar trains, with the curvature that it has: factors beside dense Hessians at the outputs.

`type-2` factors of one step are compared with Σ Jᵀ H⁺ J of `dense_losses`, whose H is autograd's.
"""

import collections
import copy
import dataclasses
import types

import pytest
import torch
from dense_losses import absolute_value, dense_factors, positive_part
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, Poisson
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.usefixtures("float64")

# Products are compared to 64 eps^(3/4) = 1e-10 of a row: what is smaller may be left out.
TOLERANCE = 1e-9
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
TARGETS = torch.linspace(0.1, 1, 18, dtype=torch.float64).reshape(6, 3)
BITS = (TARGETS > 0.5).double()
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 0.3, -0.7, 1.1], dtype=torch.float64)
PLAIN = {"lr": 0.0, "fisher_type": "type-2", "factor_update_interval": 1, "ema_decay": 0.0}


def mlp(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def make(*models, **options):
    """An optimizer that moves nothing, so that only its factors are looked at."""
    return KFACOptimizer([p for m in models for p in m.parameters()], **(PLAIN | options))


def assert_factors(optimizer, run, layers, loss, curvature=positive_part, scale=1.0):
    """Compare layers' factors with dense ones; the layers are parts of copies of the models.

    Args:
        optimizer: Has factors for the names.
        run: Calls the copies.
        layers: Layers of the copies by name.
        loss: L as a function of the outputs.
        curvature: See `dense_factors`.
        scale: Of G.
    """
    for name, layer in layers.items():
        A, G = dense_factors(run, layer, loss, curvature)
        got, G = optimizer.factors(name), scale * G
        torch.testing.assert_close(got.input_factor, A, atol=TOLERANCE, rtol=0, msg=name)
        bound = TOLERANCE * float(G.abs().max())
        torch.testing.assert_close(got.grad_output_factor, G, atol=bound, rtol=0)
        assert float(G.abs().max()) > 0


def layers_of(*models):
    """Layers by the names that one optimizer for several models gives them."""
    named = [list(m.named_modules()) for m in models]
    return {n: layer for own in named for n, layer in own if isinstance(layer, nn.Linear)}


# Losses -------------------------------------------------------------------------------------------


def learned_variance(z):
    mean, log_variance = z[:, :1], z[:, 1:2]
    return (0.5 * ((TARGETS[:, :1] - mean) ** 2 * (-log_variance).exp() + log_variance)).mean()


def focal(z):
    p = z.sigmoid()
    right = p * BITS + (1 - p) * (1 - BITS)
    return -((1 - right) ** 2 * right.log()).mean()


def contrastive(z):
    z = F.normalize(z, dim=1)
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(6, dtype=torch.bool), -1e9)
    return -similar.log_softmax(1)[torch.arange(6), torch.tensor([1, 0, 3, 2, 5, 4])].mean()


def dice(z):
    p = z.sigmoid()
    return 1 - 2 * (p * BITS).sum() / (p.sum() + BITS.sum())


def decorrelated(z):
    z = (z - z.mean(0)) / z.std(0)
    return ((z.T @ z / 6 - torch.eye(3)) ** 2).sum()


def clipped_ratio(z):
    log_prob = Categorical(logits=z).log_prob(LABELS)
    ratio = (log_prob - (log_prob.detach() - 0.1 * ADVANTAGES)).exp()
    return -torch.min(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES).mean()


def ctc(z):
    log_probs, lengths = z.log_softmax(1).reshape(3, 2, 3), torch.tensor([3, 3])
    return F.ctc_loss(log_probs, torch.tensor([[1], [2]]), lengths, torch.tensor([1, 1]))


def policy_gradient(z):
    return -(Categorical(logits=z).log_prob(LABELS) * ADVANTAGES).mean()


LOSSES = {
    "mean square": lambda z: ((z - TARGETS) ** 2).mean(),
    "Huber": lambda z: F.huber_loss(z, TARGETS, delta=1.5),
    "smooth L1": lambda z: F.smooth_l1_loss(z, TARGETS),
    "log-cosh": lambda z: (z - TARGETS).cosh().log().sum(1).mean(),
    "Poisson": lambda z: F.poisson_nll_loss(z, TARGETS),
    "learned variance": learned_variance,
    "gaussian_nll_loss": lambda z: F.gaussian_nll_loss(z[:, 0], TARGETS[:, 0], z[:, 1].exp()),
    "BCE on a sigmoid": lambda z: F.binary_cross_entropy(z.sigmoid(), TARGETS),
    "focal": focal,
    "soft margin": lambda z: F.soft_margin_loss(z, 2 * BITS - 1),
    "soft margins of labels": lambda z: F.multilabel_soft_margin_loss(z, BITS),
    "gathered log-softmax": lambda z: -z.log_softmax(1).gather(1, LABELS[:, None]).mean(),
    "indexed softmax": lambda z: -z.softmax(1)[torch.arange(6), LABELS].log().mean(),
    "KL": lambda z: F.kl_div(z.log_softmax(1), TARGETS.softmax(1), reduction="batchmean"),
    "cosine": lambda z: (1 - F.cosine_similarity(z, TARGETS)).mean(),
    "contrastive": contrastive,
    "Dice": dice,
    "decorrelated": decorrelated,
    "triplet": lambda z: F.triplet_margin_loss(z[:2], z[2:4], z[4:]),
    "Normal": lambda z: -Independent(Normal(z, 0.5), 1).log_prob(TARGETS).mean(),
    "Bernoulli": lambda z: -Bernoulli(logits=z).log_prob(BITS).sum(1).mean(),
    "distribution Poisson": lambda z: -Poisson(z.exp()).log_prob(torch.ones(6, 3)).mean(),
    "within and beyond a Huber loss's delta": lambda z: F.huber_loss(z, TARGETS, delta=0.3),
    "PPO": clipped_ratio,
    "root of the mean square": lambda z: ((z - TARGETS) ** 2).mean().sqrt(),
}


def compared(loss, curvature=positive_part, **options):
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = make(model, **options)
    loss(model(X)).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), loss, curvature)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_positive_part_of_their_hessian(name):
    compared(LOSSES[name])


WITHOUT = {
    "L1": lambda z: F.l1_loss(z, TARGETS),
    "hinge": lambda z: (1 - (2 * BITS - 1) * z).clamp(min=0).mean(),
    "multi_margin_loss": lambda z: F.multi_margin_loss(z, LABELS),
    "CTC": ctc,
    "linear": lambda z: (z * TARGETS).sum(1).mean(),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_losses_without_a_second_derivative_have_the_empirical_fisher_of_data(name):
    compared(WITHOUT[name], None)


@pytest.mark.parametrize("name", ["Huber", "Dice", "L1", "cosine"])
def test_the_empirical_fisher_of_any_loss(name):
    compared((LOSSES | WITHOUT)[name], None, fisher_type="empirical")


def test_a_weight_on_a_distribution_counts_by_its_absolute_value():
    compared(policy_gradient, absolute_value)
    bits = lambda z: -(Bernoulli(logits=z).log_prob(BITS) * ADVANTAGES[:, None]).mean()  # noqa: E731
    compared(bits, absolute_value)


def test_a_penalty_on_parameters_has_no_part_in_the_factors():
    model = mlp()
    twin, optimizer = copy.deepcopy(model), make(model)
    penalty = sum(p.pow(2).sum() for p in model.parameters())
    (LOSSES["Huber"](model(X)) + 0.1 * penalty).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), LOSSES["Huber"])


def test_draws_of_mean_squares_have_the_hessian_on_average():
    """E[v vᵀ] = H⁺: the mean of many draws, to five standard deviations."""
    model, samples = mlp(), 4000
    optimizer = make(model, fisher_type="mc", mc_samples=samples)
    twin, loss = copy.deepcopy(model), LOSSES["Huber"]
    loss(model(X)).backward()
    optimizer.step()
    _, G = dense_factors(lambda: (twin(X),), twin[2], loss)
    got = optimizer.factors("2").grad_output_factor
    bound = 5 * G.diagonal().max() * (2 / samples) ** 0.5
    torch.testing.assert_close(got, G, atol=float(bound), rtol=0)


# Outputs ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outputs:
    mean: torch.Tensor
    log_variance: torch.Tensor


PACKED = {
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"mean": a, "log_variance": b},
    "dataclass": Outputs,
    "nested": lambda a, b: [{"mean": a}, (b, None)],
    "namespace": lambda a, b: types.SimpleNamespace(mean=a, log_variance=b),
    "own dictionary": lambda a, b: collections.UserDict(mean=a, log_variance=b),
}
UNPACKED = {
    "tuple": lambda z: z,
    "dict": lambda z: z.values(),
    "dataclass": lambda z: (z.mean, z.log_variance),
    "nested": lambda z: (z[0]["mean"], z[1][0]),
    "namespace": lambda z: (z.mean, z.log_variance),
    "own dictionary": lambda z: z.values(),
}


class TwoHeads(nn.Module):
    def __init__(self, pack=PACKED["tuple"]):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.mean, self.scale = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.pack = [pack]

    def forward(self, x):
        h = self.body(x).tanh()
        return self.pack[0](self.mean(h), self.scale(h))


def gaussian(mean, log_variance):
    return (0.5 * (TARGETS - mean) ** 2 * (-log_variance).exp() + 0.5 * log_variance).mean()


@pytest.mark.parametrize("kind", PACKED)
def test_several_outputs_in_any_container(kind):
    model = TwoHeads(PACKED[kind])
    optimizer = make(model)
    gaussian(*UNPACKED[kind](model(X))).backward()
    optimizer.step()
    twin = TwoHeads()
    assert_factors(optimizer, lambda: twin(X), layers_of(twin), gaussian)


def test_terms_on_several_outputs_add_up():
    """The head's H of one term does not mix with the other's at the layer that they share."""

    def loss(a, b):
        return F.huber_loss(a, TARGETS) + 0.3 * (b - TARGETS).cosh().log().sum(1).mean()

    model, twin = TwoHeads(), TwoHeads()
    optimizer = make(model)
    loss(*model(X)).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: twin(X), layers_of(twin), loss)


DISTRIBUTIONS = {
    "Categorical": (lambda z: Categorical(logits=z), lambda d: -d.log_prob(LABELS).mean()),
    "policy gradient": (
        lambda z: Categorical(logits=z),
        lambda d: -(d.log_prob(LABELS) * ADVANTAGES).mean(),
    ),
    "Normal": (
        lambda z: Independent(Normal(z, 0.5 * torch.ones(3)), 1),
        lambda d: -d.log_prob(TARGETS).mean(),
    ),
    "Bernoulli": (lambda z: Bernoulli(logits=z), lambda d: -d.log_prob(BITS).mean()),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_models_that_return_a_distribution(name):
    """As a policy does; the likelihood is found where the layers end."""

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return DISTRIBUTIONS[name][0](self.net(x))

    model = Policy()
    twin, optimizer = copy.deepcopy(model.net), make(model)
    distribution = model(X)
    DISTRIBUTIONS[name][1](distribution).backward()
    optimizer.step()
    loss = lambda z: DISTRIBUTIONS[name][1](DISTRIBUTIONS[name][0](z))  # noqa: E731
    layers = {f"net.{n}": layer for n, layer in layers_of(twin).items()}
    curvature = absolute_value if name == "policy gradient" else positive_part
    assert_factors(optimizer, lambda: (twin(X),), layers, loss, curvature)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return self.decoder(sampled(mean, log_variance)), mean, log_variance


def sampled(mean, log_variance):
    noise = torch.linspace(-1, 1, mean.numel()).reshape(mean.shape)
    return mean + noise * (0.5 * log_variance).exp()


def elbo(reconstruction, mean, log_variance):
    squares = F.huber_loss(reconstruction, X, delta=0.5, reduction="sum")
    return squares - 0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()


def test_an_elbo_of_one_module():
    model, twin = Autoencoder(), Autoencoder()
    optimizer = make(model)
    elbo(*model(X)).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: twin(X), layers_of(twin), elbo)


def test_an_elbo_of_an_encoder_and_a_decoder():
    """Both modules are outermost ones; the reconstruction's H reaches the encoder, too."""
    model, twin = Autoencoder(), Autoencoder()
    encoder, decoder = nn.ModuleDict({"encoder": model.encoder}).encoder, model.decoder
    optimizer = make(model)
    mean, log_variance = encoder(X).chunk(2, -1)
    elbo(decoder(sampled(mean, log_variance)), mean, log_variance).backward()
    optimizer.step()
    assert_factors(optimizer, lambda: twin(X), layers_of(twin), elbo)


def test_a_decoder_that_takes_an_object():
    """What is in it is not told from other tensors; what comes out is z all the same."""

    class Code(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 6)

        def forward(self, x):
            return Outputs(*self.layer(x).chunk(2, -1))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, code):
            return self.layer(code.mean * code.log_variance.exp()).tanh()

    pair = nn.ModuleDict({"encoder": Code(), "decoder": Decoder()})
    twin, optimizer = copy.deepcopy(pair), make(pair)
    encoder, decoder = pair["encoder"], pair["decoder"]
    LOSSES["Huber"](decoder(encoder(X))).backward()
    optimizer.step()
    run = lambda: (twin["decoder"](twin["encoder"](X)),)  # noqa: E731
    assert_factors(optimizer, run, layers_of(twin), LOSSES["Huber"])


def test_two_models_in_one_loss():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = mlp(2), mlp(2)

    def aligned(a, b):
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        return -(a @ b.T).log_softmax(1).diagonal().mean()

    pair = Pair()
    twin, optimizer = copy.deepcopy(pair), make(pair)
    aligned(pair.image(X), pair.text(X.flip(0))).backward()
    optimizer.step()
    run = lambda: (twin.image(X), twin.text(X.flip(0)))  # noqa: E731
    assert_factors(optimizer, run, layers_of(twin), aligned)


def test_several_forward_passes_in_one_loss():
    def apart(a, b):
        return (1 - F.cosine_similarity(a, b)).mean() + F.huber_loss(a, b)

    model, twin = mlp(), mlp()
    optimizer = make(model)
    apart(model(X), model(X.flip(0))).backward()
    optimizer.step()
    run = lambda: (twin(X), twin(X.flip(0)))  # noqa: E731
    assert_factors(optimizer, run, layers_of(twin), apart)


def test_a_gan_with_two_optimizers():
    """Each one's factors are those of its own loss, through the other's model or not."""
    generator, critic = mlp(4), mlp(1)
    twins = copy.deepcopy((generator, critic))
    optimizers = make(generator), make(critic)
    # log-sigmoid losses by hand: what torch recognises would be the easy case
    loss = -(critic(TARGETS.repeat(1, 2)[:, :4]).sigmoid().log().mean())
    loss = loss - (1 - critic(generator(X).detach()).sigmoid()).log().mean()
    loss.backward()
    optimizers[1].step()
    optimizers[1].zero_grad()

    def critics(real, fake):
        return -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()

    run = lambda: (twins[1](TARGETS.repeat(1, 2)[:, :4]), twins[1](twins[0](X).detach()))  # noqa: E731
    assert_factors(optimizers[1], run, layers_of(twins[1]), critics)
    (-critic(generator(X)).sigmoid().log().mean()).backward()
    optimizers[0].step()
    # The generator's optimizer knows nothing of the critic: its z is what the generator returns.
    run = lambda: (twins[0](X),)  # noqa: E731
    names, critic = layers_of(twins[0]), twins[1]
    assert_factors(optimizers[0], run, names, lambda z: -critic(z).sigmoid().log().mean())


# Ways to differentiate ----------------------------------------------------------------------------


def separately(model, optimizer, loss):
    """Σ ℓ_n / N as a vector's product with the gradient."""
    rows = torch.stack([loss(z[None], n) for n, z in enumerate(model(X))])
    rows.backward(gradient=torch.full_like(rows, 1 / 6))


def row_huber(z, n=None):
    targets = TARGETS if n is None else TARGETS[n : n + 1]
    return F.huber_loss(z, targets, delta=1.5)


def row_l1(z, n=None):
    targets = TARGETS if n is None else TARGETS[n : n + 1]
    return (z - targets).abs().mean()


def whole(model, optimizer, loss):
    loss(model(X)).backward()


def of_torch(model, optimizer, loss):
    torch.autograd.backward(loss(model(X)))


def of_several(model, optimizer, loss):
    z = model(X)
    first = loss(z)
    torch.autograd.backward([0.25 * first, 0.5 * first, loss(z)], [torch.ones(()), *halves()])


def halves():
    return torch.tensor(0.5), torch.tensor(0.5)


def of_a_tensor_and_what_follows_from_it(model, optimizer, loss):
    value = loss(model(X))
    torch.autograd.backward([value, 3 * value], [torch.tensor(0.25)] * 2)


def by_parameters(model, optimizer, loss):
    params = list(model.parameters())
    for p, g in zip(params, torch.autograd.grad(loss(model(X)), params), strict=True):
        p.grad = g


def by_some_inputs(model, optimizer, loss):
    loss(model(X)).backward(inputs=list(model.parameters()))


def micro_batches(model, optimizer, loss):
    for n in (slice(0, 3), slice(3, 6)):
        rows = [loss(z[None], k) for k, z in zip(range(n.start, n.stop), model(X[n]), strict=True)]
        (sum(rows) / 3 / 2).backward()


def two_passes_of_one_graph(model, optimizer, loss):
    value = loss(model(X)) / 2
    value.backward(retain_graph=True)
    value.backward()


def retained(model, optimizer, loss):
    z = model(X)
    z.retain_grad()
    between = 2 * z
    between.retain_grad()
    value = loss(between / 2)
    value.backward()
    leaf = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(z.grad, gradient, atol=1e-15)
    assert torch.allclose(between.grad, gradient / 2, atol=1e-15)


def evaluated_in_between(model, optimizer, loss):
    value = loss(model(X))
    with torch.no_grad():
        model.eval()
        loss(model(3 * X))
        model.train()
    value.backward()


def never_differentiated(model, optimizer, loss):
    loss(model(3 * X))
    loss(model(X)).backward()


def discarded(model, optimizer, loss):
    loss(model(3 * X)).backward()
    model.zero_grad()
    loss(model(X)).backward()


def checkpointed(model, optimizer, loss):
    loss(checkpoint(model, X, use_reentrant=False)).backward()


def loss_checkpointed(model, optimizer, loss):
    checkpoint(loss, model(X), use_reentrant=False).backward()


def doubled_in_place(model, optimizer, loss):
    z = model(X)
    z *= 2
    loss(z / 2).backward()


def views(model, optimizer, loss):
    z = model(X)
    loss(torch.cat([z[:2].view(2, 3), z[2:].T.T])).backward()


def of_a_list(model, optimizer, loss):
    rows = list(model(X).unbind())
    loss(torch.stack(rows)).backward()


WAYS = [
    whole,
    separately,
    of_torch,
    of_a_tensor_and_what_follows_from_it,
    by_parameters,
    by_some_inputs,
    micro_batches,
    retained,
    evaluated_in_between,
    never_differentiated,
    discarded,
    checkpointed,
    loss_checkpointed,
    views,
    of_a_list,
    doubled_in_place,
]


@pytest.mark.parametrize("loss", [row_huber, row_l1], ids=["exact", "empirical"])
@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
def test_ways_to_differentiate(way, loss):
    model = mlp()
    twin, optimizer = copy.deepcopy(model), make(model)
    way(model, optimizer, loss)
    optimizer.step()
    curvature = positive_part if loss is row_huber else None
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), loss, curvature)


@pytest.mark.parametrize("way", [of_several, two_passes_of_one_graph])
def test_tensors_that_are_differentiated_together_count_each_on_its_own(way):
    model = mlp()
    twin, optimizer = copy.deepcopy(model), make(model)
    way(model, optimizer, row_huber)
    optimizer.step()
    assert_factors(optimizer, lambda: (twin(X),), layers_of(twin), row_huber)
