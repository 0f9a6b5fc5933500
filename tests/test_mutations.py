"""Every barrier, bounds check and mask in the CUDA kernels matters: without it, some test turns red.

Each mutant is one such piece of csrc/cuda deleted; the kernels' own tests are run on it. A mutant that they do
not notice is listed below with the reason why it is equivalent.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgan import build

ROOT = Path(__file__).resolve().parent.parent

# stem of the file: the tests that must notice
TESTS = {
    "bn_act": ["test_bn_act_cuda.py"],
    "channels": ["test_bn_act_cuda.py"],
    "total": ["test_gan_bce_cuda.py"],
    "gan_bce": ["test_gan_bce_cuda.py"],
    "adam_ema": ["test_adam_ema.py"],
    "conv_bn_act": ["test_conv_bn_act_cuda.py"],
}
# What a mutation replaces, and by what.
MUTATIONS = [
    ("barrier", re.compile(r"__syncthreads\(\);"), ";"),
    ("wait", re.compile(r"wait_copies<[^>]*>\(\);"), ";"),
    ("leave", re.compile(r"if \([^;{}]*(?:>=|<)[^;{}]*\) (?:return|continue);"), ";"),
    ("guard", re.compile(r"(?<=if \()[^;{}]*?(?:<|==|inside)[^;{}]*?(?=\) (?:\{|[a-z_]+[\[(.]|for)|\)$)"), "true"),
    ("bound", re.compile(r"(?<=; )[a-z]+ < (?:end|rows|count|half\.n|vectors_end)(?=;)"), None),
    ("inside", re.compile(r"(?<=bool inside = )[^;]+"), "true"),
    ("vector", re.compile(r"(?<=bool aligned = )[^;]+"), "true"),
    ("lane mask", re.compile(r"(?<=_sync\()all_lanes"), "0xffffu"),
]
# (file, text of the line, kind): why no test can notice.
EQUIVALENT = {
}


def mutants():
    for stem in TESTS:
        for path in sorted((build.CSRC / "cuda").glob(f"{stem}.cu*")):
            for number, line in enumerate(path.read_text().splitlines()):
                if line.lstrip().startswith("//"):
                    continue
                for kind, pattern, replacement in MUTATIONS:
                    for match in pattern.finditer(line):
                        new = replacement
                        if new is None:  # one more than there are
                            new = match[0].replace("<", "<=")
                        yield path.name, number, kind, line[: match.start()] + new + line[match.end() :]


MUTANTS = list(mutants())


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A copy of the project whose SIMT module is built in place, so that a mutant recompiles one file."""
    folder = tmp_path_factory.mktemp("mutants")
    for name in ("fastgan", "csrc", "tests", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests" / "conftest.py").write_text(
        "import simt, functools\n"
        "from pathlib import Path\n"
        "from fastgan import build, library\n"
        "def in_place(name, reason):\n"
        "    folder = Path(__file__).parent.parent / 'build'\n"
        "    output = folder / build.library_filename(name)\n"
        "    build.build(build.get_build_parameters(name), folder, output)\n"
        "    return output\n"
        "library.build_just_in_time = in_place\n"
    )
    return folder


def run_tests(folder: Path, stem: str) -> bool:
    """Whether the tests of a stem pass. A crash or a mutant that never ends counts as noticed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    try:
        run = subprocess.run(
            [*command, *(str(folder / "tests" / t) for t in TESTS[stem])],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


def test_there_are_mutants_of_each_kind():
    assert {kind for _, _, kind, _ in MUTANTS} == {kind for kind, *_ in MUTATIONS}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stem", TESTS)
def test_unchanged_kernels_pass(workshop, stem):
    assert run_tests(workshop, stem)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0]}:{m[1] + 1}-{m[2]}".replace(" ", "-"))
def test_mutant_is_noticed(workshop, mutant):
    name, number, kind, line = mutant
    path = workshop / "csrc" / "cuda" / name
    original = path.read_text()
    lines = original.splitlines()
    reason = EQUIVALENT.get((name, lines[number].strip(), kind))
    if reason:
        pytest.skip(f"equivalent: {reason}")
    lines[number] = line
    path.write_text("\n".join(lines) + "\n")
    try:
        assert not run_tests(workshop, name.split(".")[0]), f"{name}:{number + 1}: {line.strip()}"
    finally:
        path.write_text(original)
