"""The host SIMT runtime: each checker reports its planted bug, and nothing about the mended kernel beside it."""

import subprocess

import pytest

from fastgan import build
from simt import simt

# kernel: (what the broken one is reported as, a line of it)
PLANTED = {
    "shared_race": "race",
    "shared_overwrite": "race",
    "warp_race": "race",
    "partial_warp_order": "race",
    "global_race": "race",
    "block_race": "race",
    "block_read": "race",
    "atomic_mix": "race",
    "unwritten_shared": "unwritten",
    "unwritten_global": "unwritten",
    "read_out_of_bounds": "out of bounds",
    "write_out_of_bounds": "out of bounds",
    "dynamic_out_of_bounds": "out of bounds",
    "misaligned": "misaligned",
    "vector_race": "race",
    "vector_out_of_bounds": "out of bounds",
    "divergent_barrier": "divergent barrier",
    "deadlock": "deadlock",
    "lane_outside_mask": "bad mask",
    "lane_has_left": "bad mask",
    "shuffle_source": "bad mask",
    "different_collectives": "bad mask",
    "missing_wait": "pending copy",
    "wait_without_barrier": "race",
    "wrong_group": "pending copy",
    "abandoned_copy": "pending copy",
}


def source_lines(kernel: str) -> range:
    """The lines of a kernel in selftest.cu."""
    lines = (build.CSRC / "simt" / "selftest.cu").read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if f"void {kernel}(" in line)
    last = next((i for i in range(first, len(lines)) if lines[i - 1].endswith("}") and not lines[i]), first)
    return range(first, last + 1)


def test_every_kernel_is_listed():
    assert sorted(PLANTED) == simt().selftest_kernels()


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("kernel", PLANTED)
def test_planted_bug_is_reported(kernel, seed):
    simt().set_seed(seed)
    simt().selftest(kernel, True)
    reports = simt().take_reports()
    assert PLANTED[kernel] in {r["kind"] for r in reports}, reports
    for report in reports:
        assert report["kernel"] == kernel
        named = {int(w.split(":")[1]) for w in report["where"].split(", ") if w.startswith("selftest.cu:")}
        assert named & set(source_lines(kernel)), report


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("kernel", PLANTED)
def test_mended_kernel_is_not_reported(kernel, seed):
    simt().set_seed(seed)
    simt().selftest(kernel, False)
    assert simt().take_reports() == []


def test_report_names_block_and_threads():
    simt().set_seed(0)
    simt().selftest("block_race", True)
    (report,) = simt().take_reports()
    assert report["block"] == (1, 0, 0)
    assert report["thread"] == (0, 0, 0)
    assert report["count"] == 64
    assert report["message"] == "global memory: write not ordered after a write by thread 0 of block 0"


def test_seed_changes_the_order_of_threads():
    """Which thread is first to see the race depends on the order, so the seed must change the report."""
    seen = set()
    for seed in range(1, 6):
        simt().set_seed(seed)
        simt().selftest("shared_race", True)
        seen.add(simt().take_reports()[0]["thread"])
    assert len(seen) > 1


def test_runs_where_there_is_no_cuda():
    """The module needs no CUDA library and no CUDA header: it must run on machines without a toolkit."""
    linked = subprocess.run(["ldd", simt().__file__ or simt().__spec__.origin], capture_output=True, text=True)
    assert "cuda" not in linked.stdout
    for unit in build.get_build_parameters("simt").units:
        assert not any("cuda/include" in word or "-lcudart" in word for word in unit.command)
