"""The problems on which settings of `KFACOptimizer` are chosen: nine, and the comparison's.

The nine are what others tried the library on when its defaults had been chosen on the eleven of the
comparison: signals in the manner of Greydanus & Kobak's (2024) MNIST-1D with three networks, a
photograph, a denoising U-Net, a language model with a tied head, clicks, a VAE, sixteen layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from sklearn.datasets import load_sample_image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks import problems
from benchmarks.architectures import mlp
from benchmarks.problems import kinds_of_layers, language, losses_of_batches, losses_of_data
from benchmarks.problems.kinds_of_layers import HELD_OUT, Recommender
from benchmarks.problems.losses_of_batches import VAE
from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, classification, shuffled

SIGNALS, SAMPLES, CLASSES, KNOTS = 4000, 40, 10, 12
TEST = 1000
WAVES = 32
PATCH, PATCHES, NOISE = 16, 4000, 0.15


def _generator() -> Generator:
    return Generator().manual_seed(DATA_SEED)


# Signals -----------------------------------------------------------------------------------------


def _interpolated(curves: Tensor, places: Tensor) -> Tensor:
    """Return curves `[N, K]`, given at 0, 1, ..., K − 1, at places `[N, S]`; 0 outside."""
    last = curves.shape[1] - 1
    left = places.floor().clamp(0, last - 1).long()
    share = places - left
    values = (1 - share) * curves.gather(1, left) + share * curves.gather(1, left + 1)
    return torch.where((places >= 0) & (places <= last), values, torch.zeros(()))


@cache
def signals() -> tuple[Batch, Batch]:
    """Return signals `[N, SAMPLES]` and which of ten random curves is in each.

    A curve has KNOTS values and takes 0.3 to 0.5 of the signal, wherever that is; it is scaled,
    sheared, and there is smooth and white noise.
    """
    generator = _generator()
    count = SIGNALS + TEST
    curves = torch.randn(CLASSES, KNOTS, generator=generator).cumsum(1)
    curves = (curves - curves.mean(1, keepdim=True)) / curves.std(1, keepdim=True)
    y = torch.randint(CLASSES, (count,), generator=generator)
    wide, shift, scale, shear = torch.rand(4, count, 1, generator=generator)
    wide = (0.3 + 0.2 * wide) * SAMPLES
    places = (torch.arange(SAMPLES) - shift * (SAMPLES - wide)) * (KNOTS - 1) / wide
    own = (0.6 + 0.8 * scale) * curves[y]
    own = own + (shear - 0.5) * torch.linspace(-1, 1, KNOTS)
    smooth = F.avg_pool1d(torch.randn(count, SAMPLES + 4, generator=generator)[:, None], 5, 1)[:, 0]
    X = _interpolated(own, places) + 0.5 * smooth
    X = X + 0.05 * torch.randn(X.shape, generator=generator)
    data = ((X - X.mean()) / X.std(), y)
    return tuple(t[:SIGNALS] for t in data), tuple(t[SIGNALS:] for t in data)


def _signals_mlp() -> Task:
    return classification(mlp((SAMPLES, 100, 100, CLASSES), nn.ReLU), signals(), 100)


def _signals_conv() -> Task:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, SAMPLES))]
    for before, kernel in ((1, 5), (25, 3), (25, 3)):
        layers += [nn.Conv1d(before, 25, kernel, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(125, CLASSES))
    return classification(model, signals(), 100)


class SignalEncoder(nn.Module):
    """Torch's own encoder over the samples, with learnt positions."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(SAMPLES, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, SAMPLES]` to logits `[N, CLASSES]`."""
        code = self.encoder(self.first(x[:, :, None]) + self.positions)
        logits: Tensor = self.head(code.mean(1))
        return logits


def _signals_encoder() -> Task:
    return classification(SignalEncoder(32, 2), signals(), 50)


# A photograph ------------------------------------------------------------------------------------


