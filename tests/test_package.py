"""The package imports quickly, builds nothing, and lies where it should."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import fastgan.kernels
import pytest

import fastgan

ROOT = Path(__file__).parent.parent

IMPORTS = """
import subprocess, sys
import fastgan
light = "torch" not in sys.modules
import torch  # starts processes of its own
def refuse(*args, **kwargs): raise SystemExit("a process was started")
subprocess.Popen.__init__ = refuse
before = set(sys.modules)
import fastgan, fastgan.nn, fastgan.ops, fastgan.data, fastgan.losses, fastgan.optim
fastgan.GanStep, fastgan.Ema
print(light, sorted({name.partition(".")[0] for name in set(sys.modules) - before} & set(%r)))
"""
HEAVY = ["matplotlib", "tyro", "rich", "triton", "torchvision", "tensorboard", "imageio"]


def test_import_is_light_and_builds_nothing():
    out = subprocess.run([sys.executable, "-c", IMPORTS % HEAVY], capture_output=True, text=True, check=True)
    assert out.stdout.split(maxsplit=1) == ["True", "[]\n"]


def test_kernels_are_part_of_the_package():
    assert Path(fastgan.kernels.__file__).parent == ROOT / "kernels"


def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what is tracked is unknown")
    folders = {line.partition("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert folders == {".ci", "benchmarks", "csrc", "docs", "fastgan", "kernels", "tests"}


@pytest.mark.parametrize("command", ["train", "sample", "bench", "info"])
def test_command_run_above_the_clone_says_where_to_run_it(command, tmp_path):
    (tmp_path / "fastgan" / "build").mkdir(parents=True)  # an installation leaves one, which hides our module
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-c", "import fastgan; print(fastgan.__file__)"], cwd=tmp_path,
                           env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    if found.stdout != "None\n":
        pytest.skip(f"{found.stdout.strip()} is found before a folder: not an editable install")
    ran = subprocess.run([sys.executable, "-m", f"fastgan.{command}"], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    said = f"{tmp_path / 'fastgan'} hides the installed package from Python here; run the command inside that folder"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"error: {said}\n")


def test_version_is_stated_once():
    assert version("fastgan") == fastgan.__version__
    assert fastgan.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'gan_step'"):
        fastgan.gan_step  # noqa: B018
    assert set(fastgan.__all__) <= set(dir(fastgan))


def test_requirements_name_ranges_not_pins():
    assert not re.search(r'"[\w-]+==', (ROOT / "pyproject.toml").read_text())


def test_tests_are_collected_without_triton():
    """A torch without CUDA does not bring it; what cannot be imported then is skipped by name."""
    hide = "import sys, pytest; sys.modules['triton'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", hide, "--collect-only", "-q", "-rs", str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "Triton is not installed" in done.stdout
    assert re.search(r"test_train\.py: \d+", done.stdout)
