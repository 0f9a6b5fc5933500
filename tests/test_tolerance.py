"""The tolerance rule accepts what it should, and each way of being wrong makes it red."""

import pytest
import torch
from tolerance import assert_as_right_as_torch

from fastgan.tolerance import errors, misses, ulp

TRUTH = torch.linspace(-3, 3, 1000, dtype=torch.float64)
OWN = TRUTH.float() + 1e-6 * torch.sin(37 * TRUTH).float()


def test_errors_are_rms_and_maximum():
    rms, largest = errors(torch.tensor([1.0, 2.0, 3.0, 8.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    assert (rms, largest) == (2.0, 4.0)


def test_errors_do_not_underflow_or_overflow():
    tiny = torch.full((4,), 1e-200, dtype=torch.float64)
    assert errors(tiny, torch.zeros(4)).rms == pytest.approx(1e-200)
    assert errors(1e200 * torch.ones(4, dtype=torch.float64), torch.zeros(4)).rms == pytest.approx(1e200)


@pytest.mark.parametrize(("value", "expected"), [(1.0, 2**-23), (1.99, 2**-23), (2.0, 2**-22), (0.75, 2**-24)])
def test_ulp(value, expected):
    assert ulp(value, torch.float32) == expected


def test_ulp_of_zero_is_the_smallest_subnormal():
    assert ulp(0.0, torch.float32) == 2.0**-149


def test_pytorch_s_own_result_passes():
    assert_as_right_as_torch(OWN, OWN, TRUTH)


def test_just_under_twice_the_error_passes_and_just_over_fails():
    error = OWN.double() - TRUTH
    assert misses((TRUTH + 1.9 * error).float(), OWN, TRUTH) is None
    assert "RMS" in misses((TRUTH + 2.3 * error).float(), OWN, TRUTH)


def test_one_wrong_element_among_many_fails_by_the_maximum():
    got = OWN.clone()
    got[500] += 1e-5
    assert errors(got, TRUTH).rms < 2 * errors(OWN, TRUTH).rms
    assert misses(got, OWN, TRUTH) is not None


def test_the_ulp_is_granted_to_the_maximum_only():
    truth = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    own = truth.float()
    assert misses(own + torch.tensor([2**-23, 0, 0, 0]), own, truth) is not None  # RMS of an exact result is 0
    rough = own + 2**-22
    assert misses(own + torch.tensor([5 * 2**-23, 0, 0, 0]), rough, truth) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_truth_rounded_to_the_output_dtype_always_passes(dtype):
    """No result of that dtype is nearer, PyTorch's own neither: the rule needs no allowance for rounding."""
    own = (TRUTH * (1 + 1e-9)).to(dtype)
    assert misses(TRUTH.to(dtype), own, TRUTH) is None
    assert misses(TRUTH.to(dtype), TRUTH.to(dtype), TRUTH) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_or_infinity_where_the_truth_is_finite_fails(bad):
    got = OWN.clone()
    got[3] = bad
    assert misses(got, OWN, TRUTH) is not None


@pytest.mark.parametrize(("own", "got", "right"), [("nan", "nan", True), ("inf", "inf", True), ("inf", "-inf", False)])
def test_non_finite_results_must_be_pytorch_s(own, got, right):
    truth, mine, theirs = TRUTH.clone(), OWN.clone(), OWN.clone()
    truth[7], theirs[7], mine[7] = float(own), float(own), float(got)
    assert (misses(mine, theirs, truth) is None) == right


def test_an_overflow_of_the_dtype_that_pytorch_has_too_is_allowed():
    truth = torch.tensor([1.0, 1e6], dtype=torch.float64)
    own = truth.half()
    assert torch.isinf(own[1])
    assert misses(own.clone(), own, truth) is None


def test_shape_and_dtype_must_be_pytorch_s():
    assert "expected" in misses(OWN[:5], OWN, TRUTH)
    assert "expected" in misses(OWN.double(), OWN, TRUTH)


def test_each_output_of_a_tuple_is_held_to_the_rule():
    wrong = OWN + 1
    assert "output 1" in misses((OWN, wrong), (OWN, OWN), (TRUTH, TRUTH))
