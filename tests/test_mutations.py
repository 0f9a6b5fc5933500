"""Every barrier, bounds check and mask in the CUDA kernels matters: without it, some test turns red.

tests/mutations.py finds them in the sources and keeps the score; here the score is held against the sources.
"""

from collections import Counter

import mutations
import pytest

MUTANTS = mutations.mutants()


def test_every_guard_in_the_sources_is_in_the_score():
    """A new barrier, bounds check or mask: run `python tests/mutations.py`, which runs what is missing."""
    score = mutations.load_score()
    assert score.keys() == {m.key for m in MUTANTS}, "run `python tests/mutations.py`"
    assert len(score) == len(MUTANTS), "two mutants share a key"


def test_every_mutant_was_noticed_or_is_listed_as_equivalent():
    score = mutations.load_score()
    unnoticed = {key for key, by in score.items() if by == mutations.NOT_NOTICED}
    assert unnoticed == set(mutations.EQUIVALENT)
    known = {test for tests in mutations.TESTS.values() for test in tests}
    assert {by.partition("::")[0] for by in score.values() if "::" in by} <= known


@pytest.mark.slow
def test_no_mutant_is_left_to_run():
    left = [key for key, by in mutations.load_score().items() if by == mutations.NOT_RUN]
    assert not left, "run `python tests/mutations.py`"


def test_nothing_listed_is_gone():
    """An entry of the tables that no line of the sources needs would hide a guard to come."""
    lines = [(file, code) for file in mutations.TESTS for _, code in mutations.code_lines(file)]
    for file, part in mutations.NOT_GUARDS:
        assert any(name == file and part in code for name, code in lines), (file, part)
    assert {f.name for f in mutations.CUDA.glob("*.cu*")} == set(mutations.TESTS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  __syncthreads();", ["  ;"]),
        ("  wait_copies<stages - 2>();", ["  ;"]),
        ("  if (c >= n) return;", ["  if (false) return;"]),
        ("  if (a != 0 || c >= n) continue;", ["  if (false || c >= n) continue;", "  if (a != 0 || false) continue;"]),
        ("  if (i < n && inside) y[i] = 0;", ["  if (true && inside) y[i] = 0;", "  if (i < n && true) y[i] = 0;"]),
        ("  for (int i = f(a, b); i < n; i++) {", ["  for (int i = f(a, b); i <= n; i++) {"]),
        ("  for (int i = 0; i < V; i++) {", []),
        ("  while (x >= first[t + 1]) t++;", ["  while (false) t++;"]),
        ("  bool inside = p.inside && h < n;", ["  bool inside = true && h < n;", "  bool inside = p.inside && true;"]),
        ("  int end = min(begin + step, n);", ["  int end = begin + step;"]),
        ("  return inside ? p : nullptr;", ["  return true ? p : nullptr;"]),
        ("  copy(a ? b : c);", ["  copy(true ? b : c);"]),
        ("  copy(a, p != nullptr);", ["  copy(a, true);"]),
        ("  v += __shfl_xor_sync(all_lanes, v, bit);", ["  v += __shfl_xor_sync(0xffffu, v, bit);"]),
        ("  y[i] = x[i] + 1;", []),
    ],
)  # fmt: skip
def test_the_guards_of_a_line(line, expected):
    assert [line[:start] + new + line[end:] for start, end, new in mutations.sites(line)] == expected


def test_every_kind_occurs():
    kinds = Counter(m.new if m.new in (";", "true", "false", "0xffffu") else "other" for m in MUTANTS)
    assert set(kinds) == {";", "true", "false", "0xffffu", "other"}
    barriers = sum(f.read_text().count("__syncthreads();") for f in mutations.CUDA.glob("*.cu*"))
    kernels = "".join(f.read_text() for f in mutations.CUDA.glob("*.cu"))
    waits = kernels.count("wait_copies<")
    assert kinds[";"] == barriers + waits


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return mutations.Workshop(tmp_path_factory.mktemp("mutants"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tests", sorted({tuple(tests) for tests in mutations.TESTS.values()}), ids=str)
def test_unchanged_kernels_pass(workshop, tests):
    assert workshop.red_test(list(tests)) is None


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}:{m.number + 1}:{m.start + 1}")
def test_mutant_is_noticed(workshop, mutant):
    if mutant.key in mutations.EQUIVALENT:
        pytest.skip(f"equivalent: {mutations.EQUIVALENT[mutant.key]}")
    assert workshop.noticed(mutant) is not None, mutant.key
