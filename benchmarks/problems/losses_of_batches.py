"""Losses that mix the rows of a batch, sum several things, or belong to a game or a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import mlp
from benchmarks.problems.cart_pole import HORIZON, CartPole, steps_missing
from benchmarks.problems.losses_of_data import NOISE, digits
from benchmarks.problems.problem import (
    DATA_SEED,
    Batch,
    LossProblem,
    Training,
    plain_loop,
    shuffled,
)


def _generator() -> Generator:
    return Generator().manual_seed(DATA_SEED)


# Losses that mix rows ----------------------------------------------------------------------------


def nearest_neighbour_error(encode: Callable[[Tensor], Tensor]) -> float:
    """Return the error of the nearest digit's class, by the cosine of the codes, on 500 others."""
    (X, y), (X_test, y_test) = digits()
    known, new = (F.normalize(encode(x)) for x in (X, X_test))
    return float((y[(new @ known.T).argmax(1)] != y_test).float().mean())


def _triples(y: Tensor, generator: Generator) -> Batch:
    """Return for each class a random member of it, and a random one of another class."""
    chance = torch.rand(len(y), len(y), generator=generator)
    same = y[:, None] == y
    return (chance * same).argmax(1), (chance * ~same).argmax(1)


def _triplet(generator: Generator) -> Training:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        anchor, positive, negative = (F.normalize(model(x)) for x in batch)
        return F.triplet_margin_loss(anchor, positive, negative, margin=0.5)

    def triplets(X: Tensor, y: Tensor, generator: Generator) -> Batch:
        noisy = X + NOISE * torch.randn(X.shape, generator=generator)
        return noisy, *(noisy[index] for index in _triples(y, generator))

    fixed = triplets(*digits()[0], _generator())

    def evaluate(model: nn.Module) -> tuple[float, float]:
        return float(loss(model, fixed)), nearest_neighbour_error(model)

    batches = (triplets(*batch, generator) for batch in shuffled(digits()[0], 64)(generator))
    return plain_loop(mlp((64, 128, 64, 16), nn.ReLU), loss, batches, evaluate)


def _augmented(x: Tensor, generator: Generator) -> Tensor:
    """Return images `[N, 64]` moved by up to a pixel, with noise."""
    count = len(x)
    offset = torch.randint(3, (2, count), generator=generator)
    padded = F.pad(x.view(count, 8, 8), (1, 1, 1, 1))
    rows, columns = offset[:, :, None] + torch.arange(8)
    moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
    return moved.flatten(1) + 0.2 * torch.randn(x.shape, generator=generator)


