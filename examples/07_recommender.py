"""A recommender
=============

Predict ratings from learned vectors of users and films.

.. code-block:: sh

    python examples/07_recommender.py [--quick] [--seconds 3] [--seeds 3] [--output FOLDER]

Each user and each film has a vector, ``nn.Embedding``, and an MLP makes a rating of the two. The
ratings are made up: tastes that are hidden, and noise. Most parameters are in the embeddings, to
which K-FAC gives no curvature by default: AdamW trains them, within the same optimizer. So this is
not where K-FAC is expected to gain most. Two rows more show what there is to turn: the rate of that
AdamW, and curvature for embeddings. They do not count for who wins. The error on held-out ratings
decides.
"""

from __future__ import annotations

from functools import partial

import torch
from side_by_side import KFAC, Run, command_line, compare, plot, print_table
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt import KFACOptimizer, default_layers

USERS, FILMS, TASTES, NOISE, WIDTH, BATCH = 1000, 500, 4, 0.3, 16, 256
RATES = (3e-3, 1e-2, 3e-2, 1e-1)


def ratings(count: int) -> tuple[Tensor, Tensor]:
    """Make up who saw what `[count, 2]` and how it was liked `[count]`, in stars."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(USERS, TASTES, generator=generator)
    films = torch.randn(FILMS, TASTES, generator=generator)
    user = torch.randint(USERS, (count,), generator=generator)
    film = (FILMS * torch.rand(count, generator=generator) ** 2).long()  # some are seen by all
    liking = (users[user] * films[film]).sum(1) / TASTES**0.5 + 0.5 * films[film, 0]
    noise = NOISE * torch.randn(count, generator=generator)
    return torch.stack([user, film], 1), 3 + 2 * liking.tanh() + noise


pairs, stars = ratings(120_000)
held_out = slice(100_000, None)


class Recommender(nn.Module):
    """Numbers of a user and a film in, a rating out."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.films = nn.Embedding(USERS, WIDTH), nn.Embedding(FILMS, WIDTH)
        self.mlp = nn.Sequential(
            *(nn.Linear(2 * WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        )

    def forward(self, pair: Tensor) -> Tensor:
        """Map pairs `[N, 2]` to ratings `[N]`."""
        x = torch.cat([self.users(pair[:, 0]), self.films(pair[:, 1])], dim=1)
        return self.mlp(x)[:, 0]


described: dict[str, str] = {}


def train(run: Run) -> None:
    torch.manual_seed(run.seed)
    model = Recommender()
    optimizer = run.optimizer(model)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        errors = {"held-out error [stars]": held_out, "training error": slice(0, 20_000)}
        return {
            name: F.mse_loss(model(pairs[part]), stars[part]).sqrt().item()
            for name, part in errors.items()
        }

    for _ in run.steps(optimizer, measure):
        rows = torch.randint(held_out.start, (BATCH,))
        optimizer.zero_grad()
        F.mse_loss(model(pairs[rows]), stars[rows]).backward()
        optimizer.step()
    if run.name == KFAC:
        described[run.name] = str(optimizer.describe())


def main() -> None:
    arguments = command_line(__doc__, seconds=3, seeds=3)
    layers = [*default_layers(), nn.Embedding]
    others = {
        "KFACOptimizer, fallback_lr=0.03": partial(KFACOptimizer, fallback_lr=0.03),
        "KFACOptimizer, with embeddings": partial(KFACOptimizer, layers=layers),
    }
    runs = compare(train, RATES, arguments.seconds, arguments.seeds, others)
    print(f"\nWhat K-FAC does with each parameter:\n\n{described[KFAC]}")
    print_table(runs)
    print(f"The noise alone has {NOISE} stars.")
    plot(runs, arguments.output / "07_recommender.png", log=False)


if __name__ == "__main__":
    main()
