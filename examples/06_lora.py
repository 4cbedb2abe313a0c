"""Fine-tuning with LoRA
=====================

Adapt a small transformer to new data by training low-rank additions to its frozen matrices.

.. code-block:: sh

    python examples/06_lora.py [--quick] [--seconds 3] [--seeds 3] [--output FOLDER]

A transformer that reads an image's rows as eight words learns digits, and is frozen. Then it is to
read digits that lie on their side, mirrored. LoRA (Hu et al., 2021,
https://arxiv.org/abs/2106.09685) adds B A x to W x, with A and B of rank 4. They are plain linear
layers, and K-FAC takes them as such. The loss on the training data decides.
"""

from __future__ import annotations

import copy

import torch
from side_by_side import Run, command_line, compare, plot, print_table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, BLOCKS, RANK, BATCH = 48, 2, 4, 64
RATES = (3e-3, 1e-2, 3e-2, 1e-1)

digits = load_digits()
X = torch.tensor(digits.images, dtype=torch.float32) / 16  # [1797, 8, 8]
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train_rows, test_rows = order[:1400], order[1400:]
on_their_side = X.mT


class Block(nn.Module):
    """Attention, then an MLP, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 8, WIDTH]` to the same shape."""
        qkv = self.to_qkv(self.norm1(x)).unflatten(-1, (3, 4, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Rows of an image in, logits of ten digits out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(8, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 8, 8]` to `[N, 10]`."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.positions)).mean(1))


class LoRA(nn.Module):
    """A frozen linear layer, and a trained addition of low rank that begins at zero."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        self.A = nn.Linear(frozen.in_features, RANK, bias=False)
        self.B = nn.Linear(RANK, frozen.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., d_in]` to `[..., d_out]`."""
        return self.frozen(x) + self.B(self.A(x))


def pretrained(steps: int) -> Transformer:
    """Return a transformer that knows upright digits."""
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = train_rows[torch.randint(len(train_rows), (BATCH,))]
        optimizer.zero_grad()
        F.cross_entropy(model(X[rows]), y[rows]).backward()
        optimizer.step()
    return model.requires_grad_(False)


def with_adapters(model: Transformer) -> Transformer:
    """Return a copy in which each linear layer of the blocks has an adapter."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, LoRA(layer))
    return model


@torch.no_grad()
def loss_and_error(model: nn.Module, x: Tensor, rows: Tensor) -> tuple[float, float]:
    logits = model(x[rows])
    wrong = logits.argmax(1) != y[rows]
    return F.cross_entropy(logits, y[rows]).item(), 100 * wrong.float().mean().item()


def main() -> None:
    arguments = command_line(__doc__, seconds=3, seeds=3)
    base = pretrained(steps=20 if arguments.quick else 600)
    trained = sum(p.numel() for p in with_adapters(base).parameters() if p.requires_grad)
    print(f"{sum(p.numel() for p in base.parameters())} parameters, {trained} in adapters")
    for name, x in (("upright", X), ("on their side", on_their_side)):
        print(f"before, test error of digits {name}: {loss_and_error(base, x, test_rows)[1]:.1f} %")

    def train(run: Run) -> None:
        torch.manual_seed(run.seed)
        model = with_adapters(base)
        optimizer = run.optimizer(model)  # of what requires a gradient

        def measure() -> dict[str, float]:
            loss, _ = loss_and_error(model, on_their_side, train_rows)
            _, error = loss_and_error(model, on_their_side, test_rows)
            return {"training loss": loss, "test error [%]": error}

        for _ in run.steps(optimizer, measure):
            rows = train_rows[torch.randint(len(train_rows), (BATCH,))]
            optimizer.zero_grad()
            F.cross_entropy(model(on_their_side[rows]), y[rows]).backward()
            optimizer.step()

    runs = compare(train, RATES, arguments.seconds, arguments.seeds)
    print_table(runs)
    plot(runs, arguments.output / "06_lora.png")


if __name__ == "__main__":
    main()