def _contrastive(generator: Generator) -> Training:
    """SimCLR's normalised temperature-scaled cross entropy, Chen et al. (2020), eq. 1."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        z = F.normalize(model(torch.cat(batch)))
        count = len(z)
        similarity = (z @ z.T / 0.2).masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
        partner = torch.arange(count).roll(count // 2)
        return (similarity.logsumexp(1) - similarity[torch.arange(count), partner]).mean()

    def views(x: Tensor, generator: Generator) -> Batch:
        return _augmented(x, generator), _augmented(x, generator)

    # as many pairs as in training: the loss depends on how many there are
    fixed = [views(x, _generator()) for x in digits()[0][0].split(96)[:13]]

    def evaluate(model: nn.Module) -> tuple[float, float]:
        losses = [float(loss(model, pair)) for pair in fixed]
        return sum(losses) / len(losses), nearest_neighbour_error(model)

    model = mlp((64, 128, 128, 16), nn.ReLU)
    batches = (views(x, generator) for x, _ in shuffled(digits()[0], 96)(generator))
    return plain_loop(model, loss, batches, evaluate)


@cache
def shapes() -> Batch:
    """Return images `[800, 1, 16, 16]` of a disc and a square in noise, and where the disc is.

    The disc has a radius in [1.5, 3.5], the square a side in [3, 7]; centres are uniform. What is
    bright is 1 on 0; the deviation of the noise is 0.25.
    """
    generator, count, side = _generator(), 800, 16
    places = side * torch.rand(2, 2, count, 1, 1, generator=generator)
    sizes = 1.5 + 2 * torch.rand(2, count, 1, 1, generator=generator)
    axis = torch.arange(side) + 0.5
    dx, dy = axis - places[0], axis[:, None] - places[1]
    disc = dx[0] ** 2 + dy[0] ** 2 <= sizes[0] ** 2
    square = torch.maximum(dx[1].abs(), dy[1].abs()) <= sizes[1]
    bright = (disc | square).float()
    image = bright + 0.25 * torch.randn(bright.shape, generator=generator)
    return image[:, None], disc[:, None].float()


def _dice(generator: Generator) -> Training:
    train, test = tuple(t[:600] for t in shapes()), tuple(t[600:] for t in shapes())
    fixed = tuple(t[:200] for t in train)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        p, t = torch.sigmoid(model(batch[0])), batch[1]
        return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)

    def evaluate(model: nn.Module) -> tuple[float, float]:
        found, there = model(test[0]) > 0, test[1] > 0
        overlap = (found & there).sum() / (found | there).sum()
        return float(loss(model, fixed)), 1 - float(overlap)

    convolution = partial(nn.Conv2d, kernel_size=3, padding=1)
    model = nn.Sequential(
        convolution(1, 8),
        nn.ReLU(),
        convolution(8, 16, stride=2),
        nn.ReLU(),
        convolution(16, 16),
        nn.ReLU(),
        convolution(16, 16),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        convolution(16, 8),
        nn.ReLU(),
        convolution(8, 1),
    )
    return plain_loop(model, loss, shuffled(train, 32)(generator), evaluate)


# Sequences ---------------------------------------------------------------------------------------


def _strips(X: Tensor, y: Tensor, count: int, generator: Generator) -> Batch:
    """Return strips `[count, 8, 40]` of two to four digits with gaps, their classes and number."""
    chosen = torch.randint(len(y), (count, 4), generator=generator)
    numbers = torch.randint(2, 5, (count,), generator=generator)
    gaps = torch.randint(3, (count, 4), generator=generator).cumsum(1)
    strips = torch.zeros(count, 8, 40)
    rows = torch.arange(count)[:, None]
    for place in range(4):
        columns = 8 * place + gaps[:, place, None] + torch.arange(8)
        image = X[chosen[:, place]].view(count, 8, 8) * (place < numbers)[:, None, None]
        strips[rows, :, columns] = image.transpose(1, 2)
    return strips, 1 + y[chosen], numbers


def _ctc(generator: Generator) -> Training:
    train, test = digits()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        strips, classes, numbers = batch
        log_p = model(strips).log_softmax(1).permute(2, 0, 1)
        lengths = torch.full((len(strips),), len(log_p))
        return F.ctc_loss(log_p, classes, lengths, numbers)

    fixed, others = (_strips(*part, 400, _generator()) for part in (train, test))

    def misread(model: nn.Module) -> float:
        best = model(others[0]).argmax(1)
        begins = (best != 0) & (best != F.pad(best, (1, -1)))
        wanted = [row[:n] for row, n in zip(others[1], others[2], strict=True)]
        read = [row[mask] for row, mask in zip(best, begins, strict=True)]
        return sum(not torch.equal(*pair) for pair in zip(read, wanted, strict=True)) / len(read)

    def evaluate(model: nn.Module) -> tuple[float, float]:
        return float(loss(model, fixed)), misread(model)

    def batches() -> Iterator[Batch]:
        while True:
            yield _strips(*train, 32, generator)

    model = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 48, (8, 5), padding=(0, 2)),
        nn.ReLU(),
        nn.Conv2d(48, 48, (1, 5), padding=(0, 2)),
        nn.ReLU(),
        nn.Conv2d(48, 11, 1),
        nn.Flatten(2),
    )
    return plain_loop(model, loss, batches(), evaluate)


# Generative models -------------------------------------------------------------------------------


class VAE(nn.Module):
    """Kingma & Welling's (2014), with a code of 8 Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp((64, 128, 16)), mlp((8, 128, 64))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the pixels, and mean and log-variance of the code."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean + (log_variance / 2).exp() * noise), mean, log_variance


