"""docs/gpu.md says what the committed counts and the committed budget say, and the counts what runs today."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_traffic import PROVIDERS, traffic

_PATH = Path(__file__).parent.parent / "benchmarks" / "gpu_table.py"
_SPEC = importlib.util.spec_from_file_location("gpu_table", _PATH)
gpu_table = sys.modules["gpu_table"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gpu_table)


def test_the_committed_page_is_the_datas():
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    assert gpu_table.written(page) == page, "run `python benchmarks/gpu_table.py`"
    assert all(f"<!-- {name} -->" in page for name in gpu_table.TABLES)
    assert "Modelled, not measured" in page


def test_other_data_make_another_page(tmp_path, monkeypatch):
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    for name in ("TRAFFIC", "BUDGET"):
        changed = tmp_path / f"{name}.json"
        text = getattr(gpu_table, name).read_text()
        changed.write_text(
            text.replace('"launches": 94', '"launches": 95').replace('"registers": 128', '"registers": 9')
        )
        with monkeypatch.context() as patched:
            patched.setattr(gpu_table, name, changed)
            assert gpu_table.written(page) != page


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
