"""The compiled libraries load, and say which instruction set they run."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastgan import build, library
from fastgan.errors import BackendError


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def supported_instruction_sets() -> list[str]:
    flags = set()
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        pytest.skip("the processor's flags are only read from /proc/cpuinfo")
    needs = {
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "amx": {"avx512_bf16", "amx_tile", "amx_bf16"},
    }
    sets = ["plain"]
    for name, needed in needs.items():
        if not needed <= flags:
            break
        sets.append(name)
    return sets


SHOW = """
import torch
from fastgan import library
library.load("cpu")
print(torch.ops.fastgan_cpu.instruction_set())
"""


def test_best_instruction_set_runs():
    library.load("cpu")
    if "FASTGAN_CPU" not in os.environ:
        assert torch.ops.fastgan_cpu.instruction_set() == supported_instruction_sets()[-1]


@pytest.mark.parametrize("name", build.INSTRUCTION_SETS)
def test_instruction_set_can_be_forced(name):
    """The operator reports the compiler's own macros, so a set whose flags got lost would show as another."""
    result = run_python(SHOW, FASTGAN_CPU=name)
    if name in supported_instruction_sets():
        assert result.stdout.strip() == name
    else:
        assert result.returncode
        assert f"FastganError: FASTGAN_CPU={name}: this processor and build offer at most" in result.stderr


def test_unknown_instruction_set_is_an_error():
    result = run_python(SHOW, FASTGAN_CPU="sse9")
    assert result.returncode
    assert "FastganError: FASTGAN_CPU must be plain, avx2, avx512 or amx, got sse9" in result.stderr


CONVOLVE = """
import torch
from fastgan import library
library.load("cpu")
large, weight = torch.ones(1, 2, 4, 4).contiguous(memory_format=torch.channels_last), torch.ones(2, 2, 4, 4)
no = (None, None, 1.0)
torch.ops.fastgan_cpu.convolve(large, *no, weight, False, 2, 2, False, *no, 0)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolution_without_avx2_is_an_error(dtype):
    result = run_python(CONVOLVE.replace("last), torch", f"last).to(torch.{dtype}), torch"), FASTGAN_CPU="plain")
    assert "fastgan's convolutions need AVX2, which this processor, build or FASTGAN_CPU lacks" in result.stderr


def test_smaller_instruction_sets_are_linked_first():
    """Shared inline functions are taken from the first object, which must suit the smallest processor."""
    objects = [u.object for u in build.get_build_parameters("cpu").units]
    suffixes = [o.removesuffix(".o").rsplit(".", 1)[1] for o in objects]
    order = [list(build.INSTRUCTION_SETS).index(s) if s in build.INSTRUCTION_SETS else -1 for s in suffixes]
    assert order == sorted(order)
    assert {-1, 0} < set(order)


def test_unknown_library_lists_the_known_ones(monkeypatch):
    monkeypatch.delenv("FASTGAN_JIT", raising=False)
    monkeypatch.setattr(library, "_outcomes", {})
    with pytest.raises(BackendError, match=r"library must be one of cpu, cuda, simt; got 'tpu'"):
        library.load("tpu")


PLANTED = """
#include <bit>
typedef float Floats __attribute__((vector_size(32)));
typedef int Ints __attribute__((vector_size(32)));
Ints bits(Floats x) { return std::bit_cast<Ints>(x); }
"""


@pytest.mark.parametrize(
    ("stem", "copy"),
    [
        *((stem, "avx2") for stem in ("adam_ema", "bn_act", "convolution", "gan_bce", "planted")),
        *((stem, "avx512") for stem in ("bn_act", "convolution", "gan_bce")),
        ("convolution_tiles", "amx"),
    ],
)
def test_no_instruction_sets_share_a_function_that_takes_registers(stem, copy, tmp_path):
    """The linker keeps one of a standard template's copies, and sets do not pass registers alike. Inlining hides it."""
    name = "gan_bce" if stem == "planted" else stem
    units = build.get_build_parameters("cpu").units
    unit = next((u for u in units if u.object == f"cpu_{name}.isa.cpp.{copy}.o"), None)
    if unit is None or shutil.which("nm") is None:
        pytest.skip(f"needs a compiler for {copy} and nm")
    source, compiled = unit.source, tmp_path / "kernels.o"
    if stem == "planted":
        source = tmp_path / "planted.cpp"
        source.write_text(PLANTED)
    subprocess.run([*unit.command, "-O0", "-c", source, "-o", compiled], check=True)
    listed = subprocess.run(["nm", "-C", compiled], capture_output=True, text=True, check=True).stdout
    shared = [x for x in listed.splitlines() if " W " in x and "__vector(" in x and f"fastgan::cpu::{copy}::" not in x]
    assert bool(shared) == (stem == "planted"), shared
