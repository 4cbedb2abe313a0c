"""States that released versions saved are loaded, hold what they held, and training goes on."""

import json

import pytest
import torch
from saved_states import FOLDER, STEPS_AFTER, holds, start, train

VERSIONS = sorted(path.stem for path in FOLDER.glob("*.pt"))
WRITTEN = {version: json.loads((FOLDER / f"{version}.json").read_text()) for version in VERSIONS}
SAVED = [(version, case) for version, cases in WRITTEN.items() for case in cases]

SAME_NUMBERS = 1e-9  # sums in float64 of the same numbers
# So long no new inverse depends on labels that are drawn. Without the state, the second loss
# differs by 0.009 to 0.04.
FIRST_STEPS, NEAR = 7, 1e-3
# With labels drawn otherwise, the largest deviation in 31 steps is 0.01 to 0.09.
LATER = 0.3


def loaded(version, case):
    saved = torch.load(FOLDER / f"{version}.pt", weights_only=True)[case]
    model, optimizer = start(case)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


def test_the_first_release_is_among_them():
    assert VERSIONS[0] == "0.1.0"
    assert len(WRITTEN["0.1.0"]) == 4


@pytest.mark.parametrize(("version", "case"), SAVED)
def test_a_loaded_optimizer_holds_what_was_saved(version, case):
    _, optimizer = loaded(version, case)
    found = holds(optimizer.state_dict())
    for name, value in WRITTEN[version][case]["holds"].items():  # there may be more
        if isinstance(value, dict):
            number = value.pop("squares")
            assert found[name].pop("squares") == pytest.approx(number, rel=SAME_NUMBERS), name
        assert found[name] == value, name


@pytest.mark.parametrize(("version", "case"), SAVED)
def test_training_goes_on_from_a_saved_state(version, case):
    model, optimizer = loaded(version, case)
    losses, written = train(model, optimizer, STEPS_AFTER), WRITTEN[version][case]["losses"]
    assert losses[:FIRST_STEPS] == pytest.approx(written[:FIRST_STEPS], rel=NEAR)
    assert losses == pytest.approx(written, rel=LATER)
