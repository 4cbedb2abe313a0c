"""States of released versions: what was saved, and how training went on (docs/versioning.md).

    PYTHONPATH=. python -m tests.saved_states

writes the state of this version, `states/VERSION.pt`, and what it holds and the losses that
followed, `states/VERSION.json`. Run it once for each release whose states have other entries. What
it wrote is not written again: `test_saved_states.py` loads all of them for ever. So the cases
and the model below stay as they are, and what later versions save besides is a case of its own.
"""

import copy
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import kfacopt
from kfacopt import KFACOptimizer, default_layers

FOLDER = Path(__file__).parent / "states"
STEPS_BEFORE, STEPS_AFTER = 33, 31
CLASSES = 64  # so many rows of G are kept once, as a triangle

# No setting is left to a default, which may change.
COMMON = {
    "layers": [*default_layers(), nn.Embedding],
    "conv_factor": "channels",
    "max_factor_dim": 8192,
    "kfac_approx": "expand",
    "momentum": 0.85,
    "fallback_lr": 0.01,
}
NUMBERS = {
    "lr": 0.2,
    "damping": 1e-2,
    "ema_decay": 0.9,
    "factor_update_interval": 5,
    "inverse_update_interval": 10,
}
CASES = {
    "kfac": {**NUMBERS, "damping": 5e-2, "kl_clip": 5e-5, "fisher_type": "mc"},
    "kl_clip auto": {**NUMBERS, "kl_clip": "auto", "fisher_type": "type-2"},
    "ekfac": {**NUMBERS, "kl_clip": 2e-4, "fisher_type": "type-2", "preconditioner": "ekfac"},
    "lr auto": {
        "lr": "auto",
        "damping": 1e-2,
        "fisher_type": "type-2",
        "ema_decay": 0.8,
        "factor_update_interval": 1,
        "inverse_update_interval": 5,
    },
}


class Model(nn.Module):
    """A lookup, a convolution, a matrix for each expert, a norm that AdamW trains, and a head."""

    def __init__(self, classes):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.convolution = nn.Conv1d(3, 3, 2)
        self.experts = nn.Parameter(torch.empty(2, 3, 3))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, classes)
        for p in self.parameters():  # no draws: they would be those of this version of torch
            values = torch.arange(p.numel(), dtype=p.dtype).add(p.numel()).mul(1.7).sin()
            p.data.copy_(values.reshape(p.shape))

    def forward(self, tokens):
        h = self.convolution(self.embedding(tokens).mT).mean(-1).tanh()
        first, second = (F.linear(h[i::2], self.experts[i]) for i in range(2))
        return self.head(self.norm(torch.cat([first, second]).tanh()))


def start(case):
    """Return a model and its optimizer, as before the first step."""
    model = Model(CLASSES if case == "kfac" else 4)
    return model, KFACOptimizer(model.parameters(), **COMMON, **CASES[case])


def train(model, optimizer, steps):
    """Take steps on one batch; return the losses before each."""
    tokens = (torch.arange(60) ** 2 // 3 % 7).reshape(12, 5)
    labels = tokens.sum(1) % 4
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def holds(state):
    """Return what a state holds: of tensors shape, type and sum of squares; numbers as they are."""
    found = {
        f"{name}/{entry}": summary(value)
        for name, entries in state["state"].items()
        for entry, value in entries.items()
    }
    for i, group in enumerate(state["param_groups"]):
        found |= {f"group {i}/{name}": summary(value) for name, value in group.items()}
    return found


def summary(value):
    """Return what JSON can hold of an entry."""
    if not isinstance(value, torch.Tensor):
        return value
    kind = str(value.dtype).removeprefix("torch.")
    squares = value.double().square().sum().item()
    return {"shape": list(value.shape), "dtype": kind, "squares": squares}


def as_json(numbers):
    """Return JSON with a line for each entry."""
    cases = []
    for case, found in numbers.items():
        rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found["holds"].items()]
        losses = json.dumps([round(x, 6) for x in found["losses"]])
        body = ",\n".join(rows)
        cases.append(f'{json.dumps(case)}: {{\n "losses": {losses},\n "holds": {{\n{body}\n }}\n}}')
    return "{\n" + ",\n".join(cases) + "\n}\n"


def main():
    """Write the state of this version."""
    data, numbers = {}, {}
    for case in CASES:
        model, optimizer = start(case)
        train(model, optimizer, STEPS_BEFORE)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        data[case] = copy.deepcopy(state)  # training goes on in place
        holdings = holds(optimizer.state_dict())
        numbers[case] = {"holds": holdings, "losses": train(model, optimizer, STEPS_AFTER)}
    torch.save(data, FOLDER / f"{kfacopt.__version__}.pt")
    (FOLDER / f"{kfacopt.__version__}.json").write_text(as_json(numbers))


if __name__ == "__main__":
    main()
