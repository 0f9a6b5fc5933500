"""docs/errors.md shows the errors of the kernels as they are."""

import re
import sys
from pathlib import Path

import pytest
import torch

from fastgan import backends

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import error_table

# The kernels of bn_act and gan_bce compute the same bits for any number of threads, so that only another processor,
# with another copy of them, may move a digit. Not held: PyTorch's columns, which moved by up to 3 times between one
# thread and two, and the convolutions, which are the library's.
FACTOR = 1.2


def shown(page: str) -> dict[tuple[str, ...], tuple[float, float]]:
    """{(operation, output, dtype, layout, backend): (RMS, maximum)} of ours."""
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in page.splitlines()
        if re.search(r"\de[-+]\d", line)
    ]
    return {tuple(row[:5]): (float(row[5]), float(row[7])) for row in cells if len(row) == 9}


def stale(page: str) -> list[tuple[str, ...]]:
    """The rows of `page` that are not there or off by more than FACTOR."""
    found, known = [], shown(page)
    for *what, mine, own in error_table.rows(("cpu",)):
        if what[0] not in ("bn_act", "gan_bce"):
            continue
        now = shown(error_table.line(what, mine, own))[tuple(what)]
        pairs = zip(now, known.get(tuple(what), (0.0, 0.0)), strict=True)
        if not all(one <= FACTOR * other and other <= FACTOR * one for one, other in pairs):
            found.append(tuple(what))
    return found


@pytest.mark.skipif(backends.why_not("cpu", device="cpu") is not None, reason="the CPU library cannot be had")
class TestErrorTable:
    @pytest.fixture(autouse=True)
    def vectors(self):
        if torch.ops.fastgan_cpu.instruction_set() == "plain":
            pytest.skip("the page was made with AVX2")

    def test_rows_are_those_of_the_kernels_as_they_are(self):
        assert not stale(error_table.PAGE.read_text(encoding="utf-8")), "run python benchmarks/error_table.py"

    def test_a_stale_row_shows(self):
        page = error_table.PAGE.read_text(encoding="utf-8")
        row = next(
            line for line in page.splitlines() if line.startswith("| bn_act | dbias | fp32 | contiguous | cpu |")
        )
        rms = row.split(" | ")[5]
        what = ("bn_act", "dbias", "fp32", "contiguous", "cpu")
        assert what in stale(page.replace(row, row.replace(rms, f"{2 * float(rms):.2e}", 1)))
        assert what in stale(page.replace(row, ""))
