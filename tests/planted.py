"""A copy of a kernel module with one bug planted in it."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture
def planted_kernels(tmp_path, monkeypatch):
    """`planted_kernels(module, right, wrong)`: the module with the one occurrence of `right` replaced."""

    def plant(module, right, wrong):
        source = Path(module.__file__).read_text()
        assert source.count(right) == 1, f"the kernels changed, plant the bug anew: {right}"
        path = tmp_path / "planted_module.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location("planted_module", path)
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "planted_module", copy)
        spec.loader.exec_module(copy)
        return copy

    return plant
