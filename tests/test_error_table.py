"""docs/errors.md shows the errors of the kernels as they are."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from fastgan import backends

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import error_table

# The kernels of bn_act and gan_bce compute the same bits for any number of threads, so that only another compiler may
# move a digit. Not held: PyTorch's columns, which moved by up to 3 times between one thread and two, and the
# convolutions, which are the library's.
FACTOR = 1.2

NOW = """
import error_table
for *what, mine, own in error_table.rows(("cpu",)):
    if what[0] in ("bn_act", "gan_bce"):
        print(error_table.line(what, mine, own))
"""


def shown(page: str) -> dict[tuple[str, ...], tuple[float, float]]:
    """{(operation, output, dtype, layout, backend): (RMS, maximum)} of ours."""
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in page.splitlines()
        if re.search(r"\de[-+]\d", line)
    ]
    return {tuple(row[:5]): (float(row[5]), float(row[7])) for row in cells if len(row) == 9}


@cache
def now() -> dict[tuple[str, ...], tuple[float, float]]:
    """The rows of bn_act and gan_bce by the copies for AVX2, which are chosen when a process starts."""
    environment = os.environ | {"FASTGAN_CPU": "avx2"}
    here = Path(error_table.__file__).parent
    command = [sys.executable, "-c", NOW]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
    return shown(done.stdout)


def stale(page: str) -> list[tuple[str, ...]]:
    """The rows of `page` that are not there or off by more than FACTOR."""
    known = shown(page)
    return [
        what
        for what, numbers in now().items()
        if not all(
            one <= FACTOR * other and other <= FACTOR * one
            for one, other in zip(numbers, known.get(what, (0.0, 0.0)), strict=True)
        )
    ]


@pytest.mark.skipif(backends.why_not("cpu", device="cpu") is not None, reason="the CPU library cannot be had")
class TestErrorTable:
    @pytest.fixture(autouse=True)
    def vectors(self):
        if torch.ops.fastgan_cpu.instruction_set() == "plain":
            pytest.skip("the page was made with AVX2")

    def test_rows_are_those_of_the_kernels_as_they_are(self):
        assert len(now()) == 24
        assert not stale(error_table.PAGE.read_text(encoding="utf-8")), f"run {error_table.COMMAND}"

    def test_a_stale_row_shows(self):
        page = error_table.PAGE.read_text(encoding="utf-8")
        row = next(
            line for line in page.splitlines() if line.startswith("| bn_act | dbias | fp32 | contiguous | cpu |")
        )
        rms = row.split(" | ")[5]
        what = ("bn_act", "dbias", "fp32", "contiguous", "cpu")
        assert what in stale(page.replace(row, row.replace(rms, f"{2 * float(rms):.2e}", 1)))
        assert what in stale(page.replace(row, ""))