def negative_elbo(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a VAE for images and noise, a datum."""
    logits, mean, log_variance = model(*batch)
    pixels = F.binary_cross_entropy_with_logits(logits, batch[0], reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
    return (pixels + divergence) / len(mean)


def _vae(generator: Generator) -> Training:
    def noisy(x: Tensor, generator: Generator) -> Batch:
        return x, torch.randn(len(x), 8, generator=generator)

    fixed = [noisy(x, _generator()) for x, _ in digits()]

    def evaluate(model: nn.Module) -> tuple[float, float]:
        return float(negative_elbo(model, fixed[0])), float(negative_elbo(model, fixed[1]))

    batches = (noisy(x, generator) for x, _ in shuffled(digits()[0], 64)(generator))
    return plain_loop(VAE(), negative_elbo, batches, evaluate)


def ring(count: int, generator: Generator) -> Tensor:
    """Return points from eight Gaussians of deviation 0.05 on the unit circle."""
    angle = torch.pi / 4 * torch.randint(8, (count,), generator=generator)
    centre = torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.05 * torch.randn(count, 2, generator=generator)


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 2 E|a − b| − E|a − a′| − E|b − b′|, Székely & Rizzo (2013), over all pairs."""
    return 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()


def _gan(generator: Generator) -> Training:
    """Goodfellow et al. (2014) with the generator's loss that does not saturate."""
    maker, critic = mlp((8, 64, 64, 2), nn.ReLU), mlp((2, 64, 64, 1), nn.ReLU)
    noise = torch.randn(1000, 8, generator=_generator())
    real, many = ring(1000, _generator()), ring(8000, _generator())

    def step(optimizers: Sequence[Any]) -> None:
        of_maker, of_critic = optimizers
        made = maker(torch.randn(128, 8, generator=generator))
        of_critic.zero_grad()
        truth = critic(ring(128, generator))
        (F.softplus(-truth).mean() + F.softplus(critic(made.detach())).mean()).backward()
        of_critic.step()
        of_maker.zero_grad()
        F.softplus(-critic(made)).mean().backward()
        of_maker.step()

    def evaluate() -> tuple[float, float]:
        made = maker(noise)
        outside = torch.cdist(made, many).amin(1) > 0.05
        return float(energy_distance(made, real)), float(outside.float().mean())

    return Training((maker, critic), step, evaluate)


# Policies ----------------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """A policy's logits and the value of states, from networks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = mlp((4, 32, 32, 2)), mlp((4, 32, 32, 1))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[..., 2]` and values `[...]`."""
        return self.actor(state), self.critic(state)[..., 0]


def _ppo(generator: Generator) -> Training:
    """Schulman et al. (2017): 16 poles, 128 steps, 4 epochs in batches of 256."""
    model, poles = ActorCritic(), CartPole(16, generator)

    def loss(batch: Batch) -> Tensor:
        state, action, old, advantage, goal = batch
        logits, value = model(state)
        policy = torch.distributions.Categorical(logits=logits)
        ratio = (policy.log_prob(action) - old).exp()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return -gain + 0.5 * ((value - goal) ** 2).mean() - 0.01 * policy.entropy().mean()

    def step(optimizers: Sequence[Any]) -> None:
        (optimizer,) = optimizers
        data = poles.rollout(model, 128)
        for _ in range(4):
            for index in torch.randperm(2048, generator=generator).split(256):
                optimizer.zero_grad()
                loss(tuple(t[index] for t in data)).backward()
                optimizer.step()

    def evaluate() -> tuple[float, float]:
        return steps_missing(model, 0.05), steps_missing(model, 0.2)

    return Training((model,), step, evaluate)


_DIGITS_NEIGHBOUR = "error of the nearest neighbour's class on 500 others"

PROBLEMS = (
    LossProblem(
        "triplet",
        "`F.triplet_margin_loss`, margin 0.5, of three passes",
        "ReLU MLP 64-128-64-16; digits with noise; batch 64",
        "triplet loss",
        _DIGITS_NEIGHBOUR,
        _triplet,
    ),
    LossProblem(
        "contrastive",
        "SimCLR's loss by hand, temperature 0.2",
        "ReLU MLP 64-128-128-16; digits moved by up to a pixel, with noise; 96 pairs a batch",
        "contrastive loss",
        _DIGITS_NEIGHBOUR,
        _contrastive,
    ),
    LossProblem(
        "dice",
        "Dice over the batch",
        "ReLU net of 6 convolutions, down and up; a disc beside a square, 600 images; batch 32",
        "Dice loss on 200 of them",
        "1 − intersection over union on 200 others",
        _dice,
        budget=12.0,
    ),
    LossProblem(
        "ctc",
        "`F.ctc_loss`",
        "ReLU net of 3 convolutions over columns; strips of two to four digits; batch 32",
        "CTC loss",
        "share of 400 other strips that are misread",
        _ctc,
    ),
    LossProblem(
        "vae",
        "negative ELBO: `(bce + kl) / n`",
        "tanh VAE 64-128-8-128-64; digits; batch 64",
        "negative ELBO",
        "the same on 500 others",
        _vae,
    ),
    LossProblem(
        "gan",
        "GAN: `F.softplus` of a critic, two optimizers",
        "ReLU MLPs 8-64-64-2 and 2-64-64-1; ring of eight Gaussians; batch 128",
        "energy distance",
        "share of points farther than a deviation from all data",
        _gan,
    ),
    LossProblem(
        "ppo",
        "PPO: clipped ratio + value − entropy",
        "tanh MLPs 4-32-32-2 and 4-32-32-1; cart-pole, 16 poles, 128 steps; batch 256",
        f"steps that are missing to {HORIZON}",
        "the same from wider starts",
        _ppo,
        steps=32,
    ),
)
