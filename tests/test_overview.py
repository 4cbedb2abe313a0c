"""The README's picture is drawn from the results that are published, without a run."""

import pytest


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("pytorch_optimizer", reason="SOAP is not installed")
    from benchmarks.compare import RESULTS
    from benchmarks.overview import draw

    draw(RESULTS / "compare", tmp_path / "overview.png")
    assert 5_000 < (tmp_path / "overview.png").stat().st_size < 50_000