@cache
def china() -> Tensor:
    """Return scikit-learn's temple `[3, 427, 640]` in [0, 1]."""
    return torch.tensor(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 255


@cache
def pixels() -> tuple[Batch, Batch]:
    """Return Fourier features `[N, 2 WAVES]` of places in the photograph, and its colours there.

    Of the photograph at a quarter of its size; every tenth pixel is in the other part.
    """
    small = F.avg_pool2d(china()[None], 4)[0]
    axes = (torch.linspace(-1, 1, n) for n in small.shape[1:])
    places = torch.cartesian_prod(*axes)
    waves = 8 * torch.randn(2, WAVES, generator=_generator())
    features = torch.cat([(places @ waves).sin(), (places @ waves).cos()], 1)
    data = (features, small.flatten(1).mT.contiguous())
    order = torch.randperm(len(features), generator=_generator())
    cut = len(order) // 10
    return tuple(t[order[cut:]] for t in data), tuple(t[order[:cut]] for t in data)


def _photograph() -> Task:
    train, test = pixels()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    model = mlp((2 * WAVES, 64, 64, 64, 3), nn.ReLU)
    return Task(model, loss, shuffled(train, 512), lambda m: math.sqrt(loss(m, test)))


@cache
def patches() -> tuple[Batch, Batch]:
    """Return noisy and clean patches `[N, 3, 16, 16]`; of the photograph's left and right."""
    found, generator = [], _generator()
    for part, count in ((china()[:, :, :480], PATCHES), (china()[:, :, 480:], TEST // 2)):
        windows = part.unfold(1, PATCH, 1).unfold(2, PATCH, 1)
        rows, columns = (
            torch.randint(n, (count,), generator=generator) for n in windows.shape[1:3]
        )
        clean = windows[:, rows, columns].transpose(0, 1).contiguous()
        noise = NOISE * torch.randn(clean.shape, generator=generator)
        found.append((clean + noise, clean))
    return found[0], found[1]


class UNet(nn.Module):
    """Ronneberger et al.'s (2015), of two resolutions, that predicts the noise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start = self._two(3, width)
        self.inside = self._two(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.end = nn.Sequential(self._two(2 * width, width), nn.Conv2d(width, 3, 1))

    @staticmethod
    def _two(before: int, after: int) -> nn.Sequential:
        first, second = (nn.Conv2d(n, after, 3, padding=1) for n in (before, after))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return the clean images."""
        outside = self.start(x)
        inside = self.up(self.inside(F.max_pool2d(outside, 2)))
        noise: Tensor = self.end(torch.cat([outside, inside], 1))
        return x - noise


def _unet() -> Task:
    train, test = patches()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    return Task(UNet(12), loss, shuffled(train, 32), lambda m: math.sqrt(loss(m, test)))


# Text, clicks, digits ----------------------------------------------------------------------------


def _tied() -> Task:
    return language.characters_task(batch_size=16, tied=True)


def _clicks() -> Task:
    train, held_out = kinds_of_layers.clicks()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(*batch[:3]), batch[3])

    assert len(held_out[0]) == HELD_OUT
    return Task(Recommender(), loss, shuffled(train, 256), lambda m: float(loss(m, held_out)))


def _vae() -> Task:
    (train, _), (test, _) = losses_of_data.digits()

    def noisy(x: Tensor, generator: Generator) -> Batch:
        return x, torch.randn(len(x), 8, generator=generator)

    def batches(generator: Generator) -> Iterator[Batch]:
        for (x,) in shuffled((train,), 64)(generator):
            yield noisy(x, generator)

    fixed = noisy(test, _generator())
    loss = losses_of_batches.negative_elbo
    return Task(VAE(), loss, batches, lambda m: float(loss(m, fixed)))


def _deep() -> Task:
    return classification(mlp((64, *[48] * 16, 10)), losses_of_data.digits(), 64)


_SIGNALS = "4,000 synthetic signals of 40 samples, 10 classes; cross entropy"
_problem: Callable[..., Problem] = partial(Problem, budget=4)

NINE = (
    _problem(
        "signals-mlp",
        f"MLP 40-100-100-10, ReLU; {_SIGNALS}; batch 100",
        "error on 1,000 others",
        _signals_mlp,
    ),
    _problem(
        "signals-conv1d",
        f"three strided `nn.Conv1d` of 25 channels; {_SIGNALS}; batch 100",
        "error on 1,000 others",
        _signals_conv,
    ),
    _problem(
        "signals-encoder",
        f"`nn.TransformerEncoder` of 2 layers, d = 32, 4 heads, dropout 0.1; {_SIGNALS}; batch 50",
        "error on 1,000 others",
        _signals_encoder,
    ),
    _problem(
        "photograph",
        "MLP 64-64-64-64-3, ReLU, of Fourier features of the place; colours of a photograph of 106 "
        "x 160 pixels; MSE; batch 512",
        "RMSE on a tenth of the pixels",
        _photograph,
    ),
    _problem(
        "denoising-unet",
        "U-Net of two resolutions, 12 and 24 channels; 4,000 noisy patches of 16 x 16 of a "
        "photograph; MSE; batch 32",
        "RMSE on 500 patches of another part of the photograph",
        _unet,
    ),
    _problem(
        "tied-lm",
        "causal transformer of 2 layers, d = 64, 4 heads, whose head is the embedding's; Python's "
        "standard library; cross entropy; 16 sequences of 64 characters",
        "validation bits per character",
        _tied,
    ),
    _problem(
        "click-model",
        "embeddings of 1,000 users and 500 items of width 8, a dense part, products of pairs; "
        "400,000 synthetic clicks; BCE with logits; batch 256",
        "the loss on 4,000 others",
        _clicks,
    ),
    _problem(
        "digits-vae",
        "VAE 64-128-8, tanh; digits; BCE with logits + KL divergence; batch 64",
        "the loss on 500 others",
        _vae,
    ),
    _problem(
        "sixteen-layers",
        "16 tanh layers of 48; digits; cross entropy; batch 64",
        "error on 500 others",
        _deep,
    ),
)

PROBLEMS: dict[str, Problem] = {p.name: p for p in NINE} | problems.PROBLEMS
