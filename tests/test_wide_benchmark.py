"""The comparison of wide layers: contestants differ in the form alone; its table."""

import pytest
import torch

from benchmarks import wide_layers
from benchmarks.wide_layers import CONTESTANTS, FULL, LOW, PROBLEMS, WINDOW, means, run, table
from kfacopt import KFACOptimizer


@pytest.mark.parametrize("name", PROBLEMS)
def test_networks_are_wide_and_losses_are_drawn_from_the_seed(name):
    torch.manual_seed(0)
    model, loss = PROBLEMS[name].make()
    values = [loss(model, torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    optimizer = KFACOptimizer(model.parameters(), **CONTESTANTS[LOW])
    loss(model, torch.Generator()).backward()
    optimizer.step()
    assert any("rank" in row.curvature for row in optimizer.describe().parameters)


def test_runs_with_both_forms_begin_alike_and_differ_in_the_state():
    runs = [run("signals", contestant, 0, steps=2) for contestant in (FULL, LOW)]
    assert runs[0]["losses"][0] == runs[1]["losses"][0]
    assert runs[1]["state"] < 0.5 * runs[0]["state"]
    assert all(0 < r["seconds"][0] < r["seconds"][1] for r in runs)


def test_the_table_has_the_time_to_the_target_of_whole_factors():
    steps = 4 * WINDOW
    falling = [float(steps - i) for i in range(steps)]
    assert means(falling)[-1] == sum(falling[-WINDOW:]) / WINDOW
    records = []
    for contestant in CONTESTANTS:
        rate = {FULL: 1, LOW: 2}.get(contestant, 0.25)
        losses = [1 + (x - 1) / rate for x in falling]
        seconds = [0.1 * (i + 1) for i in range(steps)]
        own = {"problem": "signals", "contestant": contestant, "seed": 0, "state": 3.0}
        records.append(own | {"losses": losses, "seconds": seconds})
    full, low, adamw = table(records).splitlines()[2:]
    target = means(falling)[3 * steps // 4 - 1]
    seconds = [cell.strip() for cell in full.split("|")][4]
    assert float(seconds) == pytest.approx(0.1 * 3 * steps / 4, abs=0.06)
    own = next(i for i, x in enumerate(means([1 + (x - 1) / 2 for x in falling])) if x <= target)
    assert float(low.split("|")[4]) == pytest.approx(0.1 * (own + 1), abs=0.06)
    assert adamw.split("|")[4].strip() == "never"
    assert wide_layers.table(records[:1]).count("\n") == 1  # nothing without all contestants
