"""Networks of torch's own modules on sequences: recurrent ones, transformers, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from benchmarks.stock.architecture import (
    CLASSES,
    FIRST_WORD,
    IGNORED,
    LENGTH,
    MASK,
    PAD,
    VOCABULARY,
    Architecture,
    Training,
    batches,
    sentences,
    waves,
)

WIDTH = 32


def _words(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, which of them are no padding, and the next ones."""
    tokens, mask = sentences(generator, LENGTH + 1)
    following = torch.where(mask[:, 1:], tokens[:, 1:], IGNORED)
    return tokens[:, :-1], mask[:, :-1], following


def _classified(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, which of them are no padding, and the class of each sentence."""
    tokens, mask = sentences(generator)
    return tokens, mask, (tokens[:, 0] - FIRST_WORD) * CLASSES // (VOCABULARY - FIRST_WORD)


class RecurrentLanguageModel(nn.Module):
    """Says the next word.

    Args:
        kind: A recurrent module.
    """

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, PAD)
        self.recurrent = kind(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map `[N, S]` to `[N, S, VOCABULARY]`."""
        logits: Tensor = self.head(self.recurrent(self.embedding(tokens))[0])
        return logits


class PackedClassifier(nn.Module):
    """Reads packed sentences in both directions.

    Args:
        kind: A recurrent module.
    """

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, PAD)
        self.recurrent = kind(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map `[N, S]` to `[N, CLASSES]`."""
        packed = rnn.pack_padded_sequence(
            self.embedding(tokens), mask.sum(1), batch_first=True, enforce_sorted=False
        )
        states, _ = rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        logits: Tensor = self.head(states.sum(1) / mask.sum(1, keepdim=True))
        return logits


class CellByCell(nn.Module):
    """Steps an `nn.LSTMCell` through the sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, PAD)
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map `[N, S]` to `[N, S, VOCABULARY]`."""
        state, found = None, []
        for x in self.embedding(tokens).unbind(1):
            state = self.cell(x, state)
            found.append(self.head(state[0]))
        return torch.stack(found, 1)


class EncoderClassifier(nn.Module):
    """`nn.TransformerEncoder`, averaged over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, PAD)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map `[N, S]` to `[N, CLASSES]`."""
        x = self.encoder(self.embedding(tokens) + self.positions, src_key_padding_mask=~mask)
        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits: Tensor = self.head(x)
        return logits


class Translator(nn.Module):
    """`nn.Transformer`, encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, PAD)
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 64, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map `[N, S]` to `[N, S, VOCABULARY]`: each word from those before and the source."""
        said = F.pad(tokens[:, :-1], (1, 0), value=MASK)
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        x = self.transformer(
            self.embedding(tokens),
            self.embedding(said),
            tgt_mask=later,
            src_key_padding_mask=~mask,
            memory_key_padding_mask=~mask,
        )
        logits: Tensor = self.head(x)
        return logits


class GatedConvolutions(nn.Module):
    """WaveNet's causal, dilated, gated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, PAD)
        self.gates = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=d) for d in (1, 2, 4))
        self.mixes = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in self.gates)
        self.head = nn.Conv1d(WIDTH, VOCABULARY, 1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map `[N, S]` to `[N, S, VOCABULARY]`."""
        x = self.embedding(tokens).mT
        for gate, mix in zip(self.gates, self.mixes, strict=True):
            signal, opening = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            x = x + mix(signal.tanh() * opening.sigmoid())
        logits: Tensor = self.head(x).mT
        return logits


class SpeechRecogniser(nn.Module):
    """Convolutions over a sound, a GRU, and letters at each time."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(1, 16, 8, 4), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, WIDTH, 4, 2)
        )
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 1 + CLASSES + 2)

    def forward(self, sound: Tensor) -> Tensor:
        """Map `[N, T]` to `[N, S, letters]`."""
        x = self.convolutions(sound[:, None]).relu().mT
        logits: Tensor = self.head(self.recurrent(x)[0])
        return logits


def _train(
    make: Callable[[], nn.Module], draw: Callable[[Generator], tuple[Tensor, Tensor, Tensor]]
) -> Training:
    network = make()

    def loss(batch: Any) -> Tensor:
        tokens, mask, labels = batch
        logits = network(tokens, mask)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    return Training(network, batches(draw), loss)


def _heard(generator: Generator) -> tuple[Tensor, Tensor]:
    sound, kinds = waves(generator, 160)
    return sound, 1 + kinds[:, None] + torch.arange(3)


def _speech() -> Training:
    network = SpeechRecogniser()

    def loss(batch: Any) -> Tensor:
        sound, letters = batch
        logs = network(sound).log_softmax(-1).transpose(0, 1)
        lengths = [torch.full((len(sound),), n) for n in (len(logs), letters.shape[1])]
        return F.ctc_loss(logs, letters, *lengths)

    return Training(network, batches(_heard), loss)


def _row(name: str, make: Callable[[], nn.Module], draw: Callable[..., Any]) -> Architecture:
    return Architecture(name, "torch", partial(_train, make, draw))


ARCHITECTURES = [
    _row("LSTM language model", partial(RecurrentLanguageModel, nn.LSTM), _words),
    _row("GRU language model", partial(RecurrentLanguageModel, nn.GRU), _words),
    _row("RNN language model", partial(RecurrentLanguageModel, nn.RNN), _words),
    _row("LSTM, both directions, packed", partial(PackedClassifier, nn.LSTM), _classified),
    _row("LSTMCell in a loop", CellByCell, _words),
    _row("nn.TransformerEncoder", EncoderClassifier, _classified),
    _row(
        "nn.Transformer",
        Translator,
        lambda g: (lambda t, m: (t, m, torch.where(m, t, IGNORED)))(*sentences(g)),
    ),
    _row("WaveNet", GatedConvolutions, _words),
    Architecture("Conv1d, GRU and CTC", "torch", _speech),
]
