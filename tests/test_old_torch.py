"""One wheel, built with the oldest torch that fastgan supports, passes its library's tests there and on this torch.

FASTGAN_OLD_TORCH is the Python of an environment with that torch and the test requirements, for example
`python3 -m venv old && old/bin/pip install torch==2.10.0 numpy ninja pybind11 setuptools wheel pytest pytest-timeout
pytest-benchmark hypothesis pillow safetensors`, then `FASTGAN_OLD_TORCH=old/bin/python pytest -m slow
tests/test_old_torch.py -s`. The CUDA library is left out: it is bound to torch's CUDA major version, which differs.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastgan import build

ROOT = Path(__file__).resolve().parent.parent
OLD = os.environ.get("FASTGAN_OLD_TORCH", "")
PROJECT = ("fastgan", "kernels", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TESTS = [
    "library",
    "adam_ema",
    "optim",
    "gan_bce",
    "bn_act_cpu",
    "cpu_convolution",
    "conv_stack",
    "step",
    "simt",
    "gan_bce_cuda",
    "conv_bn_act_cuda",
]
SHOW = """
import fastgan, torch
from fastgan import library
library.load("cpu")
print("torch", torch.__version__, "at", fastgan.__file__, torch.ops.fastgan_cpu.instruction_set())
"""


def run(command, folder, **environment):
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith(("FASTGAN_", "PYTHON"))}
    run = subprocess.run(
        list(map(str, command)), cwd=folder, env=cleaned | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """(where it was unpacked, the tests beside it)"""
    if not OLD:
        pytest.skip("FASTGAN_OLD_TORCH names no Python with an older torch")
    folder = tmp_path_factory.mktemp("old")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "libfastgan_*")
            shutil.copytree(ROOT / name, folder / "project" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "project")
    command = [OLD, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-q", "-w", folder]
    run(command, folder / "project", FASTGAN_BUILD_CPU="1", FASTGAN_BUILD_CUDA="0")
    (file,) = folder.glob("*.whl")
    zipfile.ZipFile(file).extractall(folder / "installed")
    # Away from the project: what lies in the working folder would be imported first.
    away = folder / "away"
    away.mkdir()
    shutil.move(folder / "project" / "tests", away)
    shutil.move(folder / "project" / "pyproject.toml", away)
    return folder / "installed", away / "tests"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["old", "this"])
def test_one_wheel_serves_both(wheel, which):
    installed, tests = wheel
    python = OLD if which == "old" else sys.executable
    environment = {"PYTHONPATH": str(installed), "FASTGAN_JIT": "0"}
    said = run([python, "-c", SHOW], tests, **environment)
    version = tuple(map(int, said.split()[1].split(".")[:2]))
    assert (version == build.TORCH_MINIMUM) == (which == "old"), said
    assert str(installed) in said
    files = [tests / f"test_{name}.py" for name in TESTS]
    # The operator is held against the SIMT module, which is compiled here whatever the torch.
    passed = run([python, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *files], tests.parent, **environment)
    print(said, *(line for line in passed.splitlines() if line.startswith("SKIPPED") or " passed" in line), sep="\n")
    assert " passed" in passed
