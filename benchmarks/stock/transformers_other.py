"""Models of images and sounds of transformers, and adapters of peft."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator

from benchmarks.stock.architecture import (
    CLASSES,
    FIRST_WORD,
    SIZE,
    Architecture,
    Training,
    images,
    sentences,
    waves,
)
from benchmarks.stock.transformers_text import (
    ENCODER_DECODER,
    GPT,
    TINY,
    Batch,
    causal,
    sentence_classes,
    train,
)

SIDE = 32
VISION = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": CLASSES,
}
SOUND = {
    **{k: v for k, v in TINY.items() if k != "max_position_embeddings"},
    "conv_dim": [16, 32],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "ctc_zero_infinity": True,
    "ctc_loss_reduction": "mean",
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}


def pictures(generator: Generator) -> Batch:
    """Return images and their classes."""
    pixels, labels = images(generator, SIDE)
    return {"pixel_values": pixels, "labels": labels}


def hidden_patches(generator: Generator) -> Batch:
    """Return images of which patches are left out at random."""
    return {"pixel_values": images(generator, SIDE)[0]}


def segments(generator: Generator) -> Batch:
    """Return images and the class of each pixel."""
    pixels, labels = images(generator, SIDE)
    where = pixels.mean(1) > 0
    return {"pixel_values": pixels, "labels": torch.where(where, labels[:, None, None], 0)}


def captions(generator: Generator) -> dict[str, Any]:
    """Return images and sentences that name their classes."""
    pixels, labels = images(generator, SIDE, classes=SIZE)
    tokens, mask = sentences(generator)
    tokens[:, 0] = FIRST_WORD + labels
    return {
        "pixel_values": pixels,
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "return_loss": True,
    }


def speech(generator: Generator) -> Batch:
    """Return sounds of different lengths, and the words to be heard in them."""
    sound, kinds = waves(generator, 400)
    ends = torch.randint(240, 401, (SIZE, 1), generator=generator)
    mask = torch.arange(400) < ends
    words = FIRST_WORD + kinds[:, None] + torch.arange(3)
    return {"input_values": sound * mask, "attention_mask": mask.long(), "labels": words}


def sound_classes(generator: Generator) -> Batch:
    """Return sounds and their classes."""
    sound, kinds = waves(generator, 400)
    return {"input_values": sound, "labels": kinds}


def spectrograms(generator: Generator) -> Batch:
    """Return spectra `[SIZE, 16, 48]`, and the words to be heard in them."""
    sound, kinds = waves(generator, 16 * 48)
    words = FIRST_WORD + kinds[:, None] + torch.arange(4)
    return {"input_features": sound.reshape(SIZE, 48, 16).mT, "labels": words}


def _row(
    name: str, model: str, draw: Callable[[Generator], Any], config: dict[str, Any], **more: Any
) -> Architecture:
    return Architecture(name, "transformers", partial(train, model, {**config, **more}, draw))


def _adapted(
    model: str, config: dict[str, Any], draw: Callable[[Generator], Any], adapter: Callable[[], Any]
) -> Training:
    import peft

    training = train(model, config, draw)
    network = peft.get_peft_model(training.model, adapter())
    return Training(network, training.batches, lambda batch: network(**batch).loss)


def _lora(**settings: Any) -> Callable[[], Any]:
    def adapter() -> Any:
        import peft

        return peft.LoraConfig(r=4, **settings)

    return adapter


def _adapter_row(
    name: str,
    model: str,
    config: dict[str, Any],
    draw: Callable[[Generator], Any],
    adapter: Callable[[], Any],
) -> Architecture:
    return Architecture(name, "peft", partial(_adapted, model, config, draw, adapter))


STAGES = {"image_size": SIDE, "num_labels": CLASSES}
CLIP = {
    "text_config": {**TINY, "eos_token_id": 2},
    "vision_config": {k: v for k, v in VISION.items() if k != "num_labels"},
    "projection_dim": 16,
}
LABELLED = {**TINY, "num_labels": CLASSES}
ARCHITECTURES = [
    _row("ViT", "ViTForImageClassification", pictures, VISION),
    _row("DeiT", "DeiTForImageClassification", pictures, VISION),
    _row("BEiT", "BeitForImageClassification", pictures, VISION),
    _row("DINOv2", "Dinov2ForImageClassification", pictures, VISION),
    _row("Swin", "SwinForImageClassification", pictures, STAGES, patch_size=2, embed_dim=16,
         depths=[2, 2], num_heads=[2, 4], window_size=4),
    _row("ConvNeXt", "ConvNextForImageClassification", pictures, STAGES,
         hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2),
    _row("ViT-MAE", "ViTMAEForPreTraining", hidden_patches, VISION, decoder_hidden_size=32,
         decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=64),
    _row("SegFormer", "SegformerForSemanticSegmentation", segments, STAGES,
         hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[2, 4],
         sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
         decoder_hidden_size=32),
    _row("CLIP", "CLIPModel", captions, CLIP),
    _row("Whisper", "WhisperForConditionalGeneration", spectrograms, ENCODER_DECODER,
         num_mel_bins=16, max_source_positions=24, max_target_positions=16,
         suppress_tokens=None, begin_suppress_tokens=None),
    _row("Wav2Vec2, words", "Wav2Vec2ForCTC", speech, SOUND),
    _row("HuBERT, classes", "HubertForSequenceClassification", sound_classes, SOUND,
         num_labels=CLASSES, classifier_proj_size=16),
    _adapter_row("LoRA on GPT-2", "GPT2LMHeadModel", GPT, causal,
                 _lora(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj", "c_fc"],
                       fan_in_fan_out=True)),
    _adapter_row("LoRA on BERT", "BertForSequenceClassification", LABELLED, sentence_classes,
                 _lora(task_type="SEQ_CLS", target_modules=["query", "value"])),
    _adapter_row("DoRA on Llama", "LlamaForCausalLM", TINY, causal,
                 _lora(task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj", "v_proj"])),
]  # fmt: skip
