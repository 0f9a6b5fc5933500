"""Start-up: a Python that imports fastgan and ends, beside one that imports only torch."""

import subprocess
import sys

import pytest

IMPORTS = {
    "torch": "import torch",
    "fastgan": "import torch, fastgan",
    "fastgan with networks and step": "import torch, fastgan.nn; from fastgan import GanStep, Ema",
    "python -m fastgan.train": "import torch, fastgan.train.loop",
}


def start(code: str):
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("imported", IMPORTS)
def test_start(pair, benchmark, imported):
    benchmark.group = "start-up"
    pair(start(IMPORTS[imported]), start(IMPORTS["torch"]))
