"""A policy gradient
=================

Learn to balance a pole on a cart by a policy gradient with a critic.

.. code-block:: sh

    python examples/08_policy_gradient.py [--quick] [--seconds 5] [--seeds 3] [--output FOLDER]

Thirty-two carts are simulated at once, with the constants of Gymnasium's CartPole-v1. Each step
plays on for 16 moves and follows the gradient of advantage times log-probability, and of the
critic's squared error, as in A2C (Mnih et al., 2016, https://arxiv.org/abs/1602.01783). Simulation
is timed, too. For how many of 500 moves the pole does not stand, in the mean of fixed starts and
with the likelier move each, decides. Runs differ much by their seeds, as is usual here.
"""

from __future__ import annotations

import torch
from side_by_side import Run, command_line, compare, plot, print_table
from torch import Tensor, nn
from torch.nn import functional as F

CARTS, LENGTH, HORIZON, DISCOUNT = 32, 16, 500, 0.99
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def moved(state: Tensor, action: Tensor) -> Tensor:
    """Return position, speed, angle and its speed `[N, 4]` after 20 ms of a push of 10 N."""
    _, v, angle, w = state.unbind(-1)
    push = (20.0 * action - 10.0 + 0.05 * w**2 * angle.sin()) / 1.1
    turn = (9.8 * angle.sin() - angle.cos() * push) / (2 / 3 - 0.05 * angle.cos() ** 2 / 1.1)
    slide = push - 0.05 * turn * angle.cos() / 1.1
    return state + 0.02 * torch.stack([v, slide, w, turn], -1)


def has_fallen(state: Tensor) -> Tensor:
    return (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.2095)


def starts(count: int, generator: torch.Generator) -> Tensor:
    return 0.1 * torch.rand(count, 4, generator=generator) - 0.05


class ActorCritic(nn.Module):
    """States in; logits of the two moves, and the value of the state, out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[N, 4]` to `[N, 2]` and `[N]`."""
        hidden = self.body(state)
        return self.actor(hidden), self.critic(hidden)[:, 0]


@torch.no_grad()
def play(
    model: nn.Module, state: Tensor, age: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Play on from the states, in place; return states, actions and discounted returns."""
    states, actions, rewards, goes_on = [], [], [], []
    for _ in range(LENGTH):
        probabilities = model(state)[0].softmax(-1)
        action = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        states.append(state.clone())
        actions.append(action)
        state.copy_(moved(state, action))
        age += 1
        fallen = has_fallen(state)
        cut = ~fallen & (age >= HORIZON)  # would go on: the critic says how well
        rewards.append(1 + DISCOUNT * cut * model(state)[1])
        over = fallen | cut
        goes_on.append(~over)
        state[over] = starts(int(over.sum()), generator)
        age[over] = 0
    value, returns = model(state)[1], []
    for reward, on in zip(reversed(rewards), reversed(goes_on), strict=True):
        value = reward + DISCOUNT * on * value
        returns.insert(0, value)
    return torch.cat(states), torch.cat(actions), torch.cat(returns)


@torch.no_grad()
def moves_missing(model: nn.Module) -> float:
    state = starts(64, torch.Generator().manual_seed(0))
    stands, moves = torch.ones(64, dtype=torch.bool), torch.zeros(64)
    for _ in range(HORIZON):
        state = moved(state, model(state)[0].argmax(-1))
        stands &= ~has_fallen(state)
        if not stands.any():
            break
        moves += stands
    return HORIZON - moves.mean().item()


def train(run: Run) -> None:
    torch.manual_seed(run.seed)
    model = ActorCritic()
    optimizer = run.optimizer(model)
    generator = torch.Generator().manual_seed(run.seed)
    state, age = starts(CARTS, generator), torch.zeros(CARTS)
    for _ in run.steps(optimizer, lambda: {"moves missing of 500": moves_missing(model)}):
        states, actions, returns = play(model, state, age, generator)
        optimizer.zero_grad()
        logits, values = model(states)
        advantage = (returns - values).detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        log_p = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        loss = -(advantage * log_p).mean() + 0.5 * F.mse_loss(values, returns)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def main() -> None:
    arguments = command_line(__doc__, seconds=5, seeds=3)
    runs = compare(train, RATES, arguments.seconds, arguments.seeds)
    print_table(runs)
    plot(runs, arguments.output / "08_policy_gradient.png", log=False)


if __name__ == "__main__":
    main()
