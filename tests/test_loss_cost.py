"""The script that measures what a found loss costs, in quick form."""

import sys

from benchmarks import loss_cost


def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loss_cost", "--quick"])
    loss_cost.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == list(loss_cost.LOSSES)
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
