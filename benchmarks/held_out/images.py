"""Images: a photograph's patches, textures, glyphs, polygons."""

from __future__ import annotations

import math
from functools import cache

import torch
from sklearn.datasets import load_sample_image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import VisionTransformer
from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, classification, shuffled

PATCH, PATCHES = 16, 5000
TEXTURES, TEXTURE, TEXTURE_CLASSES = 4000, 16, 8
GLYPHS, GLYPH, FIELD, SCENES = 6, 5, 20, 6000
POLYGONS, CANVAS, SIDES = 6000, 24, (3, 4, 5, 8)
TEST = 500


def _generator() -> Generator:
    return Generator().manual_seed(DATA_SEED)


def _halves(data: Batch) -> tuple[Batch, Batch]:
    return tuple(t[TEST:] for t in data), tuple(t[:TEST] for t in data)


# Patches of a photograph -------------------------------------------------------------------------


@cache
def patches() -> tuple[Tensor, Tensor]:
    """Return patches `[N, 3, 16, 16]` of scikit-learn's flower in [0, 1], and those of its right.

    No pixel is in both parts.
    """
    photo = torch.tensor(load_sample_image("flower.jpg").copy()).permute(2, 0, 1).float() / 255
    found, generator = [], _generator()
    for part, count in ((photo[:, :, :480], PATCHES), (photo[:, :, 480:], TEST)):
        windows = part.unfold(1, PATCH, 1).unfold(2, PATCH, 1)
        rows, columns = (
            torch.randint(n, (count,), generator=generator) for n in windows.shape[1:3]
        )
        found.append(windows[:, rows, columns].transpose(0, 1).contiguous())
    return found[0], found[1]


def _patches() -> Task:
    train, test = patches()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return ((model(batch[0]) - batch[0]) ** 2 + 1e-4).sqrt().mean()

    encoder = [nn.Conv2d(3, 16, 4, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 4, 2, 1), nn.GELU()]
    code = [nn.Flatten(), nn.Linear(512, 32), nn.Linear(32, 512), nn.GELU()]
    decoder = [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(16, 3, 4, 2, 1)]
    model = nn.Sequential(*encoder, *code, nn.Unflatten(1, (32, 4, 4)), *decoder)
    return Task(model, loss, shuffled((train,), 64), lambda m: math.sqrt(F.mse_loss(m(test), test)))


# Textures ----------------------------------------------------------------------------------------


@cache
def textures() -> tuple[Batch, Batch]:
    """Return noise `[N, 1, 16, 16]` with one of eight spectra, and which.

    Class c has the direction π (c mod 4) / 4 ± 0.3 and the wave number 2.5 + 2 [c / 4] ± 1. A
    quarter of the variance is white noise.
    """
    generator = _generator()
    count = TEXTURES + TEST
    classes = torch.randint(TEXTURE_CLASSES, (count,), generator=generator)
    jitter = 2 * torch.rand(2, count, generator=generator) - 1
    angle = torch.pi * (classes % 4) / 4 + 0.3 * jitter[0]
    wave = 2.5 + 2 * (classes // 4) + jitter[1]
    axis = TEXTURE * torch.fft.fftfreq(TEXTURE)
    across, along = torch.meshgrid(axis, axis, indexing="ij")
    centre = torch.stack([wave * angle.sin(), wave * angle.cos()], 1)[:, :, None, None]
    distance = (across - centre[:, 0]) ** 2 + (along - centre[:, 1]) ** 2
    noise = torch.randn(count, TEXTURE, TEXTURE, generator=generator)
    image = torch.fft.ifft2(torch.fft.fft2(noise) * (-distance / 2).exp()).real
    image = image / image.std((1, 2), keepdim=True)
    image = image + torch.randn(image.shape, generator=generator) / math.sqrt(3)
    return _halves((image[:, None], classes))


class ConvBlock(nn.Module):
    """A pre-activation residual block of two 3x3 convolutions, He et al. (2016b)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to the same shape."""
        change = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            change = conv(F.relu(norm(change)))
        return x + change


def _textures() -> Task:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        ConvBlock(12),
        nn.Conv2d(12, 24, 2, 2),
        ConvBlock(24),
        ConvBlock(24),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, TEXTURE_CLASSES),
    )
    return classification(model, textures(), 64)


# Glyphs ------------------------------------------------------------------------------------------


