"""`python -m fastgan.info` tells the truth about this machine, in the words of the errors."""

import os
import re
import subprocess
import sys

import pytest
import torch

from fastgan import backends, info, library
from fastgan.build import BuildError
from fastgan.errors import BackendError
from fastgan.ops import bn_act


def test_versions_device_compilers_and_every_backend_are_there():
    text = info.info()
    assert f"torch      {torch.__version__}" in text
    for name in ("fastgan", "triton", "python", "cpu", "cuda", "c++", "nvcc"):
        assert any(line.startswith(f"{name:<10} ") for line in text.splitlines()), name
    for backend in backends.BACKENDS:
        reason = backends.why_not(backend)
        expected = "available" if reason is None else f"not available: {reason}"
        if backend == "cpu" and reason is None:
            expected += f", {torch.ops.fastgan_cpu.instruction_set()} kernels"
        assert f"{'backend':<10} {backend:<7} {expected}" in text.splitlines()


def test_the_reason_is_the_text_of_the_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = backends.why_not("cuda")
    assert f"not available: {reason}" in info.info()
    with pytest.raises(BackendError, match="cuda"):
        bn_act(torch.randn(4, 2), None, None, training=True, backend="cuda")


def test_a_missing_compiler_is_explained(monkeypatch):
    def missing(*_):
        raise BuildError("no C++ compiler was found. Install g++.")

    monkeypatch.setattr(info, "find_cxx", missing)
    assert "c++        not found: no C++ compiler was found. Install g++." in info.info()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastgan.info", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_command():
    done = run()
    assert done.returncode == 0
    assert "backend    eager   available" in done.stdout


def test_it_builds_nothing(tmp_path):
    done = run(FASTGAN_JIT="1", FASTGAN_CACHE=str(tmp_path))
    assert "library    cpu     will be built just in time at its first use (FASTGAN_JIT=1)" in done.stdout
    assert "backend    cpu     not built yet; its first use builds the library" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


def test_a_library_says_where_it_comes_from():
    backends.why_not("cpu", device="cpu")  # builds it, where it has to be
    assert re.search("^library    cpu     built (at install|just in time before) [(]", info.info(), re.M)


def test_a_library_that_cannot_be_had_is_explained(monkeypatch):
    monkeypatch.setattr(library, "_outcomes", {})
    monkeypatch.setenv("FASTGAN_JIT", "yes")
    assert "library    cpu     not available: FASTGAN_JIT must be 0 or 1, got 'yes'" in info.info()


def test_arguments_are_read():
    assert "Builds nothing" in run("--help").stdout
    wrong = run("--fast")
    assert wrong.returncode == 2
    assert "--fast" in wrong.stderr + wrong.stdout
