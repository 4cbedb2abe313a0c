"""The cart and its pole of Barto, Sutton & Anderson (1983), many at once, and rollouts of a policy.

Constants, Euler's method and the end of an episode are those of Gymnasium's CartPole-v1.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from benchmarks.problems.problem import DATA_SEED, Batch

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, INTERVAL = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
FARTHEST, STEEPEST = 2.4, 12 * 2 * torch.pi / 360
HORIZON = 500
DISCOUNT, TRACE = 0.99, 0.95


def moved(state: Tensor, action: Tensor) -> Tensor:
    """Return states `[..., 4]` of position, speed, angle and its speed, a step later.

    Args:
        state: The states.
        action: 0 pushes to the left, 1 to the right.
    """
    _, v, angle, w = state.unbind(-1)
    force = FORCE * (2 * action - 1)
    sine, cosine, total = angle.sin(), angle.cos(), CART + POLE
    push = (force + POLE * HALF_LENGTH * w**2 * sine) / total
    turn = (GRAVITY * sine - cosine * push) / (HALF_LENGTH * (4 / 3 - POLE * cosine**2 / total))
    slide = push - POLE * HALF_LENGTH * turn * cosine / total
    return state + INTERVAL * torch.stack([v, slide, w, turn], -1)


def has_fallen(state: Tensor) -> Tensor:
    """Tell which of the states end an episode."""
    return (state[..., 0].abs() > FARTHEST) | (state[..., 2].abs() > STEEPEST)


def starts(count: int, width: float, generator: Generator) -> Tensor:
    """Return states `[count, 4]`, uniform in [−width, width]."""
    return width * (2 * torch.rand(count, 4, generator=generator) - 1)


class CartPole:
    """Carts that go on from rollout to rollout, and begin anew when they fall or in the end.

    Args:
        count: How many.
        generator: Of starts and actions.
    """

    def __init__(self, count: int, generator: Generator) -> None:
        self.generator = generator
        self.state, self.age = starts(count, 0.05, generator), torch.zeros(count)

    @torch.no_grad()
    def rollout(self, model: nn.Module, length: int) -> Batch:
        """Follow a policy, with generalised advantages, Schulman et al. (2016).

        Args:
            model: Gives logits and values of states.
            length: How many steps.

        Returns:
            States, actions, their log-probabilities, advantages, and goals of the values, of
            `length` times the count.
        """
        rows: list[Batch] = []
        for _ in range(length):
            state = self.state
            logits, value = model(state)
            log_p = logits.log_softmax(-1)
            uniform = torch.rand(len(state), generator=self.generator)
            action = (uniform < log_p[:, 1].exp()).long()
            chosen = log_p.gather(1, action[:, None])[:, 0]
            after = moved(state, action)
            fallen = has_fallen(after)
            self.age += 1
            ended = fallen | (self.age >= HORIZON)
            # An episode that is cut at the horizon would go on.
            reward = 1 + DISCOUNT * model(after)[1] * (ended & ~fallen)
            rows.append((state, action, chosen, value, reward, ended))
            fresh = starts(len(state), 0.05, self.generator)
            self.state = torch.where(ended[:, None], fresh, after)
            self.age = torch.where(ended, 0.0, self.age)
        state, action, chosen, value, reward, ended = map(torch.stack, zip(*rows, strict=True))
        following = torch.cat([value[1:], model(self.state)[1][None]])
        advantage, trace = torch.zeros_like(value), torch.zeros(value.shape[1])
        for t in reversed(range(length)):
            goes_on = DISCOUNT * (~ended[t])
            surprise = reward[t] + goes_on * following[t] - value[t]
            advantage[t] = trace = surprise + TRACE * goes_on * trace
        data = (state, action, chosen, advantage, advantage + value)
        return tuple(t.flatten(0, 1) for t in data)


@torch.no_grad()
def steps_missing(model: nn.Module, width: float, count: int = 64) -> float:
    """Return how many steps the likelier action lacks to the horizon, in the mean of fixed starts.

    Args:
        model: Gives logits and values of states.
        width: Of the starts.
        count: How many starts.
    """
    state = starts(count, width, Generator().manual_seed(DATA_SEED))
    stands, survived = torch.ones(count, dtype=torch.bool), torch.zeros(count)
    for _ in range(HORIZON):
        state = moved(state, model(state)[0].argmax(-1))
        stands &= ~has_fallen(state)
        if not stands.any():
            break
        survived += stands
    return HORIZON - float(survived.mean())
