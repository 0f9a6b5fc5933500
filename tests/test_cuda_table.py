"""docs/cuda.md says what the runtime reports, what the mutants showed and what the budget allows."""

import re

import cuda_table


def without_lines(page: str) -> str:
    """Compilers differ by a line in where they say that an expression stands."""
    return re.sub(r"selftest\.cu:\d+", "selftest.cu", page)


def test_the_committed_tables_are_the_present_ones():
    expected = cuda_table.page()
    assert without_lines(cuda_table.PAGE.read_text()) == without_lines(expected), "run `python tests/cuda_table.py`"


def test_a_column_shows_how_far_the_dtypes_are_apart():
    kernels = {"f.cu": {"k<float>": {"sm_80": [32, 0, 1.0]}, "k<__half>": {"sm_80": [40, 0, 0.625]}}}
    assert cuda_table.resources(kernels, ["sm_80", "sm_90"]) == ["| f.cu | `k` | 32 to 40; 0; 62 to 100 % | - |"]
