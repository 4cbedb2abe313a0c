"""The README's picture is drawn from the results that are published, without a run."""

import pytest


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("pytorch_optimizer", reason="SOAP is not installed")
    from benchmarks.overview import main

    main(["--output", str(tmp_path / "overview.png")])
    assert 5_000 < (tmp_path / "overview.png").stat().st_size < 50_000


def test_asking_for_help_draws_nothing(monkeypatch):
    pytest.importorskip("pytorch_optimizer", reason="SOAP is not installed")
    from benchmarks import overview

    monkeypatch.setattr(overview, "draw", pytest.fail)
    with pytest.raises(SystemExit):
        overview.main(["--help"])
