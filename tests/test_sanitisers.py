"""The CPU kernels under GCC's address and undefined-behaviour sanitisers: tests run clean, a planted bug does not."""

import os
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

from fastgan import build

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g1"
CONVOLUTIONS = ["test_cpu_convolution.py", "test_cpu_convolution_bf16.py"]
TESTS = ["test_adam_ema.py", "test_bn_act_cpu.py", *CONVOLUTIONS]
# Sanitisers do not see what AMX reads and writes; tiles in software they do, on a processor without AMX, too.
TILES = f"-include {Path(__file__).with_name('software_tiles.h')}"
BUILD = "import conftest; from fastgan import library; library.build_just_in_time('cpu', 'it is sanitised')"
# A tail of a few elements, read and written as a whole register.
PLANTED = "adam_ema.isa.cpp", "update(of, i, end - i, factors);", "update(of, i, lanes<T>, factors);"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return mutations.Workshop(tmp_path_factory.mktemp("sanitised"))


def compilers_library(name: str) -> Path:
    command = [*build.find_cxx(), f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not path.is_file():
        pytest.skip(f"the compiler has no {name}, which GCC's address sanitiser needs")
    return path.resolve()


def run_sanitised(workshop, test: str, flags: str = FLAGS, **more: str) -> subprocess.CompletedProcess:
    # Python itself is not instrumented: the sanitiser must be there first, with the C++ library of the exceptions.
    preloaded = f"{compilers_library('libasan.so')} {compilers_library('libstdc++.so.6')}"
    tests = workshop.folder / "tests"
    environment = os.environ | {"CXXFLAGS": flags, "FASTGAN_JIT": "1", "PYTHONPATH": str(workshop.folder)} | more
    # Built beforehand: with the sanitiser preloaded the compiler, too, would take several times as long.
    subprocess.run([sys.executable, "-c", BUILD], cwd=tests, env=environment, check=True)
    # What Python leaves to the system at its end is no leak.
    environment |= {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    options = ["-x", "-s", "-p", "no:cacheprovider", f"--rootdir={workshop.folder}", "-k", "not cuda"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests / test)],
        cwd=workshop.folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("test", TESTS)
def test_clean(workshop, test):
    done = run_sanitised(workshop, test)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("test", CONVOLUTIONS)
def test_tiles_in_software_are_clean(workshop, test):
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor has no AVX-512 BF16, whose conversions the kernels on AMX use")
    done = run_sanitised(workshop, test, f"{FLAGS} {TILES}", FASTGAN_CPU="amx")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


def test_a_planted_overrun_is_reported(workshop):
    name, right, wrong = PLANTED
    source = workshop.folder / "csrc" / "cpu" / name
    original = source.read_text()
    assert original.count(right) == 1, "the kernel changed, plant the bug anew"
    source.write_text(original.replace(right, wrong))
    try:
        done = run_sanitised(workshop, "test_adam_ema.py")
    finally:
        source.write_text(original)
    assert done.returncode
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    assert name in done.stderr
