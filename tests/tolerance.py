"""`assert_as_right_as_torch`: the tolerance rule of `fastgan.tolerance` as an assertion, shared by all
tests."""

from fastgan.tolerance import misses


def assert_as_right_as_torch(got, own, truth, what="", factor=2.0):
    """`got` (tensor or tuple) is at most twice as wrong against `truth` (fp64) as PyTorch's own result
    `own`."""
    reason = misses(got, own, truth, factor)
    assert reason is None, f"{what}: {reason}"
