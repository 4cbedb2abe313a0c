"""Network architectures that several benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Return linear layers of the given widths with an activation between them.

    Glorot & Bengio's (2010) initialisation: torch's own lets the signal of deep tanh networks fade.

    Args:
        widths: The number of inputs, of each layer's units, and of outputs.
        activation: Makes an activation module.
    """
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layer = nn.Linear(d_in, d_out)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        modules += [layer, activation()]
    return nn.Sequential(*modules[:-1])


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """Return a tanh autoencoder with a linear code, of Hinton & Salakhutdinov's (2006) shape.

    Args:
        widths: From the number of inputs to the length of the code; the decoder mirrors them.
    """
    decoder = list(widths)[::-1]
    return nn.Sequential(mlp(widths), mlp(decoder))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, He et al. (2016).

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        stride: Of the first convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C_in, H, W]` to `[N, C_out, H/stride, W/stride]`."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(
    channels_in: int, classes: int, widths: Sequence[int] = (16, 32, 64), blocks: int = 3
) -> nn.Sequential:
    """Return a CIFAR-style ResNet of depth 6 `blocks` + 2 for three widths.

    Args:
        channels_in: Channels of the images.
        classes: Number of classes.
        widths: Channels of each stage; all but the first halve the resolution.
        blocks: Residual blocks in each stage.
    """
    stem = [nn.Conv2d(channels_in, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])]
    stages: list[nn.Module] = []
    before = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            stages.append(ResidualBlock(before, width, stride))
            before = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)]
    return nn.Sequential(*stem, nn.ReLU(), *stages, *head)


class AttentionBlock(nn.Module):
    """A pre-norm transformer block whose every matrix is an `nn.Linear`.

    Args:
        width: The model's dimension d.
        heads: Number of attention heads.
        causal: Whether a position sees only earlier ones.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, S, d]` to `[N, S, d]`."""
        qkv = self.query_key_value(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        change: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + change


class LanguageModel(nn.Module):
    """A causal transformer over characters.

    Args:
        vocabulary: Number of characters.
        width: The model's dimension.
        layers: Number of blocks.
        length: The longest sequence.
        heads: Number of attention heads.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, length: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads, True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, S]` to logits `[N, S, vocabulary]`."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class VisionTransformer(nn.Module):
    """A vision transformer that averages its positions before the head.

    Args:
        image: Side of the image, in pixels.
        patch: Side of a patch.
        channels: Channels of the image.
        classes: Number of classes.
        width: The model's dimension.
        layers: Number of blocks.
        heads: Number of attention heads.
    """

    def __init__(
        self,
        image: int,
        patch: int,
        channels: int,
        classes: int,
        width: int,
        layers: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads, False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to logits `[N, classes]`."""
        x = self.patches(images).flatten(2).mT + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits
