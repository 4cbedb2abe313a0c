"""Stock architectures train with the defaults; what has no curvature is known, and why.

The packages are no dependencies of kfacopt; where they are missing, the tests are skipped.
"""

import json
import math
import sys

import pytest

from benchmarks import stock_architectures
from benchmarks.stock.reasons import UNKNOWN
from benchmarks.stock_architectures import ARCHITECTURES, OUTPUT, kfac_run, main
from benchmarks.stock_tables import ENOUGH, tables

PUBLISHED = json.loads(OUTPUT.read_text())["results"]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.key)
def test_it_trains_with_the_defaults(architecture):
    if architecture.package != "torch":
        pytest.importorskip(architecture.package, reason=f"no {architecture.package}")
    result = kfac_run(architecture)
    assert result["error"] == ""
    for text in result["warnings"]:
        assert any(part in text for part in architecture.warns), text
    assert result["last"] < result["first"]
    assert UNKNOWN not in result["left"]
    left = sum(result["left"].values()) / result["matrices"]
    assert result["share"] == pytest.approx(1 - left)
    assert result["share"] >= ENOUGH or result["left"]
    assert result["share"] == pytest.approx(PUBLISHED[architecture.key]["share"]), "run it again"


def test_forty_architectures_were_measured_and_fell():
    assert {a.key for a in ARCHITECTURES} == {*PUBLISHED}
    assert len(PUBLISHED) >= 40
    for key, result in PUBLISHED.items():
        assert result["error"] == "", key
        assert result["last"] < result["first"], key
        assert all(math.isfinite(x) for x in result["adamw"]), key


def run(monkeypatch, output, page, *names):
    monkeypatch.setattr(stock_architectures, "PAGE", page)
    monkeypatch.setattr(stock_architectures, "STEPS", 3)
    arguments = ["--packages", "torch", "--names", *names, "--page", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["stock_architectures", *arguments])
    main()
    return json.loads(output.read_text())


def test_the_tables_are_made_from_the_command_line(tmp_path, monkeypatch, capsys):
    output, page = tmp_path / "results.json", tmp_path / "page.md"
    page.write_text("<!-- architectures -->\n<!-- /architectures -->\n")
    content = run(monkeypatch, output, page, "NeRF", "DLRM")
    assert '"name": "NeRF"' in capsys.readouterr().out
    assert [*content["results"]] == ["torch/DLRM", "torch/NeRF"]
    found = page.read_text()
    assert tables(content) in found
    assert "2 architectures: 0 raise an error" in found
    assert "| DLRM |" in found
    assert "- DLRM: embedding" in found


def test_a_row_that_is_run_again_leaves_the_others_as_they_were(tmp_path, monkeypatch):
    output, page = tmp_path / "results.json", tmp_path / "page.md"
    page.write_text("<!-- architectures -->\n<!-- /architectures -->\n")
    output.write_text(OUTPUT.read_text())
    content = run(monkeypatch, output, page, "NeRF")
    changed = [key for key, row in content["results"].items() if row != PUBLISHED[key]]
    assert changed == ["torch/NeRF"]
    assert content["results"].keys() == PUBLISHED.keys()
    first, second = page.read_text().split("Rows are of ")[1].split("\n")[0].split(". NeRF of ")
    assert PUBLISHED["torch/VAE"]["environment"]["commit"][:9] in first
    assert (content["results"]["torch/NeRF"]["environment"]["commit"] or "?")[:9] in second
