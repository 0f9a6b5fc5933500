"""`python -m fastgan.info` tells the truth about this machine, in the words of the errors."""

import subprocess
import sys

import pytest
import torch

from fastgan import backends, info
from fastgan.build import BuildError
from fastgan.errors import BackendError
from fastgan.ops import bn_act


def test_versions_device_compilers_and_every_backend_are_there():
    text = info.info()
    assert f"torch      {torch.__version__}" in text
    for name in ("fastgan", "triton", "python", "cpu", "cuda", "c++", "nvcc"):
        assert any(line.startswith(f"{name:<10} ") for line in text.splitlines()), name
    for backend, reason in backends.available().items():
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


def test_the_command():
    done = subprocess.run([sys.executable, "-m", "fastgan.info"], capture_output=True, text=True, check=True)
    assert "backend    eager   available" in done.stdout
