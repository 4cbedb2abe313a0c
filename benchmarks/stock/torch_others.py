"""Networks of torch's own modules on images, tables, points and coordinates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import VisionTransformer, autoencoder, resnet
from benchmarks.stock.architecture import CLASSES, SIZE, Architecture, Training, batches, images

SIDE = 16


class UNet(nn.Module):
    """Convolutions down, transposed ones up, with shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.bottom = self._pair(3, 8), self._pair(8, 16), self._pair(16, 32)
        self.raise2, self.raise1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.up2, self.up1 = self._pair(32, 16), self._pair(16, 8)
        self.head = nn.Conv2d(8, 1, 1)

    @staticmethod
    def _pair(channels_in: int, channels_out: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for c in (channels_in, channels_out):
            layers += [
                nn.Conv2d(c, channels_out, 3, 1, 1),
                nn.GroupNorm(4, channels_out),
                nn.SiLU(),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 3, H, W]` to `[N, 1, H, W]`."""
        a = self.enter(x)
        b = self.down(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.up2(torch.cat([self.raise2(c), b], 1))
        a = self.up1(torch.cat([self.raise1(b), a], 1))
        y: Tensor = self.head(a)
        return y


class VAE(nn.Module):
    """A convolutional variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, 2 * 8),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(8, 32 * 16), nn.ReLU(), nn.Unflatten(1, (32, 4, 4)),
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map `[N, 3, H, W]` to its reconstruction, and mean and log variance of the code."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


class Recommender(nn.Module):
    """DLRM: embeddings and dense features that meet in dot products."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, 16, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, items: Tensor) -> Tensor:
        """Map `[N, 8]` and `[N, 3, K]` to logits `[N]`."""
        x = self.bottom(dense)
        vectors = [table(items[:, i]) for i, table in enumerate(self.tables)]
        stacked = torch.stack([x, *vectors], 1)
        meetings = torch.bmm(stacked, stacked.mT)
        rows, columns = torch.triu_indices(4, 4, 1)
        logits: Tensor = self.top(torch.cat([x, meetings[:, rows, columns]], 1))
        return logits[:, 0]


class Factorisation(nn.Module):
    """Ratings as products of vectors of user and item."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(40, 16), nn.Embedding(40, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        """Map `[N, 2]` to `[N]`."""
        found: Tensor = self.head(self.users(pairs[:, 0]) * self.items(pairs[:, 1]))
        return found[:, 0]


class Radiance(nn.Module):
    """A NeRF: coordinates in waves, a skip connection, colour and density."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3 + 24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(64 + 27, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.density, self.colour = nn.Linear(64, 1), nn.Linear(64, 3)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[N, S, 3]` to colours `[N, S, 3]` and densities `[N, S]`."""
        phases = points[..., None] * 2.0 ** torch.arange(4)
        x = torch.cat([points, phases.sin().flatten(-2), phases.cos().flatten(-2)], -1)
        hidden = self.second(torch.cat([self.first(x), x], -1))
        return self.colour(hidden).sigmoid(), F.softplus(self.density(hidden))[..., 0]


class Points(nn.Module):
    """PointNet: one network for all points, their maximum, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(
            nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, points: Tensor) -> Tensor:
        """Map `[N, S, 3]` to `[N, CLASSES]`."""
        logits: Tensor = self.head(self.each(points.mT).amax(-1))
        return logits


class Coupling(nn.Module):
    """RealNVP: affine couplings, for the density of points."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map points `[N, 2]` to where they come from, and the logarithm of the volume there."""
        volume = torch.zeros(len(x))
        for network in self.networks:
            kept, moved = x.unbind(1)
            scale, shift = network(kept[:, None]).unbind(1)
            scale = scale.tanh()
            x = torch.stack([moved * scale.exp() + shift, kept], 1)
            volume = volume + scale
        return x, volume


class Film(nn.Module):
    """Convolutions over space and time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
            nn.Linear(16, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 1, T, H, W]` to `[N, CLASSES]`."""
        logits: Tensor = self.layers(x)
        return logits


def _classes(make: Callable[[], nn.Module], draw: Callable[[Generator], Any]) -> Training:
    network = make()
    return Training(network, batches(draw), lambda b: F.cross_entropy(network(b[0]), b[1]))


def _pictures(generator: Generator) -> tuple[Tensor, Tensor]:
    return images(generator, SIDE)


def _films(generator: Generator) -> tuple[Tensor, Tensor]:
    pixels, labels = images(generator, SIDE, 4)
    return pixels[:, None], labels


def _clouds(generator: Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (SIZE,), generator=generator)
    points = torch.randn(SIZE, 24, 3, generator=generator)
    points[..., 0] *= 0.3 + labels[:, None]
    return points, labels


def _unet() -> Training:
    network = UNet()

    def loss(pixels: Tensor) -> Tensor:
        where = (pixels.mean(1, keepdim=True) > 0).float()
        return F.binary_cross_entropy_with_logits(network(pixels), where)

    return Training(network, batches(lambda g: _pictures(g)[0]), loss)


def _vae() -> Training:
    network = VAE()

    def loss(pixels: Tensor) -> Tensor:
        found, mean, log_variance = network(pixels)
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return F.mse_loss(found, pixels, reduction="sum") / len(pixels) + prior

    return Training(network, batches(lambda g: images(g, SIDE, shifts=0.3)[0]), loss)


def _autoencoder() -> Training:
    network = autoencoder([3 * SIDE * SIDE, 64, 16])

    def loss(pixels: Tensor) -> Tensor:
        return F.mse_loss(network(pixels.flatten(1)), pixels.flatten(1))

    return Training(network, batches(lambda g: _pictures(g)[0]), loss)


def _recommender() -> Training:
    network = Recommender()

    def draw(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        dense = torch.randn(SIZE, 8, generator=generator)
        items = torch.randint(50, (SIZE, 3, 4), generator=generator)
        return dense, items, (dense[:, 0] + (items[:, 0] < 25).sum(1) > 2).float()

    def loss(batch: Any) -> Tensor:
        dense, items, clicks = batch
        return F.binary_cross_entropy_with_logits(network(dense, items), clicks)

    return Training(network, batches(draw), loss)


def _factorisation() -> Training:
    network = Factorisation()

    def draw(generator: Generator) -> tuple[Tensor, Tensor]:
        pairs = torch.randint(40, (SIZE, 2), generator=generator)
        return pairs, 1 + (pairs[:, 0] * pairs[:, 1] % 5).float()

    def loss(batch: Any) -> Tensor:
        pairs, ratings = batch
        return F.mse_loss(network(pairs), ratings)

    return Training(network, batches(draw), loss)


def _radiance() -> Training:
    network = Radiance()

    def draw(generator: Generator) -> tuple[Tensor, Tensor]:
        start = torch.rand(SIZE, 1, 3, generator=generator)
        direction = F.normalize(torch.randn(SIZE, 1, 3, generator=generator), dim=-1)
        rays = start + direction * torch.linspace(0, 1, 12)[:, None]
        return rays, (0.5 + 0.5 * (4 * start[:, 0]).sin())

    def loss(batch: Any) -> Tensor:
        rays, seen = batch
        colours, densities = network(rays)
        passed = (-densities / 12).cumsum(1)
        before = F.pad(passed[:, :-1], (1, 0)).exp()
        weights = before * (1 - (-densities / 12).exp())
        return F.mse_loss((weights[..., None] * colours).sum(1), seen)

    return Training(network, batches(draw), loss)


def _coupling() -> Training:
    network = Coupling()

    def draw(generator: Generator) -> Tensor:
        angle = 3.1 * torch.rand(SIZE, 1, generator=generator)
        noise = 0.1 * torch.randn(SIZE, 2, generator=generator)
        return 2 * torch.cat([angle.cos(), angle.sin()], 1) + noise

    def loss(points: Tensor) -> Tensor:
        origin, volume = network(points)
        return (0.5 * origin.square().sum(1) - volume).mean()

    return Training(network, batches(draw), loss)


def _q_network() -> Training:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip

    def loss(batch: Any) -> Tensor:
        states, actions = batch
        values = network(states).gather(1, actions[:, None])[:, 0]
        return F.smooth_l1_loss(values, 1.0 + actions)

    return Training(network, batches(_pictures), loss)


def _row(name: str, make: Callable[[], Training]) -> Architecture:
    return Architecture(name, "torch", make)


ARCHITECTURES = [
    _row("MLP autoencoder", _autoencoder),
    _row("ResNet", partial(_classes, lambda: resnet(3, CLASSES, (8, 16), 1), _pictures)),
    _row(
        "ViT",
        partial(_classes, lambda: VisionTransformer(SIDE, 4, 3, CLASSES, 32, 2, 4), _pictures),
    ),
    _row("U-Net", _unet),
    _row("VAE", _vae),
    _row("Deep Q-network", _q_network),
    _row("3-d convolutions", partial(_classes, Film, _films)),
    _row("PointNet", partial(_classes, Points, _clouds)),
    _row("DLRM", _recommender),
    _row("Matrix factorisation", _factorisation),
    _row("NeRF", _radiance),
    _row("RealNVP", _coupling),
]
