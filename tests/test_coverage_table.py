"""The table of what is proved says what the tests do."""

import coverage_table


def test_the_committed_table_is_the_tests_own():
    expected = coverage_table.page()
    assert coverage_table.PAGE.read_text() == expected, "run `python tests/coverage_table.py`"
    assert "| bn_stats | triton | bf16 | channels-last | yes | yes | yes |" in expected
    assert "| bn_act | triton | fp64 | contiguous | yes | no | no |" in expected
