"""A character language model
==========================

Train a small GPT on the text of Python's own manual, one character after the other.

.. code-block:: sh

    python examples/05_language_model.py [--quick] [--seconds 7] [--seeds 2] [--output FOLDER]

The network is nanoGPT's in small: two blocks of causal attention and an MLP. The text comes with
every Python, in ``pydoc_data.topics``; the last tenth is held out. The held-out loss decides. In
the end the model that K-FAC trained writes a few lines.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from side_by_side import KFAC, Run, command_line, compare, plot, print_table
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, BLOCKS, LENGTH, BATCH = 64, 4, 2, 64, 16
RATES = (1e-3, 3e-3, 1e-2, 3e-2)

text = "\n".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
number = {character: i for i, character in enumerate(characters)}
data = torch.tensor([number[character] for character in text])
train_data, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]


class Block(nn.Module):
    """Causal attention, then an MLP, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, T, WIDTH]` to the same shape."""
        qkv = self.to_qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, HEADS, T, WIDTH / HEADS]
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Characters in, the logits of the next ones out."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(characters), WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(characters))

    def forward(self, x: Tensor) -> Tensor:
        """Map characters `[N, T]` to logits `[N, T, C]`."""
        positions = self.positions(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.characters(x) + positions)))


def windows(source: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw pieces of the text, and the same pieces one character on."""
    starts = torch.randint(len(source) - LENGTH, (count, 1), generator=generator)
    piece = source[starts + torch.arange(LENGTH + 1)]
    return piece[:, :-1], piece[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def write(model: nn.Module, length: int) -> str:
    x = torch.tensor([[number["\n"]]])
    for _ in range(length):
        probabilities = model(x[:, -LENGTH:])[0, -1].softmax(0)
        x = torch.cat([x, torch.multinomial(probabilities, 1)[None]], dim=1)
    return "".join(characters[i] for i in x[0])


trained: dict[str, nn.Module] = {}


def train(run: Run) -> None:
    torch.manual_seed(run.seed)
    model = trained[run.name] = GPT()
    optimizer = run.optimizer(model)
    generator = torch.Generator().manual_seed(run.seed)
    x_val, y_val = windows(held_out, 64, torch.Generator().manual_seed(0))

    @torch.no_grad()
    def measure() -> dict[str, float]:
        return {"held-out loss": loss_of(model, x_val, y_val).item()}

    for _ in run.steps(optimizer, measure):
        x, y = windows(train_data, BATCH, generator)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def main() -> None:
    arguments = command_line(__doc__, seconds=7, seeds=2)
    runs = compare(train, RATES, arguments.seconds, arguments.seeds)
    print_table(runs)
    plot(runs, arguments.output / "05_language_model.png", log=False)
    print(f"\nThe model that {KFAC} trained writes:\n{write(trained[KFAC], 300)}")


if __name__ == "__main__":
    main()
