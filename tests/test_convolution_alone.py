"""The convolution kernels without torch, `convolution_alone.cpp`, by the instruction sets that this processor has.

The one for AVX-512 was also run where there is none: in Bochs 3.0 (`cpu: model=corei7_skylake_x`) under Linux 6.1 with
busybox. Linux needs `noxsaves` there, or it takes AVX away: the emulated area of XSAVES has another size than it
computes.
"""

import subprocess
from pathlib import Path

import pytest
from test_library import supported_instruction_sets

from fastgan import build

SOURCE = Path(__file__).with_name("convolution_alone.cpp")


def compile_alone(name: str, folder: Path) -> Path:
    """A program that needs nothing but a processor, perhaps an emulated one, with instruction set `name`."""
    kernels, program = folder / "kernels.o", folder / f"convolution_{name}"
    unit = next(u for u in build.get_build_parameters("cpu").units if u.object == f"cpu_convolution.isa.cpp.{name}.o")
    subprocess.run([*unit.command, "-c", unit.source, "-o", kernels], check=True)
    flags = ["-std=c++20", "-O1", "-static", f"-I{build.CSRC}", f"-DSET={name}"]
    sets = ["-DFASTGAN_HAS_AVX2", "-DFASTGAN_HAS_AVX512"]
    subprocess.run([*build.find_cxx(), *flags, *sets, SOURCE, kernels, "-o", program], check=True)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_kernels_are_right_without_torch(name, tmp_path):
    if name not in supported_instruction_sets():
        pytest.skip(f"this processor has no {name}")
    result = subprocess.run([compile_alone(name, tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, "\n".join(line for line in result.stdout.splitlines() if "WRONG" in line)
    assert result.stdout.endswith("all right\n")
