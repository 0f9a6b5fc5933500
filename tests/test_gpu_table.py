"""docs/gpu.md says what the committed counts and the committed budget say, and the counts what runs today."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_traffic import PROVIDERS, traffic

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_table, waves = benchmark("gpu_table"), benchmark("waves")


def test_the_committed_page_is_the_datas():
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    assert gpu_table.written(page) == page, "run `python benchmarks/gpu_table.py`"
    assert all(f"<!-- {name} -->" in page for name in gpu_table.TABLES)
    assert "Modelled, not measured" in page


def test_other_data_make_another_page(tmp_path, monkeypatch):
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    changes = {"TRAFFIC": ('"launches": 96', "97"), "BUDGET": ('"registers": 128', "9"), "WAVES": ('"of more": 0', "9")}
    for name, (old, number) in changes.items():
        changed = tmp_path / f"{name}.json"
        changed.write_text(getattr(gpu_table, name).read_text().replace(old, f"{old.split(':')[0]}: {number}"))
        with monkeypatch.context() as patched:
            patched.setattr(gpu_table, name, changed)
            assert gpu_table.written(page) != page


def test_the_committed_waves_are_todays(tmp_path):
    """In a process of its own: here the interpreter has tiles of its own."""
    command = [sys.executable, str(BENCHMARKS / "waves.py"), "--sizes", "64", "--batches", "32"]
    subprocess.run([*command, "--json", str(tmp_path / "waves.json")], check=True, capture_output=True)
    committed = json.loads(gpu_table.WAVES.read_text())
    same = [row for row in committed if (row["image_size"], row["batch_size"]) == (64, 32)]
    assert json.loads((tmp_path / "waves.json").read_text()) == same, (
        "run `python benchmarks/waves.py --json docs/data/waves.json`"
    )


def test_a_launch_by_hand():
    """150 programs on 132 places: two waves with 114 places empty; two stages of the second wave begin anew."""
    one = waves.Filling(150, 132, 16, 3, 10, 12000, 3)
    assert (one.waves, one.issued, one.room, one.saved) == (2, 24000, 42240, 2640)
    found = waves.summary([one])
    assert found["of two waves"] == 1
    assert found["places empty"] == pytest.approx(114 / 264)
    assert found["persistent saves at most"] == pytest.approx(2640 / (42240 + 2640))
    assert found["counts"] == found["counts at the ends"] == 0.5


def test_merged_phases_fill_the_columns_of_the_ends(monkeypatch):
    counts = {}
    for merged in (True, False):
        if not merged:
            monkeypatch.setattr("fastgan.kernels.conv_bn_act.merges", lambda *_: False)
        counts[merged] = waves.summary(waves.fillings(waves.CARDS["H100"], 64, 32))["counts at the ends"]
    assert counts[False] < 3 / 16  # of the columns; D's one channel has 1 of 16
    assert counts[True] > 0.65  # 12 of 16, and a row of pixels more


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_committed_launches_are_todays(provider):
    (row,) = (
        row
        for row in json.loads(gpu_table.TRAFFIC.read_text())["rows"]
        if (row["image_size"], row["batch_size"], row["provider"]) == (64, 32, provider)
    )
    launches = traffic.step_launches(PROVIDERS[provider], 64, 32)
    assert dict(traffic.Counter(launch.name for launch in launches)) == row["launches_by_kind"]
    assert len(launches) == row["launches"], "run `python benchmarks/traffic.py --json docs/data/traffic.json`"
