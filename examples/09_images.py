"""An image classifier, plain and with Lightning
=============================================

Train a small residual network with batch norm on shifted digits; then hand it to Lightning.

.. code-block:: sh

    python examples/09_images.py [--quick] [--seconds 5] [--seeds 3] [--output FOLDER]

Each digit is moved by up to one pixel, anew in each batch. The held-out loss decides. Where
Lightning is installed (``pip install lightning``), its Trainer then trains the same network with
K-FAC: ``configure_optimizers`` returns the optimizer, and nothing else changes.
"""

from __future__ import annotations

import importlib.util

import torch
from side_by_side import Run, command_line, compare, plot, print_table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer

CHANNELS, BATCH = 16, 64
RATES = (1e-3, 3e-3, 1e-2, 3e-2)

digits = load_digits()
X = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
y = torch.tensor(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train_rows, held_out = order[:1400], order[1400:]


class Residual(nn.Module):
    """Two convolutions, added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to the same shape."""
        return F.relu(x + self.inner(x))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1),
        Residual(CHANNELS),
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, padding=1),
        Residual(2 * CHANNELS),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * CHANNELS, 10),
    )


def shifted(x: Tensor) -> Tensor:
    """Move each image by −1, 0 or 1 pixel in both directions."""
    padded = F.pad(x, (1, 1, 1, 1))
    down, right = torch.randint(3, (2, len(x), 1, 1))
    rows, columns = down + torch.arange(8)[:, None], right + torch.arange(8)
    return padded[torch.arange(len(x))[:, None, None], 0, rows, columns][:, None]


def train(run: Run) -> None:
    torch.manual_seed(run.seed)
    model = network()
    optimizer = run.optimizer(model)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        model.eval()
        logits = model(X[held_out])
        model.train()
        wrong = (logits.argmax(1) != y[held_out]).float()
        loss = F.cross_entropy(logits, y[held_out])
        return {"held-out loss": loss.item(), "held-out error [%]": 100 * wrong.mean().item()}

    for _ in run.steps(optimizer, measure):
        rows = train_rows[torch.randint(len(train_rows), (BATCH,))]
        optimizer.zero_grad()
        F.cross_entropy(model(shifted(X[rows])), y[rows]).backward()
        optimizer.step()


def train_with_lightning(epochs: int) -> None:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.network(shifted(batch[0])), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return KFACOptimizer(self.parameters())

    lightning.seed_everything(0, verbose=False)
    model = Classifier()
    rows = torch.utils.data.TensorDataset(X[train_rows], y[train_rows])
    loader = torch.utils.data.DataLoader(rows, BATCH, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, loader)
    with torch.no_grad():
        wrong = model.eval().network(X[held_out]).argmax(1) != y[held_out]
    error = 100 * wrong.float().mean().item()
    print(f"\nLightning, K-FAC, {epochs} epoch(s): held-out error {error:.2f} %")


def main() -> None:
    arguments = command_line(__doc__, seconds=5, seeds=3)
    runs = compare(train, RATES, arguments.seconds, arguments.seeds)
    print_table(runs)
    plot(runs, arguments.output / "09_images.png")
    if importlib.util.find_spec("lightning"):
        train_with_lightning(epochs=1 if arguments.quick else 5)
    else:
        print("\nLightning is not installed, so its part is skipped: pip install lightning")


if __name__ == "__main__":
    main()
