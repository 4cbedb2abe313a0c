"""Image models of timm."""

from __future__ import annotations

import sys
import types
from functools import partial
from typing import Any, ClassVar

from torch.nn import functional as F

from benchmarks.stock.architecture import CLASSES, Architecture, Training, batches, images


class _AnyMember(type):
    def __getattr__(cls, name: str) -> str:  # of an enumeration
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Absent(types.ModuleType):
    """Stands for torchvision while timm is imported: it has any name, and nothing in it works."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyMember(name, (), {})


def _timm() -> Any:
    """Import timm, where there is no torchvision, too: its models do without."""
    names = ["torchvision", *(f"torchvision.{n}" for n in ("transforms", "ops", "datasets"))]
    names += ["torchvision.transforms.functional", "torchvision.ops.misc"]
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in names:
            sys.modules[name] = _Absent(name)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, sys.modules[name])
    try:
        import timm
    finally:
        for name in names:
            if isinstance(sys.modules.get(name), _Absent):
                del sys.modules[name]
    return timm


def _train(model: str, side: int, settings: dict[str, Any]) -> Training:
    place, _, kind = model.rpartition(".")
    timm = _timm()
    if place:
        network = getattr(getattr(timm.models, place), kind)(num_classes=CLASSES, **settings)
    else:
        network = timm.create_model(model, num_classes=CLASSES, **settings)
    network.train()

    def loss(batch: Any) -> Any:
        pixels, labels = batch
        return F.cross_entropy(network(pixels), labels)

    return Training(network, batches(lambda g: images(g, side)), loss)


def _row(name: str, model: str, side: int = 32, **settings: Any) -> Architecture:
    return Architecture(name, "timm", partial(_train, model, side, settings))


ATTENTION = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
ARCHITECTURES = [
    _row("ResNet-18", "resnet18", channels=(8, 16, 32, 64), stem_width=8),
    _row("ResNet, bottlenecks", "resnet26", channels=(8, 8, 16, 16)),
    _row("ResNeXt", "resnext50_32x4d", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), cardinality=4,
         base_width=32),
    _row("SE-ResNet", "seresnet18", channels=(8, 16, 32, 64)),
    _row("ConvNeXt", "convnext_atto", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    _row("ConvNeXt v2", "convnextv2_atto", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    _row("EfficientNet", "test_efficientnet"),
    _row("MobileNetV2", "mobilenetv2_035"),
    _row("MobileNetV3", "mobilenetv3_small_050"),
    _row("RegNet", "regnetx_002"),
    _row("DenseNet", "densenet121", growth_rate=8, block_config=(2, 2, 2)),
    _row("NFNet", "test_nfnet"),
    _row("MambaOut", "test_mambaout"),
    _row("ViT", "vit_tiny_patch16_224", **ATTENTION),
    _row("ViT, class attention", "cait_xxs24_224", **ATTENTION),
    _row("Swin", "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4,
         embed_dim=16, depths=(1, 1), num_heads=(2, 4)),
    _row("MLP-Mixer", "mlp_mixer.MlpMixer", img_size=32, patch_size=8, embed_dim=32, num_blocks=2),
    _row("PoolFormer", "metaformer.MetaFormer", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    _row("ConvMixer", "convmixer.ConvMixer", dim=32, depth=2, patch_size=4, kernel_size=5),
    _row("VGG", "vgg.VGG", cfg=[16, "M", 32, "M", 32, "M"], mlp_ratio=1 / 32),
    _row("XCiT", "xcit_nano_12_p16_224", img_size=32, embed_dim=32, depth=2, num_heads=4),
]  # fmt: skip
