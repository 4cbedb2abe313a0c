"""The combinations that `tests.processors` runs the numerical tests under."""

import os

import pytest

from tests import processors


def test_at_least_six_combinations_need_no_newer_processor_than_avx2():
    old = [c for c in processors.COMBINATIONS.values() if c.needs != "AVX512"]
    assert len(old) >= 6
    assert {c.threads for c in old} == {1, 2}
    assert len({(*c.settings.items(), c.threads) for c in old}) == len(old)


def test_numerical_tests_are_files_that_exist():
    names = {name.removeprefix("tests/") for name in processors.numerical_tests()}
    assert {"test_inverses.py", "test_spectrum.py", "test_kfac_operator.py", "kfacopt"} <= names
    files = {path.name for path in (processors.ROOT / "tests").glob("test_*.py")}
    assert set(processors.NOT_NUMERICAL) <= files
    assert not names & set(processors.NOT_NUMERICAL)


def test_a_process_gets_the_settings_of_its_combination_alone(monkeypatch):
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "SSE4_2")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = processors.environment(processors.COMBINATIONS["baseline-2"])
    assert found["ATEN_CPU_CAPABILITY"] == "default"
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "2"
    assert "MKL_ENABLE_INSTRUCTIONS" not in found
    assert found["PATH"] == os.environ["PATH"]


def test_a_failure_is_the_exit_status(capsys, tmp_path):
    fails = tmp_path / "test_fails.py"
    fails.write_text("def test():\n    assert 1 == 2\n")
    assert processors.main(["--only", "baseline", "--", str(fails), "-c", os.devnull]) == 1
    printed = capsys.readouterr().out
    assert "assert 1 == 2" in printed
    assert "1 failed" in printed.splitlines()[-1]
    with pytest.raises(SystemExit):
        processors.main(["--only", "pdp-11"])
    assert processors.main(["--list"]) == 0
    assert set(processors.COMBINATIONS) <= set(capsys.readouterr().out.split())
