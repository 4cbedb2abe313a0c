"""Language models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.stock.architecture import (
    CLASSES,
    FIRST_WORD,
    IGNORED,
    LENGTH,
    MASK,
    PAD,
    SIZE,
    VOCABULARY,
    Architecture,
    Training,
    batches,
    sentences,
)

Batch = dict[str, Tensor]
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": MASK,
    "eos_token_id": MASK,
}
GROUPED = {**TINY, "num_key_value_heads": 2}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": MASK,
    "eos_token_id": MASK,
}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": MASK,
    "eos_token_id": MASK,
    "decoder_start_token_id": MASK,
}


def causal(generator: Generator) -> Batch:
    """Return padded sentences, each word to be said from those before."""
    tokens, mask = sentences(generator)
    labels = torch.where(mask, tokens, IGNORED)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def masked(generator: Generator) -> Batch:
    """Return padded sentences of which a quarter of the words is to be found."""
    tokens, mask = sentences(generator)
    hidden = mask & (torch.rand(tokens.shape, generator=generator) < 0.25)
    return {
        "input_ids": torch.where(hidden, MASK, tokens),
        "attention_mask": mask.long(),
        "labels": torch.where(hidden, tokens, IGNORED),
    }


def sentence_classes(generator: Generator) -> Batch:
    """Return padded sentences; their classes follow from the first word."""
    tokens, mask = sentences(generator)
    labels = (tokens[:, 0] - FIRST_WORD) * CLASSES // (VOCABULARY - FIRST_WORD)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def word_classes(generator: Generator) -> Batch:
    """Return padded sentences; each word has a class."""
    tokens, mask = sentences(generator)
    labels = torch.where(mask, tokens % CLASSES, IGNORED)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def replaced(generator: Generator) -> Batch:
    """Return padded sentences with wrong words, which are to be found."""
    tokens, mask = sentences(generator)
    wrong = mask & (torch.rand(tokens.shape, generator=generator) < 0.25)
    other = torch.randint(FIRST_WORD, VOCABULARY, tokens.shape, generator=generator)
    return {
        "input_ids": torch.where(wrong, other, tokens),
        "attention_mask": mask.long(),
        "labels": wrong.float(),
    }


def spans(generator: Generator) -> Batch:
    """Return sentences and where in each a word stands."""
    tokens, mask = sentences(generator)
    place = torch.randint(LENGTH // 2, (SIZE,), generator=generator)
    tokens[torch.arange(SIZE), place] = MASK
    return {
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "start_positions": place,
        "end_positions": place,
    }


def translated(generator: Generator) -> Batch:
    """Return padded sentences to be said with other words."""
    tokens, mask = sentences(generator)
    labels = torch.where(mask, FIRST_WORD + (3 * tokens) % (VOCABULARY - FIRST_WORD), IGNORED)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def train(model: str, config: dict[str, Any], draw: Callable[[Generator], Any]) -> Training:
    """Return a model of transformers with its own loss.

    Args:
        model: The name of the class.
        config: What its configuration gets.
        draw: Makes a batch.
    """
    import transformers

    kind = getattr(transformers, model)
    network = kind(kind.config_class(**config))
    network.train()
    return Training(network, batches(draw), lambda batch: network(**batch).loss)


def _row(
    name: str,
    model: str,
    draw: Callable[[Generator], Any],
    config: dict[str, Any] = TINY,
    why: tuple[tuple[str, str], ...] = (),
    warns: tuple[str, ...] = (),
    **more: Any,
) -> Architecture:
    labels = {"num_labels": CLASSES} if draw in (sentence_classes, word_classes) else {}
    settings = {**config, **labels, **more}
    return Architecture(name, "transformers", partial(train, model, settings, draw), warns, why)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = [
    _row("GPT-2", "GPT2LMHeadModel", causal, GPT),
    _row("GPT-2, classes of words", "GPT2ForTokenClassification", word_classes, GPT),
    _row("GPT-Neo", "GPTNeoForCausalLM", causal, num_layers=2, num_heads=4,
         attention_types=[[["global", "local"], 1]], window_size=4),
    _row("GPT-J", "GPTJForCausalLM", causal, GPT, rotary_dim=4),
    _row("GPT-NeoX", "GPTNeoXForCausalLM", causal),
    _row("OPT", "OPTForCausalLM", causal, ffn_dim=64, word_embed_proj_dim=32),
    _row("Bloom", "BloomForCausalLM", causal, n_layer=2, n_head=4),
    _row("Falcon", "FalconForCausalLM", causal),
    _row("Llama", "LlamaForCausalLM", causal, GROUPED),
    _row("Mistral", "MistralForCausalLM", causal, GROUPED, sliding_window=4),
    _row("Qwen2", "Qwen2ForCausalLM", causal, GROUPED),
    _row("Gemma", "GemmaForCausalLM", causal, GROUPED, head_dim=8),
    _row("Phi", "PhiForCausalLM", causal, GROUPED),
    _row("Mixtral", "MixtralForCausalLM", causal, GROUPED, num_local_experts=4),
    _row("Mixtral, experts one by one", "MixtralForCausalLM", causal, GROUPED, num_local_experts=4,
         experts_implementation="eager"),
    _row("Qwen2-MoE", "Qwen2MoeForCausalLM", causal, GROUPED, moe_intermediate_size=32,
         shared_expert_intermediate_size=32, **EXPERTS),
    _row("Mamba", "MambaForCausalLM", causal, state_size=4),
    _row("RWKV", "RwkvForCausalLM", causal, attention_hidden_size=32, context_length=32),
    _row("BERT, masked words", "BertForMaskedLM", masked),
    _row("BERT, questions", "BertForQuestionAnswering", spans),
    _row("RoBERTa", "RobertaForSequenceClassification", sentence_classes),
    _row("DistilBERT", "DistilBertForSequenceClassification", sentence_classes,
         dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    _row("ALBERT", "AlbertForMaskedLM", masked, embedding_size=16),
    _row("ELECTRA", "ElectraForPreTraining", replaced, embedding_size=16),
    _row("DeBERTa-v2", "DebertaV2ForTokenClassification", word_classes, relative_attention=True,
         pos_att_type=["p2c", "c2p"]),
    _row("XLNet", "XLNetForSequenceClassification", sentence_classes,
         {k: v for k, v in TINY.items() if k != "max_position_embeddings"},
         d_model=32, n_layer=2, n_head=4, d_inner=64),
    _row("T5", "T5ForConditionalGeneration", translated, d_model=32, d_kv=8, d_ff=64,
         num_layers=2, num_heads=4, decoder_start_token_id=PAD),
    _row("BART", "BartForConditionalGeneration", translated, ENCODER_DECODER),
    _row("Marian", "MarianMTModel", translated, ENCODER_DECODER),
]  # fmt: skip
