"""`python -m fastgan.bench`: its data and its comparison; no time is asserted."""

import json

import pytest
import torch

from fastgan import bench
from fastgan.errors import FastganError

CASE = bench.Case("tiny", 16, 1, 4, 2, 2, 2)


def row(ratio: float, low: float, high: float) -> dict:
    return {"case": "tiny", "ratio_stock": ratio, "ratio_stock_quartiles": [low, high]}


def test_measured_data_is_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CASES", (CASE,))
    file = tmp_path / "new.json"
    assert bench.bench(bench.BenchConfig(quick=True, json=file)) == 0
    data = json.loads(file.read_text())
    assert data["environment"]["versions"]["torch"] == torch.__version__
    (measured,) = data["rows"]
    assert measured["images_per_second"] == pytest.approx(CASE.batch_size / measured["fastgan_seconds"])
    assert "tiny" in capsys.readouterr().out


def test_only_a_fall_beyond_the_noise_is_a_regression():
    assert bench.regressions([row(2.0, 1.9, 2.1)], [row(1.8, 1.7, 1.85)])
    assert not bench.regressions([row(2.0, 1.9, 2.1)], [row(1.9, 1.8, 2.0)])
    assert not bench.regressions([row(2.0, 1.9, 2.1)], [row(2.5, 2.4, 2.6)])


def test_unknown_case_names_the_known_ones():
    with pytest.raises(FastganError, match="DCGAN-64, batch 32"):
        bench.bench(bench.BenchConfig(case="nothing"))
