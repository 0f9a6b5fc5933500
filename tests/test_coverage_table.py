"""The tables of what is proved say what the tests do."""

import coverage_table
import pytest
import test_adam_ema
import test_bn_act_cpu
import test_conv_bn_act_cuda

from fastgan.backends import BACKENDS


def test_the_committed_tables_are_the_tests_own():
    expected = coverage_table.page()
    assert coverage_table.PAGE.read_text() == expected, "run `python tests/coverage_table.py`"
    assert "| bn_stats | triton | bf16 | channels-last | yes | yes | yes |" in expected
    assert "| bn_act | triton | fp64 | contiguous | yes | no | no |" in expected
    assert "| gan_bce | cpu | bf16 | any | `test_bn_act_cpu.py::test_gan_bce` |" in expected


def test_every_operation_is_checked_on_every_backend_that_has_it():
    operations = ("bn_act", "conv_bn_act", "conv_transpose_bn_act", "gan_bce", "adam_ema")
    pairs = {(operation, backend) for operation in operations for backend in BACKENDS}
    assert {key[:2] for key in coverage_table.covered()} == pairs - {("adam_ema", "triton")}


FEWER = {
    "a kernel": (test_bn_act_cpu.test_kernel, "name", lambda values: values[:-1]),
    "a dtype": (test_adam_ema.test_cpu_kernel_against_the_definition, "dtype", lambda values: values[:1]),
    "transposed": (test_conv_bn_act_cuda.test_convolution_and_statistics, "case", lambda values: values[:5]),
}


@pytest.mark.parametrize("left_out", FEWER)
def test_a_test_that_covers_less_changes_the_table(left_out, monkeypatch):
    test, axis, fewer = FEWER[left_out]
    before = coverage_table.checked_rows()
    marks = [
        pytest.mark.parametrize(axis, fewer(mark.args[1])).mark if mark.args[:1] == (axis,) else mark
        for mark in test.pytestmark
    ]
    monkeypatch.setattr(test, "pytestmark", marks)
    assert coverage_table.checked_rows() != before