@cache
def scenes() -> tuple[Batch, Batch]:
    """Return fields `[N, 1, 20, 20]` with some of six random glyphs in noise, and which.

    A glyph has 5 x 5 pixels of 0 or 1 and is there in half of the scenes, in one of 16 places,
    added to others.
    """
    generator = _generator()
    glyphs = torch.randint(2, (GLYPHS, GLYPH, GLYPH), generator=generator).float()
    count = SCENES + TEST
    there = torch.randint(2, (count, GLYPHS), generator=generator)
    corners = GLYPH * torch.randint(FIELD // GLYPH, (count, GLYPHS, 2), generator=generator)
    fields = 0.5 * torch.randn(count, FIELD, FIELD, generator=generator)
    offsets = torch.arange(GLYPH)
    for glyph in range(GLYPHS):
        own = there[:, glyph].nonzero()[:, 0]
        rows, columns = (corners[own, glyph, i, None] + offsets for i in (0, 1))
        fields[own[:, None, None], rows[:, :, None], columns[:, None, :]] += glyphs[glyph]
    return _halves((fields[:, None], there.float()))


class MixerBlock(nn.Module):
    """Tolstikhin et al. (2021): an MLP over the patches, and one over the channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.Sequential(
            nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches)
        )
        self.channels = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, patches, width]` to the same shape."""
        x = x + self.tokens(self.norms[0](x).mT).mT
        change: Tensor = self.channels(self.norms[1](x))
        return x + change


class Mixer(nn.Module):
    """An MLP-mixer of patches of a glyph's size."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        patches = (FIELD // GLYPH) ** 2
        self.patches = nn.Conv2d(1, width, GLYPH, GLYPH)
        self.blocks = nn.Sequential(*(MixerBlock(patches, width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, GLYPHS)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 1, 20, 20]` to logits `[N, GLYPHS]`."""
        tokens = self.blocks(self.patches(x).flatten(2).mT)
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


def _scenes() -> Task:
    train, (X, there) = scenes()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def error(model: nn.Module) -> float:
        return float(((model(X) > 0) != there.bool()).float().mean())

    return Task(Mixer(32, 3), loss, shuffled(train, 64), error)


# Polygons ----------------------------------------------------------------------------------------


@cache
def polygons() -> tuple[Batch, Batch]:
    """Return regular polygons `[N, 1, 24, 24]`, turned and moved a little, and which it is.

    A pixel is 1 inside and 0 outside, with a soft edge; the apothem is 5 to 9 pixels.
    """
    generator = _generator()
    count = POLYGONS + TEST
    classes = torch.randint(len(SIDES), (count,), generator=generator)
    sides = torch.tensor(SIDES)[classes].float()
    size, turn, *shift = torch.rand(4, count, generator=generator)
    axis = torch.arange(CANVAS) - (CANVAS - 1) / 2
    x, y = (axis - 3 * (s[:, None] - 0.5) for s in shift)
    x, y = x[:, None, :], y[:, :, None]
    wedge = 2 * torch.pi / sides
    angle = (torch.atan2(y, x) + (0.3 * wedge * turn)[:, None, None]) % wedge[:, None, None]
    apothem = (x**2 + y**2).sqrt() * (angle - wedge[:, None, None] / 2).cos()
    image = (2 * (5 + 4 * size[:, None, None] - apothem)).sigmoid()
    image = image + 0.1 * torch.randn(image.shape, generator=generator)
    return _halves((image[:, None], classes))


def _polygons() -> Task:
    model = VisionTransformer(CANVAS, 4, 1, len(SIDES), width=32, layers=2, heads=4)
    return classification(model, polygons(), 32)


PROBLEMS = (
    Problem(
        "conv-autoencoder",
        "convolutions 3-16-32 of stride 2, code of 32, transposed convolutions, GELU; 5,000 "
        "patches of 16 x 16 of a photograph; Charbonnier's loss; batch 64",
        "RMSE on 500 patches of another part of the photograph",
        _patches,
        budget=4,
    ),
    Problem(
        "texture-resnet",
        "pre-activation ResNet of 8 convolutions, 12 and 24 channels, BatchNorm; 4,000 images of "
        "filtered noise, 8 classes; cross entropy; batch 64",
        "error on 500 others",
        _textures,
        budget=4,
    ),
    Problem(
        "glyph-mixer",
        "MLP-mixer of 3 layers, width 32, patches of 5 x 5; which of six glyphs are in 6,000 "
        "fields of 20 x 20; BCE with logits; batch 64",
        "error a glyph on 500 other fields",
        _scenes,
        budget=4,
    ),
    Problem(
        "polygon-vit",
        "vision transformer of 2 layers, d = 32, 4 heads, patches of 4 x 4; 6,000 noisy polygons "
        "of 24 x 24, 4 classes; cross entropy; batch 32",
        "error on 500 others",
        _polygons,
        budget=4,
    ),
)
